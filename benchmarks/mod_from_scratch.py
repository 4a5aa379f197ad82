"""Does the router of a Mixture-of-Depths learn something? Learned against stochastic routing at equal FLOPs.

    python benchmarks/mod_from_scratch.py --text a.txt b.txt --steps 400 --seeds 0 1 2 --write

Small models are trained from scratch on text, all arms of a seed on the same batches in the same order: `learned` and
`stochastic` (the paper's control, section 3.3, whose tokens are drawn at random) process the same number of tokens in
the same layers, `dense` processes all. The causal rule is a predictor on detached inputs, or in `learned, auxiliary
loss` a threshold on the score, whose cross-entropy also moves the model. Held-out loss is measured with top-k routing
and with the causal rule.
"""

import argparse
import math
import statistics

import torch
from interleaved import publish
from paired_seeds import paired_difference
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from varidepth import MoDConfig, MoDForCausalLM
from varidepth.training.calibration import calibrate
from varidepth.training.text_blocks import load_documents, split_documents


ARMS = {
    "dense": {"routed_layers": []},
    "learned": {"inference_rule": "predictor"},
    "learned, auxiliary loss": {"inference_rule": "threshold", "aux_loss_coef": 0.01},
    "stochastic": {"routing": "stochastic"},
}
LENGTH = 256


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    documents = [document for path in args.text or [None] for document in load_documents(path)]
    train_texts, held_texts = split_documents(documents, held_out=0.1, seed=0)
    tokenizer = train_tokenizer(train_texts, args.vocabulary)
    train, held = rows_of(tokenizer, train_texts), rows_of(tokenizer, held_texts)[: args.held_out_rows]
    print(f"{len(documents)} documents, {train.numel()} training tokens, {held.numel()} held-out tokens")
    losses: dict[str, list[tuple[float, float]]] = {arm: [] for arm in args.arms}
    for seed in args.seeds:
        for arm in args.arms:
            model = train_model(ARMS[arm], train, args, seed)
            losses[arm].append(measure(model, held, train[: args.calibration_rows]))
            topk, causal = losses[arm][-1]
            print(f"seed {seed} {arm:<24} top-k {topk:.4f} causal {causal:.4f}", flush=True)
    publish(__file__, report(losses, train, args), args.write)


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: a small vocabulary keeps the layers' share of the compute large."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def rows_of(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Rows of `LENGTH` tokens, of shape `(rows, LENGTH)`, documents divided by token 0."""
    tokens = [token for encoding in tokenizer.encode_batch(texts) for token in (0, *encoding.ids)]
    rows = len(tokens) // LENGTH
    return torch.tensor(tokens[: rows * LENGTH]).view(rows, LENGTH)


def train_model(fields: dict, train: torch.Tensor, args: argparse.Namespace, seed: int) -> MoDForCausalLM:
    """Trains one arm; the batches depend on the seed alone."""
    fields = {"capacity": args.capacity, **fields} if fields.get("routed_layers") != [] else fields
    config = MoDConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        num_key_value_heads=args.width // 32,
        tie_word_embeddings=True,
        **fields,
    )
    torch.manual_seed(seed)
    model = MoDForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    for step in range(args.steps):
        picked = order[torch.arange(step * args.batch, (step + 1) * args.batch) % len(order)]
        loss = model(train[picked], labels=train[picked]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def measure(model: MoDForCausalLM, held: torch.Tensor, text: torch.Tensor) -> tuple[float, float]:
    """Held-out loss, nats per token, with top-k routing and with the causal rule, calibrated on training text."""

    def loss() -> float:
        return statistics.fmean(float(model(rows, labels=rows, use_cache=False).loss) for rows in held.split(8))

    config = model.config
    if config.routing == "stochastic" or not config.routed_layers:
        causal = loss()
        return causal, causal
    calibrate(model, text.split(8))
    causal = loss()
    config.inference_rule = "topk"
    return loss(), causal


def report(losses: dict[str, list[tuple[float, float]]], train: torch.Tensor, args: argparse.Namespace) -> list[str]:
    """The Markdown page."""
    lines = [
        "# Learned against stochastic routing",
        "",
        f"{args.layers} layers of width {args.width}, {args.vocabulary} tokens vocabulary, capacity {args.capacity} "
        f"in every other layer; {args.steps} steps of {args.batch} x {LENGTH} tokens out of {train.numel()}; nats per "
        "token on held-out text.",
        "",
        "| seed | " + " | ".join(f"{arm}{suffix}" for arm in args.arms for suffix in suffixes(arm)) + " |",
        "|---|" + "---|" * sum(len(suffixes(arm)) for arm in args.arms),
    ]
    for i, seed in enumerate(args.seeds):
        cells = [f"{losses[arm][i][j]:.4f}" for arm in args.arms for j in range(len(suffixes(arm)))]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    for arm in (arm for arm in args.arms if arm.startswith("learned") and "stochastic" in args.arms):
        for j, rule in enumerate(("top-k", "causal rule")):
            learned, stochastic = ([pair[j] for pair in losses[one]] for one in (arm, "stochastic"))
            lines += ["", f"Stochastic minus {arm}, {rule}: {paired_difference(learned, stochastic)}."]
    return lines


def suffixes(arm: str) -> tuple[str, ...]:
    """Both losses where they differ."""
    return (", top-k", ", causal") if arm.startswith("learned") else ("",)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="*", help="text files (default: the pydoc topics)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--capacity", type=float, default=0.125)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--held-out-rows", type=int, default=128)
    parser.add_argument("--calibration-rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the page beside this script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
