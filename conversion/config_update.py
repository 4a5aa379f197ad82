"""A checkpoint with some fields of its configuration changed, everything else to the last bit as it was."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint_writer import check_output, new_folder, write_json
from .source_checkpoint import SourceCheckpoint
from .tensor_source import read_json


def copy_with_config(
    checkpoint: SourceCheckpoint, output: str | Path, changes: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Copies a checkpoint folder and writes `changes` into the copy's config.json.

    Args:
        checkpoint: what to copy.
        output: folder to make; it appears only when it is complete.
        changes: fields and their new values.
        overwrite: replace a checkpoint that is in `output`.

    Raises:
        ConversionError: if the output is not free or cannot be written.
    """
    target = Path(output)
    check_output(target, checkpoint.folder, overwrite=overwrite)
    files = [path for path in sorted(checkpoint.folder.rglob("*")) if path.is_file() and path.name != "config.json"]
    with new_folder(target, sum(path.stat().st_size for path in files), overwrite=overwrite) as folder:
        for path in files:
            copy = folder / path.relative_to(checkpoint.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        write_json(folder / "config.json", {**read_json(checkpoint.folder / "config.json"), **changes})
