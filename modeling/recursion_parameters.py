"""What a shared layer has of its own at each recursion: low-rank differences of its matrices, and norms.

A shared matrix W then computes W x + B_r A_r x at recursion r (relaxed recursion, Bae et al., arXiv 2410.20672).
The recursion comes with the decoder layer's keyword arguments, so that gradient checkpointing recomputes what was
computed. The differences stand beside the linear layers, not in them: whatever PEFT or a quantizer puts in the place
of a linear layer, or merges into it, is about the shared matrix alone.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .module_mixins import mix_in


# linear layers of the families' decoder layers
_LINEAR_LAYERS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj",
    "gate_proj", "up_proj", "gate_up_proj", "down_proj", "c_fc", "c_proj",
)  # fmt: skip
# read by the first recursion alone where the keys and values are shared
KEYS_AND_VALUES = ("k_proj", "v_proj", "k_norm")


def vary_by_recursion(
    layers: Iterable[nn.Module],
    shared: Iterable[nn.Module],
    recursions: int,
    *,
    rank: int,
    norms: bool,
    reads_shared_kv: bool,
) -> None:
    """Gives shared decoder layers parameters for each recursion; they then take it as `recursion` in every call.

    Args:
        layers: all decoder layers.
        shared: those that are repeated; their parameters belong to linear layers and norms.
        recursions (`int`): how often each layer is applied.
        rank (`int`): of the differences of the linear layers; 0 for none.
        norms (`bool`): whether each norm of a layer exists once for every recursion.
        reads_shared_kv (`bool`):
            deeper recursions read the keys and values of the first one, so that what makes them varies in nothing.
    """
    fixed = KEYS_AND_VALUES if reads_shared_kv else ()
    for layer in shared:
        for part in list(layer.modules()):
            varying = {name: child for name, child in part.named_children() if name not in fixed}
            linear = {name: child for name, child in varying.items() if isinstance(child, nn.Linear)}
            if rank and linear:
                part.recursion_adapter = RecursionAdapter(recursions, rank, linear)
                mix_in(part, _AdaptedPart)
            for name, child in varying.items():
                if norms and name not in linear and list(child.parameters(recurse=False)):
                    child.deeper = nn.ModuleList([copy.deepcopy(child) for _ in range(recursions - 1)])
                    mix_in(child, _DeeperNorm)
    # the others too: engines wrap what is of the class of the first layer
    for layer in layers:
        mix_in(layer, _RecursiveLayer)


class RecursionAdapter(nn.Module):
    """What each recursion adds to the linear layers of an attention or an MLP.

    Args:
        recursions: number of recursions.
        rank: of the differences; at most the smaller width of a linear layer is built.
        linear: the linear layers by name; those with a bias differ in it too.

    Parameters of the linear layer `up_proj` (all recursions in one, so that each has a gradient in every step):
    `up_proj_down`, A, of shape `(recursions, rank, in_features)`; `up_proj_up`, B, of shape
    `(recursions, out_features, rank)`; `up_proj_bias`, of shape `(recursions, out_features)`.
    """

    def __init__(self, recursions: int, rank: int, linear: dict[str, nn.Linear]):
        super().__init__()
        self.names = tuple(linear)
        for name, layer in linear.items():
            if name not in _LINEAR_LAYERS:
                raise ValueError(
                    f"`recursion_rank` is {rank}, but the linear layer {name!r} is none of "
                    f"{', '.join(_LINEAR_LAYERS)}; use recursion_rank=0."
                )
            leaving, entering = layer.weight.shape
            inner = min(rank, entering, leaving)
            for kind, shape in (("down", (inner, entering)), ("up", (leaving, inner)), ("bias", (leaving,))):
                if kind != "bias" or layer.bias is not None:
                    self.register_parameter(f"{name}_{kind}", nn.Parameter(torch.empty(recursions, *shape)))

    def reset_parameters(self, std: float) -> None:
        """A from N(0, std), and zeros: at first all recursions compute the same."""
        for name, parameter in self.named_parameters():
            if name.endswith("_down"):
                init.normal_(parameter, std=std)
            else:
                init.zeros_(parameter)

    def forward(self, input: torch.Tensor, name: str, recursion: int) -> torch.Tensor:
        """`(..., in_features)` -> `(..., out_features)` of the linear layer `name`."""
        down, up = getattr(self, f"{name}_down")[recursion], getattr(self, f"{name}_up")[recursion]
        bias = getattr(self, f"{name}_bias", None)
        return F.linear(F.linear(input, down), up, None if bias is None else bias[recursion])


class _Varying:
    """A part of a layer that knows the recursion of a running call, and else none."""

    recursion: int | None = None


class _AdaptedPart(_Varying):
    """While a call runs, its linear layers come with what the recursion adds to them."""


def _with_difference(name: str) -> property:
    def product(part: Any) -> Any:
        linear, recursion = part._modules.get(name), part.recursion
        if linear is None:
            raise AttributeError(name)
        if recursion is None or name not in part.recursion_adapter.names:
            return linear
        return lambda input: linear(input) + part.recursion_adapter(input, name, recursion)

    return property(product)


for _name in _LINEAR_LAYERS:
    setattr(_AdaptedPart, _name, _with_difference(_name))


class _DeeperNorm(_Varying):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.recursion is None:
            raise RuntimeError(
                "A norm with a weight for each recursion was called outside of its layer, which alone knows the "
                "recursion: checkpoint and compile whole decoder layers, not parts of them."
            )
        if not self.recursion:
            return super().forward(hidden_states)
        return self.deeper[self.recursion - 1](hidden_states)


class _RecursiveLayer:
    def forward(self, hidden_states: torch.Tensor, *args: Any, recursion: int = 0, **kwargs: Any) -> torch.Tensor:
        _tell_parts(self, recursion)
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            _tell_parts(self, None)


@contextmanager
def at_recursion(layer: nn.Module, recursion: int) -> Iterator[None]:
    """Within it, parts of a decoder layer that are called one by one compute what they do at this recursion."""
    _tell_parts(layer, recursion)
    try:
        yield
    finally:
        _tell_parts(layer, None)


def _tell_parts(layer: nn.Module, recursion: int | None) -> None:
    # looked for every time: PEFT may have wrapped or copied a part
    for part in layer.modules():
        if isinstance(part, _Varying):
            part.recursion = recursion
