"""`varidepth unroll CHECKPOINT -o OUT`"""

import argparse
from pathlib import Path

from ..conversion.unroll import unroll


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, output, and how to write."""
    parser.add_argument("source", help="folder or Hub id of a MoR or MoD")
    parser.add_argument("-o", "--output", required=True, help="folder to make")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default: 5GB)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub source")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in the output folder")
    parser.add_argument("--quiet", action="store_true", help="print no progress")


def run(args: argparse.Namespace) -> None:
    """Unrolls, and says what came out."""
    config = unroll(
        args.source,
        args.output,
        revision=args.revision,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        quiet=args.quiet,
    )
    if not args.quiet:
        print(f"wrote {Path(args.output).name}: {config.model_type}, {config.num_hidden_layers} layers")
