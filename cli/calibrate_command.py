"""`varidepth calibrate CHECKPOINT FILE -o OUT`: thresholds that spend the wanted compute, and what they cost."""

import argparse
import dataclasses
import json
from pathlib import Path

from ..conversion.checkpoint_writer import check_output
from ..conversion.config_update import copy_with_config
from ..conversion.source_checkpoint import open_source
from ..training.calibration import calibrate
from ..training.text_blocks import token_blocks
from .checkpoint_loading import load_checkpoint
from .text_arguments import add_text_arguments, read_documents


# what calibration sets in a configuration
CALIBRATED_FIELDS = ("router_thresholds", "compute", "compute_curve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, text, compute and output."""
    parser.add_argument("checkpoint", help="folder or Hub id of a MoD or MoR with trained routers")
    add_text_arguments(parser, window=256)
    parser.add_argument("-o", "--output", help="folder for the calibrated checkpoint (by default only the report)")
    spent = "wanted FLOPs of the decoder layers, 1.0 being all tokens in all layers (default: as the capacities say)"
    parser.add_argument("--compute", type=float, metavar="SHARE", help=spent)
    parser.add_argument("--max-tokens", type=int, default=8192, help="tokens to read (default: 8192)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in the output folder")


def run(args: argparse.Namespace) -> None:
    """Calibrates, prints the report, writes the checkpoint.

    Raises:
        ValueError: for a text or checkpoint that is unfit, a compute out of reach, or an output that is not free.
    """
    for name, least in (("window", 2), ("batch_size", 1), ("max_tokens", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"`{name}` is {getattr(args, name)}, but must be at least {least}.")
    local = Path(args.checkpoint) if Path(args.checkpoint).exists() else None
    if args.output is not None:
        check_output(Path(args.output), local, overwrite=args.overwrite)
    documents = read_documents(args)
    model, tokenizer = load_checkpoint(args.checkpoint, revision=args.revision, dtype=args.dtype)
    rows = token_blocks(documents, tokenizer, length=args.window).blocks[: max(args.max_tokens // args.window, 1)]
    result = calibrate(model, rows.split(args.batch_size), compute=args.compute)
    print(json.dumps(dataclasses.asdict(result), indent=2) if args.json else result.table())
    if args.output is not None:
        checkpoint = open_source(local or args.checkpoint, revision=args.revision, allowed=(model.config.model_type,))
        changes = {name: getattr(model.config, name) for name in CALIBRATED_FIELDS}
        copy_with_config(checkpoint, args.output, changes, overwrite=args.overwrite)
