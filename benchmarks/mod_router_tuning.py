"""How much attention can a pretrained model do without, if only its routers are trained?

    python benchmarks/mod_router_tuning.py --source smollm2.gguf --text a.txt b.txt --held-out c.txt --write

Converts a checkpoint to a Mixture-of-Depths that routes attention, starts the routers from measured importance, trains
them alone (or, with `--lora RANK`, adapters with them) by distillation from the unrouted model, calibrates, and
measures the loss on held-out text and a greedy continuation at several shares of skipped attention. The time covers
everything from the first measurement to the last calibration.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from interleaved import publish
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments
from transformers.utils import logging

from varidepth import convert
from varidepth.analysis.perplexity import held_out_loss
from varidepth.training.calibration import calibrate
from varidepth.training.distillation import DistillationTrainer
from varidepth.training.importance_start import start_by_importance
from varidepth.training.text_blocks import TokenBlocks, load_documents, token_blocks
from varidepth.training.time_limit import TimeLimitCallback


WINDOW = 256
PROMPT = "The capital of France is"
MESSAGE = "Give me three tips for staying healthy."


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        lines = [line for skipped in args.skipped for line in study(args, skipped, Path(folder))]
    publish(__file__, [*header(args), *lines], args.write)


def study(args: argparse.Namespace, skipped: float, folder: Path) -> list[str]:
    """One share of the attention: converts, tunes, measures; the rows of the table and the samples."""
    output = folder / "mod"
    shutil.rmtree(output, ignore_errors=True)
    probe = convert(args.source, None, to="mod", dry_run=True, quiet=True)
    depth = probe.config.num_hidden_layers
    routed = list(range(1, depth))
    convert(args.source, output, to="mod", routed_layers=routed, capacity=0.5, dtype="float32", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(output)
    teacher = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    documents = [document for path in args.text for document in load_documents(path)]
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    blocks = token_blocks([documents[i] for i in order[: args.documents]], tokenizer, length=WINDOW).blocks
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]
    held_out = load_documents(args.held_out)

    def loss(measured: PreTrainedModel) -> float:
        measured.eval()
        result = held_out_loss(
            measured, tokenizer, held_out, window=WINDOW, batch_size=4, max_tokens=args.held_out_tokens
        )
        return result.nats_per_token

    source_loss = loss(teacher)
    begin = time.monotonic()
    sample = blocks[: args.start_tokens // WINDOW]
    start_by_importance(model, sample.split(4), share=1 - skipped * depth / len(routed))
    calibrate(model, sample[: args.calibration_rows].split(4), positions=())
    rows = [row(model, tokenizer, held_out, "started", source_loss, loss(model), depth)]
    print(rows[-1], flush=True)
    adapted, tokens = tune(model, teacher, blocks[len(sample) :], args, begin, folder)
    report = calibrate(adapted, sample[: args.calibration_rows].split(4))
    minutes = (time.monotonic() - begin) / 60
    name = f"tuned, {tokens} tokens" + (f", LoRA {args.lora}" if args.lora else "")
    rows.append(row(adapted, tokenizer, held_out, name, source_loss, loss(adapted), depth))
    print(rows[-1], flush=True)
    for point in adapted.config.compute_curve[1:-1]:
        adapted.config.compute = point["compute"]
        rows.append(
            row(adapted, tokenizer, held_out, f"compute {point['compute']:.3f}", source_loss, loss(adapted), depth)
        )
        print(rows[-1], flush=True)
    adapted.config.compute = None
    text = [
        f"{minutes:.1f} minutes from the first measurement to the last calibration.",
        "",
        "```",
        report.table(),
        "```",
    ]
    return [
        "",
        f"## {skipped:.0%} of the attention to be skipped",
        "",
        "| routers | attention skipped | loss | above the source |",
        "|---|---|---|---|",
        *rows,
        "",
        *text,
        "",
        *(f"> {line}" for line in samples(adapted, tokenizer)),
    ]


def tune(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks: torch.Tensor,
    args: argparse.Namespace,
    begin: float,
    folder: Path,
) -> tuple[PreTrainedModel, int]:
    """Distils for what is left of the time; returns the model, adapters merged, and the tokens it was trained on."""
    model.config.training_path = "masked"
    routers = list(model.model.routers.parameters())
    trained = model
    model.requires_grad_(False)
    groups = [{"params": routers, "lr": args.router_learning_rate}]
    if args.lora:
        from peft import LoraConfig, get_peft_model

        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        trained = get_peft_model(model, LoraConfig(r=args.lora, lora_alpha=args.lora, target_modules=modules))
        groups.append({"params": [p for p in trained.parameters() if p.requires_grad], "lr": args.learning_rate})
    for router in routers:
        router.requires_grad_(True)
    # a part of the time is for the last calibration
    limit = TimeLimitCallback(max(0.05, args.minutes - args.calibration_minutes - (time.monotonic() - begin) / 60))
    limit.tokens_per_step = args.batch * WINDOW
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    trainer = DistillationTrainer(
        model=trained,
        teacher=teacher,
        train_dataset=TokenBlocks(blocks),
        optimizers=(optimizer, limit.schedule(optimizer)),
        args=TrainingArguments(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=args.batch,
            max_steps=1_000_000,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
    )
    limit.attach(trainer)
    trainer.train()
    merged = trained.merge_and_unload() if args.lora else model
    return merged.eval(), limit.steps * limit.tokens_per_step


@torch.no_grad()
def row(
    model: PreTrainedModel, tokenizer, held_out: list[str], name: str, source_loss: float, loss: float, depth: int
) -> str:
    """A row of the table; the skipped share is that of all pairs of a held-out token and a layer."""
    rows = token_blocks(held_out, tokenizer, length=WINDOW).blocks[:16]
    masks = [model(ids, use_cache=False, output_routing=True, logits_to_keep=1).routing_mask for ids in rows.split(4)]
    passed_by = sum(int((~mask).sum()) for mask in masks)
    return f"| {name} | {passed_by / (rows.numel() * depth):.3f} | {loss:.4f} | {loss - source_loss:+.4f} |"


@torch.no_grad()
def samples(model: PreTrainedModel, tokenizer) -> Iterator[str]:
    """Greedy continuations of a text and of a chat."""
    prompts = [tokenizer(PROMPT, return_tensors="pt")]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": MESSAGE}]
        prompts.append(
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        )
    for inputs, shown in zip(prompts, (PROMPT, MESSAGE), strict=False):
        tokens = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        yield f"**{shown}** {' '.join(tokenizer.decode(tokens, skip_special_tokens=True).split())}"
        yield ""


def header(args: argparse.Namespace) -> list[str]:
    return [
        "# Attention that a pretrained model can do without",
        "",
        f"{Path(args.source).name}, every layer but the first routed by attention, one token always entering; "
        f"{args.minutes:g} minutes on {args.threads} thread(s) for measuring, training and calibrating. Loss in nats "
        f"per token on {args.held_out_tokens} held-out tokens in windows of {WINDOW}, by the causal rule; the share "
        "is of all pairs of token and layer, the first layer included.",
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder, GGUF file or Hub id")
    parser.add_argument("--text", nargs="+", required=True, help="text files to measure, train and calibrate on")
    parser.add_argument("--held-out", required=True, help="text file that is only measured")
    parser.add_argument("--skipped", type=float, nargs="+", default=[0.25, 0.5], help="shares of all attention")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument(
        "--calibration-minutes", type=float, default=3, help="kept of the time for the last calibration"
    )
    parser.add_argument("--documents", type=int, default=400, help="training documents to tokenize")
    parser.add_argument("--start-tokens", type=int, default=8192)
    parser.add_argument("--calibration-rows", type=int, default=12)
    parser.add_argument("--held-out-tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--router-learning-rate", type=float, default=3e-5)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of the adapters")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters with the routers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the page beside this script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
