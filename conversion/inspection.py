"""What a checkpoint is: structure, parameters and costs, from its configuration and the headers of its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..configuration.backbone_config import BACKBONES, MOE_BACKBONES
from .body_tensors import common_dtype
from .errors import ConversionError
from .plan import layer_roles, spans
from .planned_cost import (
    PlannedCost,
    RecurrentCost,
    cost_rows,
    expected_cost,
    figure,
    format_columns,
    full_depth_cost,
    recurrent_cost,
)
from .recipe_fields import ARCHITECTURES, ROUTED
from .router_tensors import routers_are_open
from .source_checkpoint import SourceCheckpoint, open_source
from .tensor_source import read_json


@dataclass(frozen=True)
class CheckpointDescription:
    """
    Attributes:
        name: Hub id or folder.
        structure: fields of the configuration that say what the model is.
        layers: role and unrolled positions of each physical layer; none for a vanilla model.
        stored_parameters: elements in the weight files.
        dtype: the type that most of them have.
        full: cost when every token runs every layer.
        expected: cost when routing follows the capacities; None without routing.
        routers: whether the routers still let everything through; None without routers.
        plan: the plan of the conversion, where the checkpoint has one.
    """

    name: str
    structure: dict[str, Any]
    layers: list[tuple[int, str, list[int]]]
    stored_parameters: int
    dtype: str
    full: PlannedCost | RecurrentCost
    expected: PlannedCost | None
    routers: str | None
    plan: dict[str, Any] | None


_STRUCTURE = """
    model_type backbone num_hidden_layers num_physical_layers num_shared_layers num_recursions sharing
    recursion_rank recursion_norms routing
    prefix_length short_prompt sliding_window feature_map feature_dim conv_kernel_size
    capacities routed_layers routing_unit router_type gating gate inference_rule router_thresholds compute
    always_route_first num_noop_experts kv_mode hidden_size num_attention_heads num_key_value_heads vocab_size
    tie_word_embeddings
""".split()


def describe(source: str | Path, *, revision: str | None = None, context: int = 1024) -> CheckpointDescription:
    """Reads configuration and headers; of the weights only the routers.

    Args:
        source (`str` or `Path`): folder or Hub id.
        revision (`str`, *optional*): of a Hub source.
        context (`int`): tokens in the cache for the costs.

    Raises:
        ConversionError: if the checkpoint cannot be read or is of an unsupported family.
    """
    if context < 1:
        raise ConversionError(f"`context` is {context}, but must be at least 1.")
    checkpoint = open_source(source, revision=revision, allowed=(*ARCHITECTURES, *BACKBONES, *MOE_BACKBONES))
    config: Any = checkpoint.config
    deepens = config.model_type in ROUTED
    routed = deepens and not all(routed_pass.always for routed_pass in config.routed_passes)
    dtype = common_dtype(checkpoint.weights)
    structure = {name: getattr(config, name) for name in _STRUCTURE if getattr(config, name, None) is not None}
    plan = checkpoint.folder / "varidepth_plan.json"
    return CheckpointDescription(
        name=checkpoint.name,
        structure=structure,
        layers=_layers(config) if config.model_type in ARCHITECTURES else [],
        stored_parameters=sum(torch.Size(info.shape).numel() for info in checkpoint.weights.infos.values()),
        dtype=str(dtype).removeprefix("torch."),
        full=_full_cost(config, dtype.itemsize, context),
        expected=expected_cost(config, dtype.itemsize, context) if routed else None,
        routers=_router_state(checkpoint) if deepens and config.num_routers else None,
        plan=read_json(plan) if plan.is_file() else None,
    )


def _full_cost(config: Any, bytes_per_value: int, context: int) -> PlannedCost | RecurrentCost:
    if config.model_type == "jrt":
        return recurrent_cost(config, bytes_per_value)
    return full_depth_cost(config, bytes_per_value, context)


def report(description: CheckpointDescription) -> str:
    """The description as text for a terminal."""
    width = max(len(key) for key in description.structure)
    lines = [description.name, ""]
    lines += [f"{key.ljust(width)}  {value}" for key, value in description.structure.items()]
    if description.routers:
        lines.append(f"{'routers'.ljust(width)}  {description.routers}")
    if description.layers:
        lines += ["", *format_columns(_layer_rows(description.layers))]
    models = [("full depth", description.full)]
    if description.expected is not None:
        models.append(("at the capacities", description.expected))
    costs = cost_rows(models, f" ({description.dtype})")
    costs.append(("stored numbers", figure(description.stored_parameters), *[""] * (len(models) - 1)))
    lines += ["", *format_columns(costs)]
    if description.plan is not None:
        lines += ["", f"made of {description.plan.get('source')} by the recipe in varidepth_recipe.yaml"]
    return "\n".join(lines)


def _layers(config: Any) -> list[tuple[int, str, list[int]]]:
    physical_layers = getattr(config, "physical_layers", range(config.num_hidden_layers))
    return [
        (layer, role, [i for i, physical in enumerate(physical_layers) if physical == layer])
        for layer, role in enumerate(layer_roles(config))
    ]


def _layer_rows(layers: list[tuple[int, str, list[int]]]) -> list[tuple[str, ...]]:
    """A row for each layer, or where all stand in their own place for each role."""
    if any(positions != [layer] for layer, _, positions in layers):
        rows = [(str(layer), role, spans(positions)) for layer, role, positions in layers]
        return [("layer", "role", "applied at depth"), *rows]
    roles = dict.fromkeys(role for _, role, _ in layers)
    return [("role", "layers"), *((role, spans([i for i, other, _ in layers if other == role])) for role in roles)]


def _router_state(checkpoint: SourceCheckpoint) -> str:
    is_open = routers_are_open(checkpoint.config, checkpoint.weights)
    return "let every token through (untrained)" if is_open else "decide per token"
