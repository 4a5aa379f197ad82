"""What flows through a pretrained source on a text, and how the weights that bring a student there are found."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.recursion_parameters import at_recursion


# a decoder layer of transformers, whose parts are looked up by name
Layer = Any
# states of the batches at one place, of several places
Batches = list[list[torch.Tensor]]
_CHUNK = 4096  # tokens that are summed in fp32, before the sums are added in fp64


@dataclass
class SourceStreams:
    """What goes through the source, per slot and batch: states, arguments of its layers.

    Attributes:
        entering: states before each layer, and behind the last one.
        between: states between attention and MLP.
        arguments: keyword arguments of each layer's call.
    """

    entering: list[list[torch.Tensor]] = field(default_factory=list)
    between: list[list[torch.Tensor]] = field(default_factory=list)
    arguments: list[list[dict[str, Any]]] = field(default_factory=list)


def read_streams(source: PreTrainedModel, batches: list[torch.Tensor]) -> SourceStreams:
    """Runs a vanilla model in eval mode on token ids of shape `(batch, seq_len)`."""
    layers = source.model.layers
    streams = SourceStreams([[] for _ in range(len(layers) + 1)], [[] for _ in layers], [[] for _ in layers])

    def enter(slot: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        streams.entering[slot].append(args[0])
        streams.arguments[slot].append(kwargs)

    def pass_on(slot: int, module: nn.Module, args: tuple) -> None:
        streams.between[slot].append(args[0])

    def leave(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        streams.entering[-1].append(output)

    hooks = [layers[-1].register_forward_hook(leave)]
    for slot, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(partial(enter, slot), with_kwargs=True))
        hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(partial(pass_on, slot)))
    was_training = source.training
    source.eval()
    try:
        for ids in batches:
            source.model(ids, use_cache=False)
    finally:
        source.train(was_training)
        for hook in hooks:
            hook.remove()
    return streams


def attention_features(
    layer: Layer, slot: int, streams: SourceStreams, states: list[torch.Tensor], recursion: int = 0
) -> list[torch.Tensor]:
    """What `o_proj` reads, of shape `(batch, seq_len, heads * head_dim)`."""
    found: list[torch.Tensor] = []
    hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    try:
        with at_recursion(layer, recursion):
            for batch, kwargs in zip(states, streams.arguments[slot], strict=False):
                layer.self_attn(layer.input_layernorm(batch), **kwargs)
    finally:
        hook.remove()
    return found


def mlp_features(layer: Layer, between: torch.Tensor, recursion: int = 0) -> torch.Tensor:
    """What `down_proj` reads, of shape `(batch, seq_len, intermediate_size)`."""
    mlp = layer.mlp
    with at_recursion(layer, recursion):
        normed = layer.post_attention_layernorm(between)
        return mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)


def normal_equations(
    writer: nn.Linear, layer: Layer, features: Batches, entering: Batches, wanted: Batches
) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments of what a linear layer reads, and of that with what it would have to write.

    Tokens count by the inverse of their size, since a few states are hundreds of times larger than all others.

    Args:
        writer: writes to the stream, its bias included.
        layer: that it belongs to.
        features: what it reads, of shape `(batch, seq_len, in_features)`.
        entering, wanted: states before and behind it, of shape `(batch, seq_len, hidden_size)`.

    Returns:
        Tensors of shape `(in_features, in_features)` and `(in_features, out_features)` in fp64: the weights that solve
        `square @ weight.T = product` are the best.
    """
    factor = residual_factor(layer)
    square = writer.weight.new_zeros(writer.in_features, writer.in_features, dtype=torch.float64)
    product = square.new_zeros(writer.in_features, writer.out_features)
    for one in zip(features, entering, wanted, strict=True):
        for reads, here, there in zip(*one, strict=True):
            size = there.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
            moved = (there - here) / factor
            if writer.bias is not None:
                moved = moved - writer.bias
            x, y = (reads * size).flatten(0, -2), (moved * size).flatten(0, -2)
            for x_part, y_part in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
                square += (x_part.T @ x_part).double()
                product += (x_part.T @ y_part).double()
    return square, product


def add_ridge(square: torch.Tensor, ridge: float) -> torch.Tensor:
    """Adds `ridge` times its mean to the diagonal, in place; returns what was added."""
    penalty = ridge * square.diagonal().mean().clamp(min=1e-12)
    square.diagonal().add_(penalty)
    return penalty


def residual_factor(layer: Layer) -> float:
    """By which a family multiplies what attention and MLP write to the stream."""
    return getattr(layer, "residual_multiplier", 1.0)


def relative_error(states: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    parts = [
        ((s - w).square().sum(-1) / w.square().sum(-1).clamp(min=1e-12)).flatten()
        for s, w in zip(states, wanted, strict=True)
    ]
    return float(torch.cat(parts).mean())
