"""Shared layers fitted to the layers that they replace, from calibration text, before any training.

A shared layer has to act like several layers of its source. It is made of their parts: of all their attention heads
and MLP neurons it gets those that move the stream most. Then the matrices that write to the stream are solved for,
layer by layer from the first to the last, so that at each of its applications the layer brings the student's own
stream, with the errors of the layers before, to where the source's stream is (ridge regression, no gradient). Where
each recursion has low-rank differences of its own, both are solved for at once (`stream_writers`), and the differences
once more along the stream that the whole model makes (`fitted_differences`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from .fitted_differences import fit_differences, without_differences
from .source_streams import (
    Layer,
    SourceStreams,
    attention_features,
    mlp_features,
    read_streams,
    relative_error,
)
from .stream_writers import Application, StreamWriter


# families whose layer is `x + attention(norm(x))`, then `x + mlp(norm(x))`, with separate projections
FITTED_BACKBONES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite")
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
    fitted yet; further sweeps take there what the model made of it in the sweep before. What each recursion has of its
    own (`recursion_rank`) is set with the layer, and last along the model's own stream: `fit_differences`.

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
    streams = read_streams(source, batches)
    parts = {}
    for layer, at in slots.items():
        without_differences(model, layer)
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
            errors = tuple(relative_error(left[slot], streams.entering[slot + 1]) for slot in at)
            report.append(FittedLayer(layer, *parts[layer], error=errors))
            if show is not None:
                show(report[-1])
    if model.config.recursion_rank:
        final = fit_differences(model, streams, ridge)
        report = [replace(one, error=final[one.layer]) for one in report]
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


def _solve_layer(
    layer: Layer, slots: list[int], streams: SourceStreams, entering: list[list[torch.Tensor]], ridge: float
) -> list[list[torch.Tensor]]:
    """Solves for what attention and MLP write to the stream; returns the states behind each application."""
    applications = [
        Application(attention_features(layer, slot, streams, states, recursion), states, streams.between[slot])
        for recursion, (slot, states) in enumerate(zip(slots, entering, strict=True))
    ]
    between = StreamWriter(layer, layer.self_attn, "o_proj").solve(applications, ridge)
    applications = [
        Application([mlp_features(layer, one, recursion) for one in states], states, streams.entering[slot + 1])
        for recursion, (slot, states) in enumerate(zip(slots, between, strict=True))
    ]
    return StreamWriter(layer, layer.mlp, "down_proj").solve(applications, ridge)


def _compose(
    layer: Layer, source_layers: list[Layer], slots: list[int], streams: SourceStreams
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


def _compose_attention(
    layer: Layer, replaced: list[Layer], slots: list[int], streams: SourceStreams
) -> tuple[int, ...]:
    width = layer.self_attn.head_dim
    key_heads = layer.self_attn.k_proj.out_features // width
    queries = layer.self_attn.o_proj.in_features // key_heads
    energies = []
    for old, slot in zip(replaced, slots, strict=True):
        features = attention_features(old, slot, streams, streams.entering[slot][:_SAMPLE])
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


def _compose_mlp(layer: Layer, replaced: list[Layer], slots: list[int], streams: SourceStreams) -> dict[int, int]:
    energies = []
    for old, slot in zip(replaced, slots, strict=True):
        total: Any = 0.0
        for between, wanted in zip(streams.between[slot][:_SAMPLE], streams.entering[slot + 1], strict=False):
            size = wanted.square().mean(-1, keepdim=True).clamp(min=1e-12)
            total = total + (mlp_features(old, between).square() / size).flatten(0, -2).sum(0)
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
    for one in (norm, *getattr(norm, "deeper", ())):
        one.weight.copy_(mean.clamp(min=1e-3 * float(mean.max())))


def _weighted_square(features: list[torch.Tensor], states: list[torch.Tensor]) -> torch.Tensor:
    """Second moments of the features, each token counted by the inverse of its state's square."""
    total: Any = 0.0
    for reads, at in zip(features, states, strict=False):
        scaled = (reads * at.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()).flatten(0, -2)
        total = total + (scaled.T @ scaled).double()
    return total
