"""A checkpoint with some fields of its configuration changed, everything else to the last bit as it was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint_writer import check_output, new_folder, write_json
from .companion_files import copy_files, files_without
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
    files = files_without(checkpoint.folder, "config.json")
    with new_folder(target, sum(path.stat().st_size for path in files), overwrite=overwrite) as folder:
        copy_files(files, checkpoint.folder, folder)
        write_json(folder / "config.json", {**read_json(checkpoint.folder / "config.json"), **changes})
