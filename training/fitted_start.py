"""Shared layers fitted to the layers that they replace, from calibration text, before any training.

A shared layer has to act like several layers of its source. It is made of their parts: of all their attention heads
and MLP neurons it gets those that move the stream most. Then the matrices that write to the stream are solved for,
layer by layer from the first to the last, so that at each of its applications the layer brings the student's own
stream, with the errors of the layers before, to where the source's stream is (ridge regression, no gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


# a decoder layer of transformers, whose parts are looked up by name
Layer = Any
# families whose layer is `x + attention(norm(x))`, then `x + mlp(norm(x))`, with separate projections
FITTED_BACKBONES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite")
_CHUNK = 4096  # tokens whose features exist in fp64 at one time
_SAMPLE = 8  # batches that decide which parts a layer gets


@dataclass(frozen=True)
class FittedLayer:
    """
    Attributes:
        layer: physical layer.
        heads: source layer of each of its key-value heads, with their queries.
        neurons: how many neurons come from each source layer.
        error: for each application, squared distance of the student's stream from the source's behind it, relative to
            the source's, a mean over tokens.
    """

    layer: int
    heads: tuple[int, ...]
    neurons: dict[int, int]
    error: tuple[float, ...]


@torch.no_grad()
def fit_shared_layers(
    model: PreTrainedModel,
    source: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    *,
    ridge: float = 1e-2,
    sweeps: int = 1,
    compose: bool = True,
    show: Callable[[FittedLayer], None] | None = None,
) -> list[FittedLayer]:
    """Sets the shared layers of a recursive model by what the layers of its source do on a text.

    In the first sweep the stream that enters an application is the source's own where the layer before has not been
    fitted yet; further sweeps take there what the model made of it in the sweep before.

    Args:
        model (`PreTrainedModel`): a MoR of the source's family and depth. Only its shared layers change.
        source (`PreTrainedModel`): the vanilla model.
        batches: token ids of shape `(batch, seq_len)` without pads; ten thousand tokens or more. The source's states
            of all of them stay in memory: `8 * layers * hidden_size` bytes a token in fp32.
        ridge: draws the solution to the weights that the parts come with, relative to the mean square of the features:
            so what the text does not show stays as it was.
        sweeps: runs over the layers.
        compose: take parts of all replaced layers; else only solve, beginning with the weights as they are.
        show: called for each layer of each sweep.

    Returns:
        What was done, layer by layer, in the last sweep.

    Raises:
        ValueError: for what `why_not_fitted` says, or a text without tokens.
    """
    reason = why_not_fitted(model, source)
    if reason is not None:
        raise ValueError(f"{reason}; heal without a fitted start.")
    slots = _shared_slots(model.config.physical_layers)
    batches = [ids.to(source.device) for ids in batches]
    if not sum(ids.numel() for ids in batches):
        raise ValueError("The calibration text holds no token: give rows of some hundred tokens.")
    streams = _read_streams(source, batches)
    parts = {}
    for layer, at in slots.items():
        parts[layer] = (
            _compose(model.model.layers[layer], list(source.model.layers), at, streams) if compose else ((), {})
        )
    left: dict[int, list[torch.Tensor]] = {}
    report: list[FittedLayer] = []
    for _ in range(sweeps):
        report = []
        for layer, at in slots.items():
            entering = [left.pop(slot - 1, streams.entering[slot]) for slot in at]
            leaving = _solve_layer(model.model.layers[layer], at, streams, entering, ridge)
            left.update(zip(at, leaving, strict=True))
            errors = tuple(_relative_error(left[slot], streams.entering[slot + 1]) for slot in at)
            report.append(FittedLayer(layer, *parts[layer], error=errors))
            if show is not None:
                show(report[-1])
    return report


def why_not_fitted(model: PreTrainedModel, source: PreTrainedModel) -> str | None:
    """Why the layers of a model cannot be fitted to those of a source, as a clause; `None` if they can."""
    config: Any = model.config
    if config.model_type != "mor" or config.num_recursions < 2:
        return f"The model is a {config.model_type!r} without repeated layers, and only those of a MoR are fitted"
    if config.backbone not in FITTED_BACKBONES or source.config.model_type != config.backbone:
        return (
            f"The backbone is {config.backbone!r} and the source {source.config.model_type!r}, but layers are only "
            f"fitted in and to one of {', '.join(FITTED_BACKBONES)}"
        )
    if config.num_hidden_layers != source.config.num_hidden_layers:
        return (
            f"The model has {config.num_hidden_layers} unrolled layers and the source "
            f"{source.config.num_hidden_layers}, whose layers must not have been dropped"
        )
    if config.recursion_rank or config.recursion_norms:
        return "Each recursion has parameters of its own, which conversion has started already"
    if config.kv_mode == "shared":
        return "Deeper recursions read keys and values of the first one, which no layer of the source does"
    if config.routing != "none" and config.gating != "interpolate":
        return f"The gating {config.gating!r} changes what layers write, which only 'interpolate' leaves as it is"
    return None


def _shared_slots(physical_layers: list[int]) -> dict[int, list[int]]:
    """Unrolled indices of each shared layer."""
    slots: dict[int, list[int]] = {}
    for slot, layer in enumerate(physical_layers):
        slots.setdefault(layer, []).append(slot)
    return {layer: at for layer, at in slots.items() if len(at) > 1}


@dataclass
class _Streams:
    """What goes through the source, per slot and batch: states, arguments of its layers.

    Attributes:
        entering: states before each layer, and behind the last one.
        between: states between attention and MLP.
        arguments: keyword arguments of each layer's call.
    """

    entering: list[list[torch.Tensor]] = field(default_factory=list)
    between: list[list[torch.Tensor]] = field(default_factory=list)
    arguments: list[list[dict[str, Any]]] = field(default_factory=list)


def _read_streams(source: PreTrainedModel, batches: list[torch.Tensor]) -> _Streams:
    layers = source.model.layers
    streams = _Streams([[] for _ in range(len(layers) + 1)], [[] for _ in layers], [[] for _ in layers])

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


def _solve_layer(
    layer: Layer, slots: list[int], streams: _Streams, entering: list[list[torch.Tensor]], ridge: float
) -> list[list[torch.Tensor]]:
    """Solves for what attention and MLP write to the stream; returns the states behind each application."""
    features = [
        _attention_features(layer, slot, streams, states) for slot, states in zip(slots, entering, strict=True)
    ]
    between = _solve(layer.self_attn.o_proj, layer, features, entering, [streams.between[s] for s in slots], ridge)
    features = [[_mlp_features(layer, states) for states in batch] for batch in between]
    return _solve(layer.mlp.down_proj, layer, features, between, [streams.entering[s + 1] for s in slots], ridge)


def _attention_features(layer: Layer, slot: int, streams: _Streams, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """What `o_proj` reads, of shape `(batch, seq_len, heads * head_dim)`."""
    found: list[torch.Tensor] = []
    hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    try:
        for batch, kwargs in zip(states, streams.arguments[slot], strict=False):
            layer.self_attn(layer.input_layernorm(batch), **kwargs)
    finally:
        hook.remove()
    return found


def _mlp_features(layer: Layer, between: torch.Tensor) -> torch.Tensor:
    """What `down_proj` reads, of shape `(batch, seq_len, intermediate_size)`."""
    mlp = layer.mlp
    normed = layer.post_attention_layernorm(between)
    return mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)


Batches = list[list[torch.Tensor]]


def _solve(
    writer: nn.Linear, layer: Layer, features: Batches, entering: Batches, wanted: Batches, ridge: float
) -> Batches:
    """Weights with which `entering + writer(features)` comes nearest to `wanted`; returns these sums.

    Tokens count by the inverse of their size, since a few states are hundreds of times larger than all others.
    """
    factor = getattr(layer, "residual_multiplier", 1.0)
    before = writer.weight.double()
    inputs = writer.in_features
    square = before.new_zeros(inputs, inputs)
    product = before.new_zeros(inputs, writer.out_features)
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
    penalty = ridge * square.diagonal().mean().clamp(min=1e-12)
    square.diagonal().add_(penalty)
    writer.weight.copy_(torch.linalg.solve(square, product + penalty * before.T).T)
    return [
        [here + factor * writer(reads) for reads, here in zip(*one, strict=True)]
        for one in zip(features, entering, strict=True)
    ]


def _relative_error(states: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    parts = [
        ((s - w).square().sum(-1) / w.square().sum(-1).clamp(min=1e-12)).flatten()
        for s, w in zip(states, wanted, strict=True)
    ]
    return float(torch.cat(parts).mean())


def _compose(
    layer: Layer, source_layers: list[Layer], slots: list[int], streams: _Streams
) -> tuple[tuple[int, ...], dict[int, int]]:
    """Makes a layer of the heads and neurons of several that move the source's stream most.

    Returns:
        Source layer of each key-value head, and the number of neurons from each source layer.
    """
    replaced = [source_layers[slot] for slot in slots]
    heads: tuple[int, ...] = ()
    # norms of queries and keys are one for all heads of a layer, and those of two layers are not of one kind
    if not hasattr(layer.self_attn, "q_norm"):
        heads = _compose_attention(layer, replaced, slots, streams)
    return heads, _compose_mlp(layer, replaced, slots, streams)


def _compose_attention(layer: Layer, replaced: list[Layer], slots: list[int], streams: _Streams) -> tuple[int, ...]:
    width = layer.self_attn.head_dim
    key_heads = layer.self_attn.k_proj.out_features // width
    queries = layer.self_attn.o_proj.in_features // key_heads
    energies = []
    for old, slot in zip(replaced, slots, strict=True):
        features = _attention_features(old, slot, streams, streams.entering[slot][:_SAMPLE])
        square = _weighted_square(features, streams.between[slot])
        weight = old.self_attn.o_proj.weight.double()
        for head in range(key_heads):
            part = slice(head * queries, (head + 1) * queries)
            energies.append(float((weight[:, part] @ square[part, part] * weight[:, part]).sum()))
    chosen = sorted(range(len(energies)), key=lambda i: -energies[i])[:key_heads]
    chosen = sorted(_with_each(chosen, energies, key_heads, len(replaced)))
    _mean_norm(layer.input_layernorm, [old.input_layernorm for old in replaced])
    for name, size, reads in (
        ("q_proj", queries, 0),
        ("k_proj", width, 0),
        ("v_proj", width, 0),
        ("o_proj", queries, 1),
    ):
        parts, biases = [], []
        for choice in chosen:
            number, head = divmod(choice, key_heads)
            old = replaced[number]
            part = slice(head * size, (head + 1) * size)
            linear = getattr(old.self_attn, name)
            if reads:
                parts.append(linear.weight[:, part])
            else:
                parts.append(linear.weight[part] * (old.input_layernorm.weight / layer.input_layernorm.weight))
                if linear.bias is not None:
                    biases.append(linear.bias[part])
        target = getattr(layer.self_attn, name)
        target.weight.copy_(torch.cat(parts, dim=reads))
        if biases:
            target.bias.copy_(torch.cat(biases))
    return tuple(slots[choice // key_heads] for choice in chosen)


def _with_each(chosen: list[int], energies: list[float], per_layer: int, layers: int) -> list[int]:
    """Puts the best head of a layer that has none in the place of the weakest, where there are heads for all."""
    if per_layer < layers:
        return chosen
    for number in range(layers):
        if all(choice // per_layer != number for choice in chosen):
            own = range(number * per_layer, (number + 1) * per_layer)
            several = [c for c in chosen if sum(c // per_layer == other // per_layer for other in chosen) > 1]
            chosen.remove(min(several, key=lambda c: energies[c]))
            chosen.append(max(own, key=lambda c: energies[c]))
    return chosen


def _compose_mlp(layer: Layer, replaced: list[Layer], slots: list[int], streams: _Streams) -> dict[int, int]:
    energies = []
    for old, slot in zip(replaced, slots, strict=True):
        total: Any = 0.0
        for between, wanted in zip(streams.between[slot][:_SAMPLE], streams.entering[slot + 1], strict=False):
            size = wanted.square().mean(-1, keepdim=True).clamp(min=1e-12)
            total = total + (_mlp_features(old, between).square() / size).flatten(0, -2).sum(0)
        energies.append(total * old.mlp.down_proj.weight.square().sum(0))
    neurons = layer.mlp.gate_proj.out_features
    chosen = torch.cat(energies).topk(neurons).indices.sort().values
    _mean_norm(layer.post_attention_layernorm, [old.post_attention_layernorm for old in replaced])
    for name in ("gate_proj", "up_proj", "down_proj"):
        target = getattr(layer.mlp, name)
        if name == "down_proj":
            target.weight.copy_(torch.cat([old.mlp.down_proj.weight for old in replaced], dim=1)[:, chosen])
            continue
        norm = layer.post_attention_layernorm.weight
        scaled = [getattr(old.mlp, name).weight * (old.post_attention_layernorm.weight / norm) for old in replaced]
        target.weight.copy_(torch.cat(scaled)[chosen])
        if target.bias is not None:
            target.bias.copy_(torch.cat([getattr(old.mlp, name).bias for old in replaced])[chosen])
    counts = torch.bincount(chosen // neurons, minlength=len(slots)).tolist()
    return dict(zip(slots, counts, strict=True))


def _mean_norm(norm: Any, replaced: list[Layer]) -> None:
    """A weight for all, by which the matrices that read it are divided; never 0."""
    mean = torch.stack([old.weight for old in replaced]).square().mean(0).sqrt()
    norm.weight.copy_(mean.clamp(min=1e-3 * float(mean.max())))


def _weighted_square(features: list[torch.Tensor], states: list[torch.Tensor]) -> torch.Tensor:
    """Second moments of the features, each token counted by the inverse of its state's square."""
    total: Any = 0.0
    for reads, at in zip(features, states, strict=False):
        scaled = (reads * at.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()).flatten(0, -2)
        total = total + (scaled.T @ scaled).double()
    return total
