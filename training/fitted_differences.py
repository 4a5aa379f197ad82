"""What each recursion adds to a shared layer, fitted to the layer of the source that it stands for.

A shared layer that was fitted to several layers (`fitted_start`) is a compromise between them. At each application the
low-rank differences of the matrices that write to the stream make up for a part of it: reduced-rank regression of what
is left to the source's stream (`stream_writers`), application by application in the order in which the model runs
them, so that each one also corrects what those before have left.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .source_streams import SourceStreams, attention_features, mlp_features, relative_error
from .stream_writers import Application, StreamWriter


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
        features = attention_features(layer, slot, streams, states, recursion)
        at = Application(features, states, streams.between[slot])
        states = StreamWriter(layer, layer.self_attn, "o_proj").solve_difference(recursion, at, ridge)
        features = [mlp_features(layer, one, recursion) for one in states]
        at = Application(features, states, streams.entering[slot + 1])
        states = StreamWriter(layer, layer.mlp, "down_proj").solve_difference(recursion, at, ridge)
        if hasattr(layer.mlp, "recursion_adapter"):
            errors[number] = (*errors.get(number, ()), relative_error(states, streams.entering[slot + 1]))
    return errors
