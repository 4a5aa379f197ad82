"""Cases of bad input: what spoils a checkpoint or a command, and how the command must answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pico_checkpoints import save_pico
from safetensors.torch import load_file, save_file

from varidepth.cli.main import main


class Cases(dict):
    """By name: the command, a function that spoils the source and may return other arguments, words of the error."""

    def add(self, *words: str, command: str = "convert") -> Callable[[Callable], Callable]:
        """Registers the function below."""

        def register(function: Callable) -> Callable:
            self[function.__name__] = (command, function, words)
            return function

        return register

    def check(self, name: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
        """One clear sentence on stderr, exit status 2, and nothing written."""
        command, spoil, words = self[name]
        save_pico(tmp_path / "source")
        arguments = spoil(tmp_path, monkeypatch) or convert_arguments(tmp_path)
        before = listing(tmp_path)
        capsys.readouterr()

        quiet = [] if command == "inspect" else ["--quiet"]
        try:
            status = main([command, *arguments, *quiet])
        except SystemExit as exit:  # argparse
            status = exit.code

        captured = capsys.readouterr()
        assert status == 2, captured.err
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("varidepth: ") and lines[0][-1] in ".?", captured.err
        assert len(lines[0]) < 400 and "Traceback" not in lines[0]
        for word in words:
            assert word in lines[0]
        assert listing(tmp_path) == before


def listing(folder: Path) -> dict[str, int]:
    """Every path below `folder`, hidden ones too, with its size."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*"))}


def convert_arguments(folder: Path, *flags: str) -> list[str]:
    return [str(folder / "source"), "-o", str(folder / "out"), "--recursions", "2", *flags]


def reshard(folder: Path) -> dict[str, str]:
    """Splits the single weight file in two; returns the weight map."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
