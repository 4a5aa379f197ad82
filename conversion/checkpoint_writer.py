"""Writing a checkpoint: tensors one at a time into safetensors shards, in a folder that appears only when complete."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .checkpoint_files import first_foreign_entry
from .errors import ConversionError


_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPE_NAMES[torch.int64] = "I64"
_HEADROOM = 32 * 2**20  # bytes for tokenizer, code and card beside the weights


@dataclass(frozen=True)
class TargetTensor:
    """A tensor to be written.

    Attributes:
        name: name in the new state dict.
        shape: its shape.
        dtype: its type.
        make: computes the value; called once, when it is written.
        finite: refuse NaN and infinity.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    finite: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * self.numel


def plan_shards(targets: Sequence[TargetTensor], max_bytes: int) -> list[list[TargetTensor]]:
    """Splits the tensors, in their order, into shards of at most `max_bytes` (or of one larger tensor)."""
    shards: list[list[TargetTensor]] = [[]]
    size = 0
    for target in targets:
        if shards[-1] and size + target.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size += target.nbytes
    return shards


def write_weights(folder: Path, targets: Sequence[TargetTensor], max_bytes: int, *, quiet: bool = True) -> list[str]:
    """Writes model.safetensors, or shards with their index; holds one tensor in memory at a time.

    Returns:
        names of the weight files.

    Raises:
        ConversionError: if a tensor has another shape than planned or is not finite.
    """
    shards = plan_shards(targets, max_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    total = sum(target.nbytes for target in targets)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=quiet) as progress:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(folder / name, shard, progress)
    if len(shards) > 1:
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        metadata = {"total_parameters": sum(t.numel for t in targets), "total_size": total}
        write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    return names


def _write_shard(path: Path, targets: Sequence[TargetTensor], progress: tqdm) -> None:
    # wide types first, so that every tensor is aligned in the file
    ordered = sorted(targets, key=lambda target: -target.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for target in ordered:
        header[target.name] = {
            "dtype": _DTYPE_NAMES[target.dtype],
            "shape": list(target.shape),
            "data_offsets": [offset, offset + target.nbytes],
        }
        offset += target.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for target in ordered:
            value = _checked(target)
            file.write(value.view(torch.uint8).numpy().data.cast("B"))
            progress.update(target.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _checked(target: TargetTensor) -> torch.Tensor:
    value = target.make()
    if tuple(value.shape) != target.shape:
        raise ConversionError(
            f"The tensor {target.name} came out as {list(value.shape)} instead of {list(target.shape)}."
        )
    if target.finite and value.is_floating_point() and not bool(torch.isfinite(value.sum(dtype=torch.float64))):
        raise ConversionError(
            f"The tensor {target.name} holds NaN or infinity in the source; give an undamaged checkpoint."
        )
    cast = value.to(target.dtype).contiguous()
    if cast.dtype == torch.float16 and value.dtype != torch.float16 and not bool(torch.isfinite(cast).all()):
        raise ConversionError(f"The tensor {target.name} has values beyond float16; use --dtype bfloat16 or float32.")
    return cast.reshape(-1)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes indented JSON with a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_output(output: Path, source: Path | None, *, overwrite: bool = False) -> None:
    """Refuses an output folder that would destroy something.

    Args:
        output (`Path`): where the checkpoint is to appear.
        source (`Path`, *optional*): the folder (or file) it is made of.
        overwrite (`bool`): allow to replace a folder that holds a checkpoint and nothing else.

    Raises:
        ConversionError: if it is the source, lies in it or around it, is a file, or is not empty.
    """
    target = output.resolve()
    if source is not None:
        origin = source.resolve()
        if target == origin:
            raise ConversionError("The output is the source itself; give another folder.")
        if origin.is_dir() and (target.is_relative_to(origin) or origin.is_relative_to(target)):
            raise ConversionError("The output folder lies inside the source or around it; give a folder beside it.")
        if origin.is_relative_to(target):
            raise ConversionError("The output folder holds the source; give another folder.")
    if target.exists() and not target.is_dir():
        raise ConversionError(f"The output {output.name} is a file; give a folder.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ConversionError(
                f"The output folder {output.name} is not empty; give another one, or --overwrite to replace it."
            )
        if not (target / "config.json").is_file():
            raise ConversionError(
                f"The output folder {output.name} holds no checkpoint (no config.json), so it is not replaced; give "
                "another one."
            )
        foreign = first_foreign_entry(target)
        if foreign is not None:
            raise ConversionError(
                f"The output folder {output.name} holds {foreign}, which is no part of a checkpoint; move it "
                "away or give another folder."
            )


@contextmanager
def new_folder(output: Path, needed_bytes: int, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `output` that replaces it on success and vanishes on failure.

    Args:
        output (`Path`): checked by `check_output`; missing parents are made, and unmade on failure.
        needed_bytes (`int`): size of what will be written, refused at once where the disk is too small.
        overwrite (`bool`): allow to replace a checkpoint.

    Raises:
        ConversionError: if the disk is full or cannot be written.
    """
    output = output.resolve()
    made = _make_parents(output.parent)
    temporary: Path | None = None
    try:
        free = shutil.disk_usage(output.parent).free
        if needed_bytes + _HEADROOM > free:
            raise ConversionError(
                f"The output needs {needed_bytes / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free; make room "
                "or give a folder on another disk."
            )
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        check_output(output, None, overwrite=overwrite)  # again: the conversion took its time
        _replace(temporary, output)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise _disk_error(error, output) from error
        raise


def _disk_error(error: OSError, output: Path) -> ConversionError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConversionError(f"The disk is full, nothing was kept of {output.name}; make room or use another disk.")
    return ConversionError(
        f"The output {output.name} cannot be written ({error.strerror or error}); check the folder."
    )


def _make_parents(folder: Path) -> list[Path]:
    """Makes missing folders; returns them, innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir()
            made.insert(0, path)
    except OSError as error:
        for path in made:
            path.rmdir()
        raise ConversionError(
            f"The folder {missing[0].name} cannot be made ({error.strerror}); check the path."
        ) from error
    return made


def _replace(new: Path, output: Path) -> None:
    """Puts `new` in the place of `output`; an existing checkpoint is kept until the new one stands."""
    if not output.exists():
        os.replace(new, output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    try:
        os.replace(output, old / output.name)
        try:
            os.replace(new, output)
        except OSError:
            os.replace(old / output.name, output)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
