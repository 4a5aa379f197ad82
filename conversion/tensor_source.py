"""Lazy reading of checkpoint folders: names, shapes and types up front, values one tensor at a time."""

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import ConversionError


FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_READABLE = {**FLOAT_DTYPES, "I64": torch.int64}
_COMPARE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a stored tensor, and the file that holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str = ""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorSource:
    """Tensors in memory; the base of the sources that read files.

    Attributes:
        infos: `TensorInfo` by name.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = dict(tensors)
        self.infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """The tensor `name`, or the given range of its first dimension."""
        return self._tensors[name][rows]

    def rename(self, names: Mapping[str, str]) -> "TensorSource":
        """The same tensors under other names (old name -> new name); those not mentioned are left out."""
        return self.view({new: old for old, new in names.items()})

    def view(self, old_names: Mapping[str, str]) -> "TensorSource":
        """The same tensors under new names (new name -> old name), some perhaps more than once."""
        return _Renamed(self, dict(old_names))

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are equal bit for bit; reads both in pieces."""
        a, b = self.infos[first], self.infos[second]
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        step = max(1, _COMPARE_ELEMENTS * a.shape[0] // max(torch.Size(a.shape).numel(), 1)) if a.shape else 1
        pieces = range(0, a.shape[0] if a.shape else 1, step)
        return all(
            torch.equal(self.read(first, slice(i, i + step)), self.read(second, slice(i, i + step))) for i in pieces
        )


class _Renamed(TensorSource):
    def __init__(self, inner: TensorSource, old_names: dict[str, str]):
        self._inner, self._old_names = inner, old_names
        self.infos = {new: inner.infos[old] for new, old in old_names.items()}

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        return self._inner.read(self._old_names[name], rows)


class SafetensorsSource(TensorSource):
    """Safetensors shards; a shard is mapped only while one of its tensors is read."""

    def __init__(self, folder: Path, files: list[str], weight_map: dict[str, str] | None = None):
        self._folder = folder
        self.infos = {}
        for file in files:
            with self._open(file) as shard:
                for name in shard.keys():
                    view = shard.get_slice(name)
                    dtype = _READABLE.get(view.get_dtype())
                    if dtype is None or not _is_weight_or_counter(dtype, view.get_shape()):
                        raise ConversionError(_not_a_float(name, file, view.get_dtype()))
                    _add(self.infos, name, TensorInfo(tuple(view.get_shape()), dtype, file))
        _check_weight_map(self.infos, weight_map)

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        with self._open(self.infos[name].file) as shard:
            if rows == slice(None) or not self.infos[name].shape:
                return shard.get_tensor(name)
            return shard.get_slice(name)[rows].clone()

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            with safe_open(self._folder / file, framework="pt") as shard:
                yield shard
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"The weight file {file} cannot be read ({_one_line(error)}): it is truncated or damaged; download it "
                "again."
            ) from error


class PickleSource(TensorSource):
    """PyTorch shards, read with `weights_only=True` and mapped instead of loaded."""

    def __init__(self, folder: Path, files: list[str], weight_map: dict[str, str] | None = None):
        self._folder = folder
        self._current: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self.infos = {}
        for file in files:
            for name, tensor in self._shard(file).items():
                if not _is_weight_or_counter(tensor.dtype, tensor.shape):
                    raise ConversionError(_not_a_float(name, file, str(tensor.dtype)))
                _add(self.infos, name, TensorInfo(tuple(tensor.shape), tensor.dtype, file))
        _check_weight_map(self.infos, weight_map)

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        tensor = self._shard(self.infos[name].file)[name]
        return tensor[rows].clone() if tensor.dim() else tensor.clone()

    def _shard(self, file: str) -> dict[str, torch.Tensor]:
        if self._current[0] != file:
            self._current = ("", {})
            self._current = (file, _load_pickle(self._folder / file))
        return self._current[1]


def open_weights(folder: Path) -> TensorSource | None:
    """Opens the weights of a checkpoint folder: safetensors first, then PyTorch files; None if there are none.

    Raises:
        ConversionError: for a missing or damaged file, an index that does not agree with its shards or points out of
            the folder, a tensor that two shards hold, and weights that are no floating-point numbers.
    """
    for stem, suffix, kind in (("model", ".safetensors", SafetensorsSource), ("pytorch_model", ".bin", PickleSource)):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            weight_map = _read_index(index)
            return kind(folder, sorted(set(weight_map.values())), weight_map)
        if (folder / f"{stem}{suffix}").is_file():
            return kind(folder, [f"{stem}{suffix}"])
        shards = sorted(folder.glob(f"{stem}-*{suffix}"))
        if shards:
            raise ConversionError(
                f"The folder holds the shard {shards[0].name}, but not its index {index.name}; download the index too."
            )
    return None


def _read_index(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ConversionError(f"{index.name} has no usable `weight_map`; download it again.")
    for file in sorted(set(weight_map.values())):
        if PurePosixPath(file).name != file or PureWindowsPath(file).name != file:
            raise ConversionError(
                f"{index.name} points to {file!r}, outside of the checkpoint's folder; only file names are allowed."
            )
        if not (index.parent / file).is_file():
            raise ConversionError(f"The weight file {file} that {index.name} names is missing; download it.")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ConversionError: if the file is missing, is not JSON or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"The checkpoint folder has no {path.name}; give a complete checkpoint.") from error
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path.name} is not valid JSON ({_one_line(error)}); download it again.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path.name} holds a {type(content).__name__}, but must hold a JSON object.")
    return content


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        with open(path, "rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"  # files older than PyTorch 1.6 are no zip and cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path.name} holds more than tensors, and unpickling it could run foreign code; save the weights as "
            "safetensors where you trust the file."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ConversionError(
            f"The weight file {path.name} cannot be read ({_one_line(error)}): it is truncated or damaged; download "
            "it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ConversionError(f"{path.name} is no state dict (tensors by name); save model.state_dict() instead.")
    return content


def _add(infos: dict[str, TensorInfo], name: str, info: TensorInfo) -> None:
    if name in infos:
        raise ConversionError(
            f"The tensor {name} is in two shards, {infos[name].file} and {info.file}, and which one counts is "
            "unclear; remove the stale file."
        )
    infos[name] = info


def _check_weight_map(infos: dict[str, TensorInfo], weight_map: dict[str, str] | None) -> None:
    for name, file in (weight_map or {}).items():
        if name not in infos or infos[name].file != file:
            raise ConversionError(
                f"The index says that {file} holds the tensor {name}, but it does not; download both."
            )


def _is_weight_or_counter(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Routed models count the steps of their warm-up, and training metrics their tokens, in one number."""
    return dtype in FLOAT_DTYPES.values() or (dtype == torch.int64 and torch.Size(shape).numel() == 1)


def _not_a_float(name: str, file: str, dtype: str) -> str:
    return (
        f"The tensor {name} in {file} has type {dtype}, but only F64, F32, F16 and BF16 weights can be converted; "
        "use the unquantized checkpoint."
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]
