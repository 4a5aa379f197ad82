"""What each recursion adds to a shared layer, fitted to the layer of the source that it stands for.

A shared layer that was fitted to several layers (`fitted_start`) is a compromise between them. At each application the
low-rank differences of the matrices that write to the stream make up for a part of it: reduced-rank regression of what
is left to the source's stream, application by application in the order in which the model runs them, so that each one
also corrects what those before have left.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .source_streams import (
    Layer,
    SourceStreams,
    add_ridge,
    attention_features,
    mlp_features,
    normal_equations,
    relative_error,
    residual_factor,
)


def without_differences(model: PreTrainedModel, layer: int) -> None:
    """Lets all recursions of a layer compute the same; what their differences read stays, to learn from."""
    for part in model.model.layers[layer].modules():
        if hasattr(part, "recursion_adapter"):
            for name, parameter in part.recursion_adapter.named_parameters():
                if not name.endswith("_down"):
                    parameter.zero_()


@torch.no_grad()
def fit_differences(model: PreTrainedModel, streams: SourceStreams, ridge: float) -> dict[int, tuple[float, ...]]:
    """Sets what the recursions add to the matrices that write to the stream.

    The differences of all other matrices stay as they are.

    Args:
        model (`PreTrainedModel`): a MoR with `recursion_rank`.
        streams: of its source.
        ridge: draws the differences to 0, relative to the mean square of the features.

    Returns:
        For each shared layer the errors of its applications, as `FittedLayer` gives them.
    """
    errors: dict[int, tuple[float, ...]] = {}
    states = streams.entering[0]
    for slot, number in enumerate(model.config.physical_layers):
        layer, recursion = model.model.layers[number], len(errors.get(number, ()))
        fit = partial(_fit_writer, layer, recursion=recursion, ridge=ridge)
        features = attention_features(layer, slot, streams, states, recursion)
        states = fit(layer.self_attn, "o_proj", features, states, streams.between[slot])
        features = [mlp_features(layer, between, recursion) for between in states]
        states = fit(layer.mlp, "down_proj", features, states, streams.entering[slot + 1])
        if hasattr(layer.mlp, "recursion_adapter"):
            errors[number] = (*errors.get(number, ()), relative_error(states, streams.entering[slot + 1]))
    return errors


def _fit_writer(
    layer: Layer,
    part: Any,
    name: str,
    features: list[torch.Tensor],
    entering: list[torch.Tensor],
    wanted: list[torch.Tensor],
    *,
    recursion: int,
    ridge: float,
) -> list[torch.Tensor]:
    """Fits the difference of one matrix, if it has any; returns the states behind it."""
    writer: nn.Linear = getattr(part, name)
    adapter = getattr(part, "recursion_adapter", None)
    factor = residual_factor(layer)
    if adapter is None:
        return [here + factor * writer(reads) for reads, here in zip(features, entering, strict=True)]
    square, product = normal_equations(writer, layer, [features], [entering], [wanted])
    product -= square @ writer.weight.double().T
    add_ridge(square, ridge)
    best = torch.linalg.solve(square, product)
    # the best weights of a rank lie in the directions in which the best of all ranks write most
    directions = torch.linalg.eigh(best.T @ square @ best).eigenvectors
    down, up = getattr(adapter, f"{name}_down")[recursion], getattr(adapter, f"{name}_up")[recursion]
    written = directions[:, -len(down) :]
    read = (best @ written).T
    # steps of one size move both factors alike
    balance = read.norm(dim=1, keepdim=True).clamp(min=1e-12).sqrt()
    down.copy_(read / balance)
    up.copy_(written * balance.T)
    return [
        here + factor * (writer(reads) + adapter(reads, name, recursion))
        for reads, here in zip(features, entering, strict=True)
    ]
