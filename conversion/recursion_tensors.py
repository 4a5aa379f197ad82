"""The tensors that each recursion of a MoR has of its own: made of the source's layers, and merged into vanilla ones.

At recursion r a shared layer stands in the place of one source layer. Its low-rank differences start as the best
approximation of their rank to what that layer's matrices are beyond the shared ones (truncated SVD; relaxed recursion,
Bae et al., arXiv 2410.20672), and its norms as that layer's.
"""

import re
import zlib
from collections.abc import Iterator, Sequence

import torch

from ..configuration.configuration_mor import MoRConfig
from ..modeling.recursion_parameters import KEYS_AND_VALUES
from .body_tensors import LAYER_NAME, copy_of
from .checkpoint_writer import TargetTensor
from .errors import ConversionError
from .layer_maps import LayerMap
from .tensor_source import TensorSource


_ADAPTER = re.compile(r"^(.+)\.recursion_adapter\.(\w+)_(down|up|bias)$")
_DEEPER = re.compile(r"^(.+)\.deeper\.(\d+)\.(\w+)$")


def relaxed_tensors(
    body: Sequence[TargetTensor], weights: TensorSource, layer_map: LayerMap, config: MoRConfig, names: Sequence[str]
) -> list[TargetTensor]:
    """The body of a new model, with what its recursions have of their own.

    Args:
        body: the tensors of a model whose recursions share everything.
        weights (`TensorSource`): the source, under the names of the family's causal language model.
        layer_map (`LayerMap`): which source layers the shared ones replace.
        config (`MoRConfig`): of the new model.
        names: of all tensors of the new model.
    """
    targets = {target.name: target for target in body}
    norms = {match[1] for match in map(_DEEPER.match, names) if match}
    factors: dict[str, _Factors] = {}
    for name in names:
        match = LAYER_NAME.match(name)
        if match is None:
            continue
        replaced, part = layer_map.replaced_sources(int(match[1])), match[2]
        if adapter := _ADAPTER.match(name):
            linear = f"{adapter[1]}.{adapter[2]}"
            matrix = f"{linear}.weight"
            stem = linear.removeprefix(f"model.layers.{match[1]}.")
            if matrix not in factors:
                sources = [f"model.layers.{i}.{stem}.weight" for i in replaced]
                factors[matrix] = _Factors(weights, targets[matrix], sources, config)
            if adapter[3] == "bias":
                sources = [f"model.layers.{i}.{stem}.bias" for i in replaced]
                targets[name] = _bias_differences(name, weights, targets[f"{linear}.bias"], sources)
            else:
                targets[name] = factors[matrix].target(name, adapter[3])
        elif deeper := _DEEPER.match(part):
            source = f"model.layers.{replaced[int(deeper[2]) + 1]}.{deeper[1]}.{deeper[3]}"
            like = targets[f"model.layers.{match[1]}.{deeper[1]}.{deeper[3]}"]
            targets[name] = copy_of(weights, name, source, like.dtype)
        elif len(replaced) > 1 and (name.rpartition(".")[0] in norms or _only_at_first(part, config)):
            targets[name] = copy_of(weights, name, f"model.layers.{replaced[0]}.{part}", targets[name].dtype)
    return list(targets.values())


def _only_at_first(part: str, config: MoRConfig) -> bool:
    """Whether the first recursion alone reads this part of an adapted layer, which is then the part of its source."""
    shared = config.kv_mode == "shared" and config.recursion_rank > 0
    return shared and part.split(".")[-2] in KEYS_AND_VALUES


class _Factors:
    """Truncated SVDs of the differences of one matrix, one for each recursion; made when the first part is written.

    Both factors get the square roots of the singular values, so that steps of one size move both alike. Where there is
    no difference to take, the first factor is drawn instead: two factors of zeros would have no gradient.
    """

    def __init__(self, weights: TensorSource, shared: TargetTensor, sources: list[str], config: MoRConfig):
        self._weights, self._shared, self._sources = weights, shared, sources
        self._rank, self._std = min(config.recursion_rank, *shared.shape), config.initializer_range
        self._made: dict[str, torch.Tensor] = {}

    def target(self, name: str, factor: str) -> TargetTensor:
        """The tensor `down` or `up` of all recursions."""
        leaving, entering = self._shared.shape
        shape = (self._rank, entering) if factor == "down" else (leaving, self._rank)
        return TargetTensor(name, (len(self._sources), *shape), self._shared.dtype, lambda: self._take(factor))

    def _take(self, factor: str) -> torch.Tensor:
        if not self._made:
            downs, ups = [], []
            generator = torch.Generator().manual_seed(zlib.crc32(self._shared.name.encode()))
            for difference in _differences(self._weights, self._shared, self._sources):
                left, values, right = _truncated_svd(difference, self._rank)
                roots = values.sqrt()
                ups.append(left * roots)
                drawn = self._std * torch.randn(right.shape, generator=generator, dtype=right.dtype)
                downs.append(torch.where(values[:, None] > 0, roots[:, None] * right, drawn))
            self._made = {"down": torch.stack(downs), "up": torch.stack(ups)}
        return self._made.pop(factor)


def _truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest `rank` singular values in descending order, with left and right vectors.

    By the eigenvectors of the smaller product of the matrix with itself, in fp64: faster than a decomposition of the
    whole, and exact for the values that a low rank keeps.
    """
    wide = matrix.double()
    tall = len(wide) >= wide.shape[1]
    square = wide.T @ wide if tall else wide @ wide.T
    vectors = torch.linalg.eigh(square).eigenvectors[:, -rank:].flip(1)
    others = wide @ vectors if tall else wide.T @ vectors
    values = others.norm(dim=0)
    others = others / values.clamp(min=torch.finfo(torch.float64).tiny)
    left, right = (others, vectors.T) if tall else (vectors, others.T)
    return left.to(matrix.dtype), values.to(matrix.dtype), right.to(matrix.dtype)


def _bias_differences(name: str, weights: TensorSource, shared: TargetTensor, sources: list[str]) -> TargetTensor:
    def make() -> torch.Tensor:
        return torch.stack(list(_differences(weights, shared, sources)))

    return TargetTensor(name, (len(sources), *shared.shape), shared.dtype, make)


def _differences(weights: TensorSource, shared: TargetTensor, sources: list[str]) -> Iterator[torch.Tensor]:
    """What each source has beyond the shared tensor as it is stored, in fp32 (fp64 for fp64)."""
    wide = _wide(shared.dtype)
    base = shared.make().to(shared.dtype).to(wide)
    for source in sources:
        difference = weights.read(source).to(wide) - base
        if not bool(torch.isfinite(difference).all()):
            raise ConversionError(f"The tensor {source} holds values that are not finite; repair the source.")
        yield difference


class MergedRecursions(TensorSource):
    """The tensors of a MoR at every unrolled layer, under vanilla names and of vanilla shapes.

    Args:
        weights (`TensorSource`): its checkpoint.
        old_names: name in the checkpoint of every vanilla tensor, as if the recursions shared everything.
        recursions: recursion of each unrolled layer.
    """

    def __init__(self, weights: TensorSource, old_names: dict[str, str], recursions: Sequence[int]):
        self._weights, self._recursions = weights, recursions
        self._old_names = {new: self._own_name(new, old) for new, old in old_names.items()}
        self.infos = {new: weights.infos[old] for new, old in self._old_names.items()}

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        old = self._old_names[name]
        value = self._weights.read(old, rows)
        part, _, kind = old.rpartition(".")
        own = "{}.recursion_adapter.{}_".format(*part.rpartition(".")[::2])
        recursion = self._recursion(name)
        if kind == "bias" and f"{own}bias" in self._weights.infos:
            difference = self._own(f"{own}bias", recursion)[rows]
        elif kind == "weight" and f"{own}up" in self._weights.infos:
            up, down = self._own(f"{own}up", recursion), self._own(f"{own}down", recursion)
            difference = up[rows] @ down
        else:
            return value
        return value.to(difference.dtype).add_(difference).to(value.dtype)

    def _recursion(self, name: str) -> int:
        match = LAYER_NAME.match(name)
        return self._recursions[int(match[1])] if match else 0

    def _own(self, name: str, recursion: int) -> torch.Tensor:
        value = self._weights.read(name, slice(recursion, recursion + 1))[0]
        return value.to(_wide(value.dtype))

    def _own_name(self, new: str, old: str) -> str:
        """The norm of a deeper recursion, where it has its own."""
        stem, _, kind = old.rpartition(".")
        own = f"{stem}.deeper.{self._recursion(new) - 1}.{kind}"
        return own if own in self._weights.infos else old


def is_recursions_own(name: str) -> bool:
    """Whether a tensor is one that no vanilla model has, because a recursion of a MoR has it of its own."""
    return bool(_ADAPTER.match(name) or _DEEPER.match(name))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
