"""What flows through a pretrained source on a text, and what the layers of a student read of it."""

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


@torch.no_grad()
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


def residual_factor(layer: Layer) -> float:
    """By which a family multiplies what attention and MLP write to the stream."""
    return getattr(layer, "residual_multiplier", 1.0)


def relative_error(states: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    parts = [
        ((s - w).square().sum(-1) / w.square().sum(-1).clamp(min=1e-12)).flatten()
        for s, w in zip(states, wanted, strict=True)
    ]
    return float(torch.cat(parts).mean())
