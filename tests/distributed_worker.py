"""What one of two processes runs for tests/test_distributed.py: `distributed_worker.py SUITE FOLDER`.

Started by `accelerate launch` or `torchrun`. Every check of a suite leaves `CHECK.RANK.pt` in the folder: what it
returned, or the traceback it died of. The same functions run in the test's own process, with the whole batch, for
comparison.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tiny_families import SIZES, VOCABULARY, tiny_mod, tiny_mor
from tiny_jrt import tiny_jrt
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from varidepth.training.distillation import DistillationTrainer


WAIT = 300  # seconds after which a rank that is left alone gives up
GLOBAL_BATCH = 4
STEPS = 3
LOSSES = {"aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}
MOR = {**LOSSES, "capacities": [1.0, 0.5, 0.3], "tie_word_embeddings": True}
TOKEN = {"routing": "token_choice", "router_z_loss_coef": 0.01}
PREDICTED = {**LOSSES, "capacity": 0.4, "inference_rule": "predictor"}
EMA = {**LOSSES, "inference_rule": "ema_threshold", "ema_decay": 0.5}
# in all steps below, what enters and what does not is at least 2e-4 apart: rounding flips nothing
MODELS: dict[str, Callable[[], Any]] = {
    "mor": lambda: tiny_mor(**MOR),
    "mor-shared": lambda: tiny_mor(**MOR, kv_mode="shared"),
    "mor-warmup": lambda: tiny_mor(**MOR, sharing="middle_sequence", capacity_warmup_steps=4),
    "mor-token-loss": lambda: tiny_mor(**TOKEN, balancing_coef=0.5),
    "mor-token-free": lambda: tiny_mor(**TOKEN, balancing="loss_free", balancing_update_rate=0.01),
    "mor-adapters": lambda: tiny_mor(**MOR, recursion_rank=2, recursion_norms=True, seed=1),
    "mod-block": lambda: tiny_mod(**EMA),
    "mod-attention": lambda: tiny_mod(**LOSSES, routing_unit="attention"),
    "mod-mlp": lambda: tiny_mod(**LOSSES, routing_unit="mlp"),
    "mod-predictor": lambda: tiny_mod(**PREDICTED),
    "mod-experts": lambda: tiny_mod("mixtral", **LOSSES, output_router_logits=False),
    "jrt": tiny_jrt,
}


def rows(number: int, *, ragged: bool = True, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random rows of 9 to 14 tokens, or of 12."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(9, 15, (number,), generator=generator).tolist() if ragged else [12] * number
    ids = [torch.randint(3, VOCABULARY - 1, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def pad_rows(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in batch)

    def stacked(name: str, fill: int) -> torch.Tensor:
        return torch.stack(
            [torch.nn.functional.pad(row[name], (0, length - len(row[name])), value=fill) for row in batch]
        )

    return {
        "input_ids": stacked("input_ids", 0),
        "labels": stacked("labels", -100),
        "attention_mask": stacked("labels", -100).ne(-100).long(),
    }


def trainer_for(model: Any, folder: Path, data: list, **fields: Any) -> Trainer:
    """A Trainer whose ranks share `GLOBAL_BATCH` rows of each step.

    With plain SGD: Adam divides by the size of a gradient, so that rounding of one near zero becomes a whole step.
    """
    teacher, callbacks = fields.pop("teacher", None), fields.pop("callbacks", None)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // ranks,
        "per_device_eval_batch_size": GLOBAL_BATCH // ranks,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_timeout": WAIT,
        "seed": 0,
    }
    args = TrainingArguments(output_dir=str(folder), **{**settings, **fields})
    _tell_accelerate()
    parts = {"model": model, "args": args, "train_dataset": data, "eval_dataset": rows(8, ragged=False, seed=9)}
    parts |= {"data_collator": pad_rows, "callbacks": callbacks}
    if teacher is None:
        return Trainer(**parts)
    return DistillationTrainer(**parts, teacher=teacher, distillation_weight=0.7, chunk=8)


def _tell_accelerate() -> None:
    """accelerate shards models on accelerators only; FSDP2 itself does not mind that its ranks are CPU processes."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers as in one process."""
    model = getattr(model, "module", model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name.replace("_checkpoint_wrapped_module.", ""): whole(tensor) for name, tensor in tensors}


def train(name: str, folder: Path, **fields: Any) -> dict[str, Any]:
    """Losses and weights of a short training, and the loss of an evaluation behind it."""
    # the two means of JRT-RNN's loss add up over parts of equally many labels
    data = rows(GLOBAL_BATCH * 6, ragged=name != "jrt")
    trainer = trainer_for(MODELS[name](), folder, data, **fields)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": torch.tensor([entry["loss"] for entry in log]),
        "parts": {key: [entry[key] for entry in log] for key in ("ce", "kl", "router_loss") if key in log[0]},
        "eval_loss": trainer.evaluate()["eval_loss"],
        "state": whole_state(trainer.model),
    }


def teacher() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 2}))


def distil(folder: Path, **fields: Any) -> dict[str, Any]:
    return train("mor", folder, teacher=teacher(), **fields)


def accumulate(folder: Path) -> dict[str, Any]:
    """Twice as many rows for each step; the parts of a step have different numbers of tokens."""
    return train("mor", folder, gradient_accumulation_steps=2)


def checkpointed(folder: Path) -> dict[str, Any]:
    """Where every parameter needs a gradient on every rank, as Trainer then looks for unused ones no longer."""
    return train("mor-shared", folder, gradient_checkpointing=True)


def wrapped(folder: Path) -> dict[str, Any]:
    """Under FSDP's own activation checkpointing, which puts a wrapper around every layer."""
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = "true"
    try:
        return train("mor-shared", folder)
    finally:
        del os.environ["FSDP_ACTIVATION_CHECKPOINTING"]


def no_tokens_on_rank_1(folder: Path) -> dict[str, Any]:
    """Rank 1 has no token at depths 2 and 3; in training, in evaluation, and in generation with a cache."""
    model = tiny_mor(**TOKEN)
    deep, shallow = torch.full((10,), 7), torch.full((10,), 8)
    with torch.no_grad():
        embedding, router = model.model.embed_tokens.weight, model.model.routers.weight
        embedding[7, 0], embedding[8, 0] = 4.0, -4.0
        router.zero_()
        router[0, 2, 0], router[0, 0, 0] = 2.0, -2.0
        for layer in model.model.layers[: model.config.prelude_layers]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    data = [{"input_ids": row, "labels": row} for row in [deep, deep, shallow, shallow] * 3]
    trainer = trainer_for(
        model, folder, data, train_sampling_strategy="sequential", gradient_checkpointing=True, learning_rate=1e-3
    )
    trainer.train()
    rank = int(os.environ.get("RANK", -1))
    trainer.model.eval()
    prompts = torch.stack([deep, shallow]) if rank < 0 else torch.stack([(deep, shallow)[rank]])
    with torch.no_grad():
        output = trainer.model(prompts, output_routing=True)
        generated = trainer.model.generate(prompts, max_new_tokens=4, do_sample=False, pad_token_id=0)
    state = whole_state(trainer.model)
    log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": torch.tensor(log),
        "state": state,
        "depth": output.token_depth,
        "logits": whole(output.logits),
        "generated": generated,
    }


def save_and_resume(folder: Path) -> dict[str, Any]:
    """Four steps at once against two, a checkpoint and two more; and who writes files."""
    rank = os.environ.get("RANK", "0")
    fields = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 4}
    trainer = trainer_for(MODELS["mor-token-free"](), folder, rows(GLOBAL_BATCH * 6), **fields)
    trainer.args.set_save(strategy="steps", steps=2)
    trainer.train()
    through = whole_state(trainer.model)
    trainer.save_model(str(folder / f"saved-by-{rank}"))
    again = trainer_for(MODELS["mor-token-free"](), folder / "again", rows(GLOBAL_BATCH * 6), **fields)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    files = sorted(file.name for file in (folder / f"saved-by-{rank}").glob("*"))
    return {"state": through, "resumed": whole_state(again.model), "files": files}


def ragged_last_batches(folder: Path) -> dict[str, Any]:
    """Two epochs over 9 rows: the last batch of each is not whole, and its rows are not the same number everywhere."""
    trainer = trainer_for(
        MODELS["mor-token-free"](), folder, rows(9), max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2
    )
    trainer.train()
    return {"state": whole_state(trainer.model), "steps": trainer.state.global_step}


def no_prefix_on_rank_1(folder: Path) -> dict[str, Any]:
    """Half of the rows have no prefix; without checkpointing and without looking for unused parameters."""
    data = rows(GLOBAL_BATCH * 3, ragged=False)
    for number, row in enumerate(data):
        row["prefix_length"] = torch.tensor(6 if number % 4 < 2 else 0)

    def collate(batch: list) -> dict[str, torch.Tensor]:
        return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}

    trainer = trainer_for(
        tiny_jrt(), folder, data, train_sampling_strategy="sequential", ddp_find_unused_parameters=False
    )
    trainer.data_collator = collate
    trainer.train()
    return {"state": whole_state(trainer.model)}


def mixed_precision(folder: Path) -> dict[str, Any]:
    """bf16 for all but the routers."""
    from varidepth.training.sharding import FullPrecisionRouters

    seen: dict[str, torch.dtype] = {}

    def note(bank: torch.nn.Module, args: tuple, logits: torch.Tensor) -> None:
        seen["router"], seen["logits"] = bank.weight.dtype, logits.dtype

    def note_layer(projection: torch.nn.Module, args: tuple) -> None:
        seen["layer"] = projection.weight.dtype

    model = MODELS["mor"]()
    model.model.routers.register_forward_hook(note)
    model.model.layers[1].mlp.gate_proj.register_forward_pre_hook(note_layer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_for(model, folder, rows(GLOBAL_BATCH * 3), bf16=True, callbacks=[FullPrecisionRouters()])
    trainer.train()
    state = whole_state(trainer.model)
    moved = [name for name in before if name in state and not torch.equal(before[name], state[name])]
    return {"seen": seen, "state": state, "moved": moved, "loss": trainer.state.log_history[0]["loss"]}


def sharded_by_transformers(name: str, checkpoint: Path, **distributed: int) -> dict[str, Any]:
    """Logits, routing, loss, gradients and generation of a checkpoint, divided by `from_pretrained` or not at all."""
    divided: dict[str, Any] = {}
    if distributed:
        from transformers.distributed import DistributedConfig

        divided = {"distributed_config": DistributedConfig(**distributed)}
    model = AutoModelForCausalLM.from_pretrained(checkpoint / name, **divided).eval()
    batch = pad_rows(rows(GLOBAL_BATCH, ragged=name != "jrt", seed=2))
    asked = {} if name == "jrt" else {"output_routing": True}
    with torch.no_grad():
        output = model(**batch, **asked)
        generated = model.generate(
            batch["input_ids"][:2, :9], max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=True
        )
    loss = model.train()(**batch).loss
    loss.backward()
    found = {
        "logits": whole(output.logits),
        "routing": output.get("routing_mask"),
        "generated": generated,
        "loss": loss.item(),
        "gradients": {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None},
        "divided": sorted(n for n, p in model.named_parameters() if hasattr(p, "full_tensor")),
    }
    if distributed:
        model.save_pretrained(checkpoint / f"{name}-saved-{'-'.join(distributed)}")
    return found


def script(folder: Path) -> dict[str, Any]:
    """The script of docs/distributed.md, in a folder with the checkpoint that it trains."""
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    os.chdir(folder)
    _tell_accelerate()
    exec(compile(re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)[0], "docs/distributed.md", "exec"), {})
    return {}


Check = Callable[[Path], dict[str, Any]]


def _training(name: str) -> Check:
    return lambda folder: train(name, folder)


def _dividing(name: str, **sizes: int) -> Check:
    return lambda folder: sharded_by_transformers(name, folder.parent / "checkpoints", **sizes)


BOTH: dict[str, Check] = {
    "distil": distil,
    "accumulate": accumulate,
    "checkpointed": checkpointed,
    "no-tokens": no_tokens_on_rank_1,
    "no-prefix": no_prefix_on_rank_1,
    "resume": save_and_resume,
    "script": script,
}
DDP = ("mor", "mor-shared", "mor-warmup", "mor-token-loss", "mor-token-free", "mod-block", "mod-attention")
DDP += ("mod-predictor", "jrt")
FSDP = ("mor", "mor-warmup", "mor-token-free", "mor-adapters", "mod-block", "mod-attention", "mod-experts", "jrt")
DIVIDED = ("mor", "mor-shared", "mor-token-free", "mod-block", "mod-attention", "mod-mlp", "mod-experts", "jrt")
SUITES: dict[str, dict[str, Check]] = {
    "ddp": {**{name: _training(name) for name in DDP}, **BOTH, "ragged": ragged_last_batches},
    "fsdp": {**{name: _training(name) for name in FSDP}, **BOTH, "wrapped": wrapped, "mixed": mixed_precision},
    "native": {
        **{f"tp-{name}": _dividing(name, tp_size=2) for name in DIVIDED},
        **{f"fsdp-{name}": _dividing(name, fsdp_size=2) for name in ("mor", "mod-block", "jrt")},
    },
}


def main(suite: str, folder: Path, only: str = "") -> None:
    rank = int(os.environ["RANK"])
    if suite == "native":
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=WAIT))
    for name, check in SUITES[suite].items():
        if only and name != only:
            continue
        try:
            result: Any = check(folder / name)
        except Exception:
            result = traceback.format_exc()
        _forget_accelerate()
        torch.save(result, folder / f"{name}.{rank}.pt")
        if isinstance(result, str):
            print(f"{name} on rank {rank}: {result}", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _forget_accelerate() -> None:
    """The next check may choose another precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
