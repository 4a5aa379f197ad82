"""What a shared layer has of its own at each recursion: low-rank differences of its matrices, and norms.

A shared matrix W then computes W x + B_r A_r x at recursion r (relaxed recursion, Bae et al., arXiv 2410.20672).
The recursion comes with the decoder layer's keyword arguments, so that gradient checkpointing recomputes what was
computed.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .module_mixins import mix_in


# read by the first recursion alone where the keys and values are shared
KEYS_AND_VALUES = ("k_proj", "v_proj", "k_norm")


def vary_by_recursion(
    layers: list[nn.Module], recursions: int, *, rank: int, norms: bool, reads_shared_kv: bool
) -> None:
    """Gives shared decoder layers parameters for each recursion; they then take it as `recursion` in every call.

    Args:
        layers: decoder layers whose parameters belong to linear layers and norms.
        recursions (`int`): how often each layer is applied.
        rank (`int`): of the differences of the linear layers; 0 for none.
        norms (`bool`): whether each norm of a layer exists once for every recursion.
        reads_shared_kv (`bool`):
            deeper recursions read the keys and values of the first one, so that what makes them varies in nothing.
    """
    for layer in layers:
        for name, module in list(layer.named_modules()):
            once = reads_shared_kv and name.rpartition(".")[2] in KEYS_AND_VALUES
            if once or not list(module.parameters(recurse=False)):
                continue
            if not isinstance(module, nn.Linear):
                if norms:
                    module.deeper = nn.ModuleList([copy.deepcopy(module) for _ in range(recursions - 1)])
                    mix_in(module, _DeeperNorm)
            elif rank:
                sizes = module.in_features, module.out_features
                module.recursion_adapter = RecursionAdapter(recursions, *sizes, rank, bias=module.bias is not None)
                mix_in(module, _AdaptedLinear)
        mix_in(layer, _RecursiveLayer)


class RecursionAdapter(nn.Module):
    """What each recursion adds to a shared linear layer.

    Args:
        recursions: number of recursions.
        in_features: input width of the linear layer.
        out_features: output width.
        rank: of the difference; at most the smaller of the two widths is built.
        bias: the linear layer has a bias, which then differs too.

    Parameters (all recursions in one, so that each has a gradient in every step): `down`, A, of shape
    `(recursions, rank, in_features)`; `up`, B, of shape `(recursions, out_features, rank)`; `bias`, of shape
    `(recursions, out_features)`.
    """

    def __init__(self, recursions: int, in_features: int, out_features: int, rank: int, *, bias: bool):
        super().__init__()
        rank = min(rank, in_features, out_features)
        self.down = nn.Parameter(torch.empty(recursions, rank, in_features))
        self.up = nn.Parameter(torch.empty(recursions, out_features, rank))
        self.register_parameter("bias", nn.Parameter(torch.empty(recursions, out_features)) if bias else None)

    def reset_parameters(self, std: float) -> None:
        """A from N(0, std), and zeros: at first all recursions compute the same."""
        init.normal_(self.down, std=std)
        init.zeros_(self.up)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, input: torch.Tensor, recursion: int) -> torch.Tensor:
        """`(..., in_features)` -> `(..., out_features)`."""
        bias = None if self.bias is None else self.bias[recursion]
        return F.linear(F.linear(input, self.down[recursion]), self.up[recursion], bias)


class _Varying:
    """A part of a layer that knows the recursion of the call."""

    recursion = 0


class _AdaptedLinear(_Varying):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + self.recursion_adapter(input, self.recursion)


class _DeeperNorm(_Varying):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.recursion == 0:
            return super().forward(hidden_states)
        return self.deeper[self.recursion - 1](hidden_states)


class _RecursiveLayer:
    def forward(self, hidden_states: torch.Tensor, *args: Any, recursion: int, **kwargs: Any) -> torch.Tensor:
        # looked for in every call: PEFT may have wrapped or copied a part
        for part in self.modules():
            if isinstance(part, _Varying):
                part.recursion = recursion
        return super().forward(hidden_states, *args, **kwargs)
