"""`varidepth heal CHECKPOINT TEXT --source SOURCE -o OUT`: what a conversion lost, learned again from its source."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..conversion.checkpoint_writer import check_output
from ..conversion.source_checkpoint import open_source
from ..training.healing_checkpoint import write_healed
from ..training.healing_run import STARTS, Healed, HealingSettings, heal
from ..training.hidden_matching import MATCHED_STATES
from ..training.training_checkpoints import how_to_resume
from .checkpoint_loading import load_checkpoint, load_teacher


_NUMBERS: dict[str, tuple[type, str]] = {
    "fit_tokens": (int, "tokens of the text for the fitted start"),
    "seq_len": (int, "tokens per row"),
    "batch_size": (int, "rows per forward pass"),
    "accumulation": (int, "forward passes per step"),
    "learning_rate": (float, "share of its size by which a parameter moves per step"),
    "hidden_weight": (float, "weight of the distance of the hidden states"),
    "distillation_weight": (float, "share of the teacher's distribution in the loss, against the text itself"),
    "temperature": (float, "of the distributions"),
    "routing_begin": (float, "share of the training after which routers start"),
    "routing_end": (float, "share of the training after which capacities have fallen"),
    "sampled_tokens": (int, "tokens that the source writes itself before the training"),
    "sampled_rows": (float, "share of the rows of the training that are taken from them"),
    "save_steps": (int, "steps between checkpoints, 0 for none"),
    "seed": (int, "of the order of the text"),
}
_DEFAULTS = HealingSettings(tokens=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, source, text, length, output, and the settings."""
    parser.add_argument("checkpoint", help="folder of a MoR or MoD, as `varidepth convert` made it")
    parser.add_argument("text", help="file or folder (.txt, .jsonl, .parquet ...), or id of a dataset on the Hub")
    parser.add_argument("--source", required=True, help="folder, GGUF file or Hub id that the checkpoint was made of")
    parser.add_argument("-o", "--output", required=True, help="folder to make")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="how long to train")
    length.add_argument("--tokens", type=int, help="how many tokens to train on")
    parser.add_argument(
        "--start", choices=STARTS, help="how the shared layers begin (default: fitted, where the model can be)"
    )
    parser.add_argument(
        "--hidden-states", choices=MATCHED_STATES, help=f"where they are compared (default: {_DEFAULTS.hidden_states})"
    )
    for name, (kind, text) in _NUMBERS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, help=f"{text} (default: {getattr(_DEFAULTS, name)})")
    parser.add_argument("--train-embeddings", action="store_true", default=None, help="train embeddings and head too")
    parser.add_argument("--text-column", default="text", help="column of the text (default: text)")
    parser.add_argument("--text-config", help="configuration of a dataset on the Hub")
    parser.add_argument("--text-split", default="train", help="split of a dataset on the Hub (default: train)")
    parser.add_argument("--work", help="folder for checkpoints of the training (default: OUTPUT-training)")
    parser.add_argument("--resume", action="store_true", help="go on with the last checkpoint of the training")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in the output folder")
    parser.add_argument("--quiet", action="store_true", help="no line of progress")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Heals, prints what was done, writes the checkpoint.

    Raises:
        ValueError: for settings, texts and checkpoints that do not fit, or an output that is not free.
    """
    # also starts the group of processes, where there are several
    is_main = PartialState(cpu=not torch.accelerator.is_available()).is_main_process
    fields = {field.name for field in dataclasses.fields(HealingSettings)}
    given = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    settings = HealingSettings(**given)
    local = Path(args.checkpoint) if Path(args.checkpoint).exists() else None
    output = Path(args.output)
    check_output(output, local, overwrite=args.overwrite)
    model, tokenizer = load_checkpoint(args.checkpoint, dtype="float32")
    teacher = load_teacher(args.source)
    work = Path(args.work or f"{output}-training")
    try:
        healed = heal(
            model,
            teacher,
            args.text,
            tokenizer,
            settings,
            work,
            text_options={"config": args.text_config, "split": args.text_split, "column": args.text_column},
            resume=args.resume,
            show=not args.quiet and sys.stderr.isatty(),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_resume(work)) from None
    if not is_main:
        return
    checkpoint = open_source(local or args.checkpoint, allowed=(model.config.model_type,))
    text = Path(args.text).name if Path(args.text).exists() else args.text
    write_healed(model, checkpoint, output, settings, healed, text, overwrite=args.overwrite)
    print(json.dumps(_figures(healed), indent=2) if args.json else _text(healed))


def _figures(healed: Healed) -> dict[str, Any]:
    return {
        "steps": healed.steps,
        "tokens": healed.tokens,
        "not_fitted": healed.not_fitted,
        "not_started": healed.not_started,
        "fitted": [dataclasses.asdict(layer) for layer in healed.fitted],
        "calibration": None if healed.calibration is None else dataclasses.asdict(healed.calibration),
        "log": [entry for entry in healed.log if "kl" in entry],
    }


def _text(healed: Healed) -> str:
    lines = []
    if healed.fitted:
        last = healed.fitted[-1]
        errors = ", ".join(f"{error:.3f}" for error in last.error)
        lines.append(f"fitted      {len(healed.fitted)} layers; relative error behind the last one {errors}")
    if healed.not_fitted is not None:
        lines.append(f"not fitted  {healed.not_fitted}")
    if healed.not_started is not None:
        lines.append(f"routers     learned from where conversion left them: {healed.not_started}")
    logs = [entry for entry in healed.log if "kl" in entry]
    lines.append(f"trained     {healed.tokens} tokens in {healed.steps} steps")
    if logs:
        lines.append(f"distance    {logs[0]['kl']:.3f} -> {logs[-1]['kl']:.3f} nats per token from the source (KL)")
    if healed.calibration is not None:
        lines += ["", healed.calibration.table()]
    return "\n".join(lines)
