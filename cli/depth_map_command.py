"""`varidepth depth-map CHECKPOINT TEXT... [-o FILE]`: the depth of every token of a text."""

import argparse
import shutil
import sys
from pathlib import Path

from ..analysis.depth_map import depth_map
from ..analysis.depth_render import check_target, render_terminal, write_depth_map
from .checkpoint_loading import COMPUTE_HELP, DTYPES, load_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, text and output."""
    parser.add_argument("checkpoint", help="folder or Hub id of a MoR or MoD")
    parser.add_argument("text", nargs="*", help="the text, joined by spaces; - is standard input")
    parser.add_argument("--file", help="read the text from this UTF-8 file")
    parser.add_argument("-o", "--output", action="append", default=[], help="write .html or .png (may be repeated)")
    parser.add_argument("--title", help="heading of the files (default: the name of the checkpoint)")
    parser.add_argument("--no-special-tokens", action="store_true", help="do not let the tokenizer add BOS and EOS")
    parser.add_argument("--compute", type=float, metavar="SHARE", help=COMPUTE_HELP)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub source")
    parser.add_argument("--dtype", choices=DTYPES, help="type to compute in (default: float32 on a CPU)")


def run(args: argparse.Namespace) -> None:
    """Prints the map, or writes it to the files.

    Raises:
        ValueError: for no text, two texts, a file that cannot be read or written, or a checkpoint without routing.
    """
    text = _read_text(args)
    for path in args.output:
        check_target(path)
    model, tokenizer = load_checkpoint(args.checkpoint, revision=args.revision, dtype=args.dtype, compute=args.compute)
    title = args.title or f"Depth per token: {Path(args.checkpoint).name}"
    mapped = depth_map(model, tokenizer, text, add_special_tokens=not args.no_special_tokens, title=title)
    for path in args.output:
        write_depth_map(mapped, path)
        print(f"wrote {path}", file=sys.stderr)
    if not args.output:
        print(render_terminal(mapped, width=max(shutil.get_terminal_size().columns, 20)))


def _read_text(args: argparse.Namespace) -> str:
    if bool(args.text) == bool(args.file):
        raise ValueError("Give the text either as arguments or with --file.")
    if args.file:
        try:
            text = Path(args.file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.file} is not UTF-8 text (byte {error.start}); convert it to UTF-8.") from error
        except OSError as error:
            raise ValueError(f"{args.file} cannot be read ({error.strerror}); give a text file.") from error
    else:
        text = sys.stdin.read() if args.text == ["-"] else " ".join(args.text)
    if not text.strip():
        raise ValueError("The text is empty; give at least one word.")
    return text
