"""Runs the checks on one adapter and writes the verdicts as JSON: `python worker.py ADAPTER OUTPUT [FOLDER ...]`.

The folders go in front of `sys.path`; the implementation is imported from there or from the installed packages.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch
from checks import run_all


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    """Run one adapter; what the implementation prints goes to stderr."""
    name, output, *folders = sys.argv[1:]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    sys.path[:0] = folders
    module_name, _, class_name = name.partition(":")
    module = importlib.import_module(f"adapters.{module_name}")
    peer = getattr(module, class_name)()
    with contextlib.redirect_stdout(sys.stderr):
        verdicts = run_all(peer, folders or ["site-packages"])
    report = {
        "title": peer.title,
        "source": peer.source,
        "notes": list(peer.notes),
        "versions": versions(),
        "verdicts": {check: dataclasses.asdict(verdict) for check, verdict in verdicts.items()},
    }
    Path(output).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
