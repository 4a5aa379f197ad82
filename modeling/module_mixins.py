"""Behaviour that is mixed into the attention, MLP and norm modules of transformers' own decoder layers.

A module keeps its parameters and their names; only its class becomes a subclass of its own. What a module must know in
a call travels through the decoder layer's keyword arguments to the attention, the first part of every layer, which
hands it to its siblings. So the recomputation of gradient checkpointing sees what the forward pass saw, which state
that is set from outside the layer would not survive.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .cache_naming import CACHE
from .token_routing import Selection


def share_key_values(layers: list[nn.Module]) -> None:
    """Lets the attention of `layers` skip its key and value projections where it only reads them.

    The attention then takes the view of the shared keys and values as `shared_kv`: under gradient checkpointing a
    decoder layer drops what it gets as its cache.
    """
    for layer in layers:
        mix_in(layer.self_attn, _ReadingAttention)


def route_part(layer: nn.Module, unit: str, norm_after: str | None) -> None:
    """Lets tokens pass by the attention or the MLP of `layer`, which then takes a `RoutedPart` as `routed`.

    Args:
        layer: a decoder layer.
        unit: `attention` or `mlp`.
        norm_after: name of the layer's norm between the part and the residual stream, if its family has one. It would
            take a gate on the part's output out again, so the gate is applied behind it.
    """
    mix_in(layer.self_attn, _RoutedAttention)
    part: Any = layer.self_attn
    if unit == "mlp":
        mix_in(layer.mlp, _RoutedMLP)
        # in a tuple, which torch does not take for submodules
        layer.self_attn.__dict__["mlp_behind"] = (layer.mlp,)
        part = layer.mlp
    norms = () if norm_after is None else (getattr(layer, norm_after),)
    for norm in norms:
        mix_in(norm, _GatingNorm)
    part.__dict__["norm_behind"] = norms


def mix_in(module: nn.Module, mixin: type) -> None:
    """Makes the class of `module` a subclass of `mixin` and of itself; what was mixed in before comes behind."""
    mixins, module_class = _PARTS_OF.get(type(module), ((), type(module)))
    module.__class__ = _mixed_class((mixin, *mixins), module_class)


@dataclass
class RoutedPart:
    """Which tokens pass a routed part of a layer in one call, and the factor on its output.

    Attributes:
        unit: `attention` or `mlp`.
        gate (`torch.Tensor` of shape `(batch, seq_len)`):
            fp32; 0 for tokens that are computed but do not enter; `None` for a gate of 1.
        active (`torch.BoolTensor` of shape `(batch, seq_len)`): the entering tokens; `None` for all.
        selection: the entering tokens, gathered; `None` where all tokens are computed, or none.
        computes_all: all tokens are computed, and the gate drops the output of those that do not enter.
    """

    unit: str
    gate: torch.Tensor | None
    active: torch.Tensor | None = None
    selection: Selection | None = None
    computes_all: bool = False

    @property
    def is_empty(self) -> bool:
        return self.active is not None and self.selection is None and not self.computes_all

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The entering tokens of `(batch, seq_len, hidden_size)`."""
        return hidden_states if self.selection is None else self.selection.gather(hidden_states)

    def leave(self, output: torch.Tensor) -> torch.Tensor:
        """Output at full length, zero for tokens that did not enter."""
        if self.selection is not None and not self.selection.full:
            return self.selection.scatter(output.new_zeros(*self.active.shape, output.shape[-1]), output)
        return output

    def gated(self, output: torch.Tensor) -> torch.Tensor:
        return output if self.gate is None else output * self.gate.unsqueeze(-1).to(output.dtype)


class _RoutedAttention:
    norm_behind: tuple = ()
    mlp_behind: tuple = ()

    def forward(self, hidden_states: torch.Tensor, *args: Any, routed: RoutedPart | None = None, **kwargs: Any) -> Any:
        if routed is None or routed.unit == "mlp":
            for mlp in self.mlp_behind:
                mlp.routed = routed
            return super().forward(hidden_states, *args, **kwargs)
        if routed.is_empty:
            return torch.zeros_like(hidden_states), None
        output, weights = super().forward(routed.enter(hidden_states), *args, **kwargs)
        return _gated_here_or_behind(self, routed, routed.leave(output)), weights


class _RoutedMLP:
    norm_behind: tuple = ()
    routed: RoutedPart | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        routed, self.routed = self.routed, None
        if routed is None:
            return super().forward(hidden_states)
        if routed.is_empty:
            return torch.zeros_like(hidden_states)
        output = super().forward(routed.enter(hidden_states))
        return _gated_here_or_behind(self, routed, routed.leave(output))


class _GatingNorm:
    routed: RoutedPart | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        routed, self.routed = self.routed, None
        output = super().forward(hidden_states)
        return output if routed is None else routed.gated(output)


def _gated_here_or_behind(part: Any, routed: RoutedPart, output: torch.Tensor) -> torch.Tensor:
    for norm in part.norm_behind:
        norm.routed = routed
    return output if part.norm_behind else routed.gated(output)


class NoOpExperts:
    """Experts beyond the last one have neither parameters nor effect, and cost nothing (MoD paper, section 4.3)."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        tokens, choices = torch.where(top_k_index < self.num_experts)
        updates = super().forward(
            hidden_states[tokens], top_k_index[tokens, choices, None], top_k_weights[tokens, choices, None]
        )
        return torch.zeros_like(hidden_states).index_add(0, tokens, updates.to(hidden_states.dtype))


class _ReadingAttention:
    """While it only reads keys and values, its projections to them return zeros at no cost, whatever they are by now:
    linear layers, quantized ones, or with adapters around them."""

    _reads = False

    @property
    def k_proj(self) -> Any:
        return self._unless_reading(self._modules["k_proj"])

    @property
    def v_proj(self) -> Any:
        return self._unless_reading(self._modules["v_proj"])

    def _unless_reading(self, projection: nn.Module) -> Any:
        if not self._reads:
            return projection
        return lambda tokens: tokens.new_zeros(1).expand(*tokens.shape[:-1], projection.out_features)

    def forward(self, hidden_states: torch.Tensor, *args: Any, shared_kv: Any = None, **kwargs: Any) -> Any:
        if shared_kv is None:
            return super().forward(hidden_states, *args, **kwargs)
        kwargs[CACHE] = shared_kv
        self._reads = shared_kv.reads
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self._reads = False


_MIXED_CLASSES: dict[tuple, type] = {}
_PARTS_OF: dict[type, tuple[tuple[type, ...], type]] = {}


def _mixed_class(mixins: tuple[type, ...], module_class: type) -> type:
    key = mixins, module_class
    if key not in _MIXED_CLASSES:
        namespace: dict[str, Any] = {"__reduce_ex__": _reduce}
        if hasattr(module_class, "kernel_layer_name") and any("forward" in vars(mixin) for mixin in mixins):
            # a kernel in the place of the whole forward pass would leave out what is mixed in
            namespace["kernel_layer_name"] = None
        mixed = type(module_class.__name__, (*mixins, module_class), namespace)
        _MIXED_CLASSES[key], _PARTS_OF[mixed] = mixed, key
    return _MIXED_CLASSES[key]


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """Pickles by the classes that are mixed, since the mixed one is made at run time."""
    parts = _PARTS_OF.get(type(module))
    if parts is None:  # a wrapper has made a class of its own of it
        return object.__reduce_ex__(module, protocol)
    return _new_mixed, parts, module.__dict__


def _new_mixed(mixins: tuple[type, ...], module_class: type) -> nn.Module:
    return nn.Module.__new__(_mixed_class(mixins, module_class))
