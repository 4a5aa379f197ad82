"""The tensors that a new model takes from its source: embedding, decoder layers, final norm and head."""

import re
from collections.abc import Sequence

import torch

from .checkpoint_writer import TargetTensor
from .tensor_source import TensorSource


LAYER_NAME = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


def body_tensors(
    weights: TensorSource, sources: Sequence[Sequence[int]], dtype: torch.dtype | None
) -> list[TargetTensor]:
    """Embedding, layers, norm and head, in the order of the model.

    Args:
        weights (`TensorSource`): under the names of the family's causal language model.
        sources: for each new layer the source layers it is made of; several are averaged.
        dtype (`torch.dtype`, *optional*): type to write; that of each tensor by default.
    """
    parts: dict[int, list[str]] = {}
    outer = []
    for name in weights.infos:
        match = LAYER_NAME.match(name)
        if match:
            parts.setdefault(int(match[1]), []).append(match[2])
        else:
            outer.append(name)
    front = [name for name in outer if "embed" in name]
    targets = [copy_of(weights, name, name, dtype) for name in front]
    for layer, group in enumerate(sources):
        for part in parts.get(group[0], []):
            names = [f"model.layers.{i}.{part}" for i in group]
            new_name = f"model.layers.{layer}.{part}"
            if len(names) == 1:
                targets.append(copy_of(weights, new_name, names[0], dtype))
            else:
                targets.append(_mean_of(weights, new_name, names, dtype))
    return targets + [copy_of(weights, name, name, dtype) for name in outer if name not in front]


def copy_of(
    weights: TensorSource, new_name: str, name: str, dtype: torch.dtype | None, rows: range | None = None
) -> TargetTensor:
    """A tensor of the source, or some of its rows, under another name, in its own type unless one is given."""
    info = weights.infos[name]
    shape = info.shape if rows is None else (len(rows), *info.shape[1:])
    part = slice(None) if rows is None else slice(rows.start, rows.stop)
    return TargetTensor(new_name, shape, dtype or info.dtype, lambda: weights.read(name, part))


def common_dtype(weights: TensorSource) -> torch.dtype:
    """The type that most of the weights have."""
    elements: dict[torch.dtype, int] = {}
    for info in weights.infos.values():
        elements[info.dtype] = elements.get(info.dtype, 0) + info.nbytes // info.dtype.itemsize
    return max(elements, key=lambda dtype: elements[dtype])


def _mean_of(weights: TensorSource, new_name: str, names: list[str], dtype: torch.dtype | None) -> TargetTensor:
    """The mean of several tensors, summed in fp32 (fp64 for fp64)."""
    info = weights.infos[names[0]]
    wide = torch.float64 if info.dtype == torch.float64 else torch.float32

    def make() -> torch.Tensor:
        total = weights.read(names[0]).to(wide, copy=True)
        for name in names[1:]:
            total += weights.read(name)
        return total.div_(len(names))

    return TargetTensor(new_name, info.shape, dtype or info.dtype, make)
