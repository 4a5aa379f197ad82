"""What the commands that read a text and run a checkpoint over it have in common."""

import argparse
from pathlib import Path

from ..training.text_blocks import load_documents
from .checkpoint_loading import DTYPES


def add_text_arguments(parser: argparse.ArgumentParser, *, window: int) -> None:
    """The text, how it is cut into rows, and how the checkpoint is loaded; `window` is the default."""
    parser.add_argument("file", help="text file, .jsonl file, or folder of .txt files")
    parser.add_argument("--window", type=int, default=window, help=f"tokens per row (default: {window})")
    parser.add_argument("--batch-size", type=int, default=4, help="rows per forward pass (default: 4)")
    parser.add_argument("--text-column", default="text", help="key of the text in a .jsonl file (default: text)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub source")
    parser.add_argument("--dtype", choices=DTYPES, help="type to compute in (default: float32 on a CPU)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def read_documents(args: argparse.Namespace) -> list[str]:
    """The documents of the text.

    Raises:
        ValueError: if it is missing, empty or no text.
    """
    if not Path(args.file).exists():
        raise ValueError(f"The text {args.file!r} does not exist; give a text file or a folder of .txt files.")
    return load_documents(args.file, text_column=args.text_column)
