"""The `varidepth` command: each sub-command is a module with `add_arguments(parser)` and `run(args)`."""

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import NoReturn


# name -> (module in this package, help)
COMMANDS = {
    "convert": ("convert_command", "make a MoR or MoD of a pretrained checkpoint, or a JRT-RNN of an official one"),
    "train": ("train_command", "train a model by a recipe, from scratch or from a checkpoint"),
    "unroll": ("unroll_command", "make a vanilla checkpoint of a MoR or MoD, where that is exact"),
    "inspect": ("inspect_command", "show structure, parameters and costs of a checkpoint"),
    "depth-map": ("depth_map_command", "show the depth of every token of a text"),
    "heal": ("heal_command", "teach a converted model by its source what the conversion lost"),
    "calibrate": ("calibrate_command", "set the thresholds of the routers on a text"),
    "perplexity": ("perplexity_command", "measure the loss on held-out text"),
    "env": ("env_command", "show versions and hardware, for bug reports"),
}
USER_ERROR = 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"varidepth: {message[0].upper()}{message[1:].rstrip('.')}; see `{self.prog} --help`.\n")


def make_parser(names: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the sub-commands in `names` are imported."""
    parser = _Parser(prog="varidepth", description="Variable-depth language models for Hugging Face Transformers.")
    parser.add_argument("--version", action="store_true", help="show the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        if name in names:
            import_module(f".{module}", __package__).add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 for what the user can repair, 1 for a defect."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(argv)
    args = parser.parse_args(argv)
    if args.version:
        from varidepth import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return USER_ERROR
    import transformers

    transformers.logging.set_verbosity_error()
    before = signal.signal(signal.SIGTERM, _terminate) if _in_main_thread() else None
    try:
        return import_module(f".{COMMANDS[args.command][0]}", __package__).run(args) or 0
    except KeyboardInterrupt as interrupt:
        # a command that keeps something says so
        print(
            f"varidepth: interrupted, {interrupt.args[0] if interrupt.args else 'nothing was kept'}.", file=sys.stderr
        )
        return 130
    except Exception as error:
        if args.debug:
            raise
        return _report(error)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _report(error: Exception) -> int:
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, NotImplementedError, OSError)) and text:
        print(f"varidepth: {text}", file=sys.stderr)
        return USER_ERROR
    print(f"varidepth: unexpected {type(error).__name__}: {text} (run with --debug and report it).", file=sys.stderr)
    return 1


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """Turns a polite kill into an exception, so that temporary folders are removed."""
    raise SystemExit(128 + signum)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


if __name__ == "__main__":
    sys.exit(main())
