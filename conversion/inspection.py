"""What a checkpoint is: structure, parameters and costs, from its configuration and the headers of its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..configuration.backbone_config import BACKBONES
from .errors import ConversionError
from .mor_tensors import routers_are_open
from .plan import PlannedCost, expected_cost, figure, format_columns, full_depth_cost, spans
from .source_checkpoint import SourceCheckpoint, open_source
from .tensor_source import read_json
from .vanilla_to_mor import common_dtype


@dataclass(frozen=True)
class CheckpointDescription:
    """
    Attributes:
        name: Hub id or folder.
        structure: fields of the configuration that say what the model is.
        layers: role and unrolled positions of each physical layer, for a MoR.
        stored_parameters: elements in the weight files.
        dtype: the type that most of them have.
        full: cost when every token runs every layer.
        expected: cost when routing follows the capacities; None for a vanilla model.
        routers: whether the routers still let everything through; None without routers.
        plan: the plan of the conversion, where the checkpoint has one.
    """

    name: str
    structure: dict[str, Any]
    layers: list[tuple[int, str, list[int]]]
    stored_parameters: int
    dtype: str
    full: PlannedCost
    expected: PlannedCost | None
    routers: str | None
    plan: dict[str, Any] | None


_STRUCTURE = """
    model_type backbone num_hidden_layers num_physical_layers num_shared_layers num_recursions sharing routing
    capacities router_type gating inference_rule router_thresholds kv_mode hidden_size num_attention_heads
    num_key_value_heads vocab_size tie_word_embeddings
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
    checkpoint = open_source(source, revision=revision, allowed=("mor", *BACKBONES))
    config: Any = checkpoint.config
    recursive = config.model_type == "mor"
    dtype = common_dtype(checkpoint.weights)
    structure = {name: getattr(config, name) for name in _STRUCTURE if getattr(config, name, None) is not None}
    plan = checkpoint.folder / "varidepth_plan.json"
    return CheckpointDescription(
        name=checkpoint.name,
        structure=structure,
        layers=_layers(config) if recursive else [],
        stored_parameters=sum(torch.Size(info.shape).numel() for info in checkpoint.weights.infos.values()),
        dtype=str(dtype).removeprefix("torch."),
        full=full_depth_cost(config, dtype.itemsize, context),
        expected=expected_cost(config, dtype.itemsize, context) if recursive and config.routing != "none" else None,
        routers=_router_state(checkpoint) if recursive and config.routing != "none" else None,
        plan=read_json(plan) if plan.is_file() else None,
    )


def report(description: CheckpointDescription) -> str:
    """The description as text for a terminal."""
    width = max(len(key) for key in description.structure)
    lines = [description.name, ""]
    lines += [f"{key.ljust(width)}  {value}" for key, value in description.structure.items()]
    if description.routers:
        lines.append(f"{'routers'.ljust(width)}  {description.routers}")
    if description.layers:
        rows = [("layer", "role", "applied at depth")]
        rows += [(str(layer), role, spans(tuple(positions))) for layer, role, positions in description.layers]
        lines += ["", *format_columns(rows)]
    models = [("full depth", description.full)]
    if description.expected is not None:
        models.append(("at the capacities", description.expected))
    costs = [("", *(name for name, _ in models))]
    for label, attribute in (
        ("parameters", "parameters"),
        ("without embedding and head", "non_embedding"),
        ("layers per token", "layers_per_token"),
        (f"FLOPs per token at {description.full.context}", "flops_per_token"),
        (f"KV bytes per token ({description.dtype})", "kv_bytes_per_token"),
    ):
        costs.append((label, *(figure(getattr(cost, attribute)) for _, cost in models)))
    costs.append(("stored numbers", figure(description.stored_parameters), *[""] * (len(models) - 1)))
    lines += ["", *format_columns(costs)]
    if description.plan is not None:
        lines += ["", f"made of {description.plan.get('source')} by the recipe in varidepth_recipe.yaml"]
    return "\n".join(lines)


def _layers(config: Any) -> list[tuple[int, str, list[int]]]:
    first, last = config.prelude_layers, config.num_physical_layers - config.coda_layers
    rows = []
    for layer in range(config.num_physical_layers):
        role = "prelude" if layer < first else "coda" if layer >= last else "shared"
        rows.append((layer, role, [i for i, physical in enumerate(config.physical_layers) if physical == layer]))
    return rows


def _router_state(checkpoint: SourceCheckpoint) -> str:
    weights = checkpoint.weights

    def read(name: str) -> torch.Tensor | None:
        return weights.read(name) if name in weights.infos else None

    weight = read("model.routers.weight")
    if weight is None:
        raise ConversionError("The weights lack model.routers.weight; the checkpoint is incomplete.")
    config: Any = checkpoint.config
    is_open = routers_are_open(config, weight, read("model.routers.bias"), read("model.balancing_bias"))
    return "let every token through (untrained)" if is_open else "decide per token"
