"""A vanilla checkpoint as a MoR: configuration, plan, and how every tensor is made."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration.configuration_mor import MoRConfig
from .checkpoint_writer import TargetTensor
from .errors import ConversionError
from .layer_maps import LayerMap, map_layers
from .mor_tensors import fresh_tensors, router_shapes
from .plan import ConversionPlan, PlannedLayer, attention_types, differing_types, expected_cost, full_depth_cost
from .recipe import DTYPES, Recipe
from .source_checkpoint import SourceCheckpoint, vanilla_weights
from .tensor_source import TensorSource


LAYER_NAME = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Blueprint:
    """Everything about a new checkpoint before its first byte is written."""

    config: MoRConfig
    plan: ConversionPlan
    targets: list[TargetTensor]


def vanilla_blueprint(source: SourceCheckpoint, recipe: Recipe) -> Blueprint:
    """Plans the conversion of a vanilla checkpoint.

    Args:
        source (`SourceCheckpoint`): one of the supported families.
        recipe (`Recipe`): what to make; `num_recursions` is needed.

    Raises:
        ConversionError: if weights and configuration disagree, the depth is too small, or a field does not fit.
    """
    weights = vanilla_weights(source)
    fields = _with_router_defaults(recipe)
    if fields.get("num_recursions") is None:
        raise ConversionError(
            "The number of recursions is missing; give `--recursions 2`, or `num_recursions` in recipe or call."
        )
    depth = source.config.num_hidden_layers
    layer_map = map_layers(
        depth,
        fields["num_recursions"],
        fields.get("sharing") or "middle_cycle",
        recipe.init or "stepwise",
        prelude_layers=fields.get("prelude_layers"),
        coda_layers=fields.get("coda_layers"),
        drop_layers=bool(recipe.drop_layers),
        seed=recipe.seed or 0,
    )
    dtype = DTYPES[recipe.dtype] if recipe.dtype else common_dtype(weights)
    config = make_config(
        lambda: MoRConfig.from_backbone(
            source.config,
            source_layers=[group[0] for group in layer_map.sources],
            num_hidden_layers=layer_map.unrolled_depth,
            **{**fields, "prelude_layers": layer_map.prelude_layers, "coda_layers": layer_map.coda_layers},
        )
    )
    config.dtype = dtype
    targets = _body(weights, layer_map, DTYPES[recipe.dtype] if recipe.dtype else None)
    fresh = fresh_tensors(config, router_init=recipe.router_init or "on", seed=recipe.seed or 0)
    plan = ConversionPlan(
        source=source.name,
        backbone=config.backbone,
        source_depth=depth,
        recipe=recipe.to_dict(),
        layers=_planned_layers(layer_map, attention_types(config, config.num_hidden_layers)),
        dropped=layer_map.dropped,
        unused=tuple(sorted(set(range(depth)) - set(layer_map.dropped) - {i for g in layer_map.sources for i in g})),
        new={target.name: target.shape for target in fresh},
        before=full_depth_cost(source.config, dtype.itemsize),
        full=full_depth_cost(config, dtype.itemsize),
        expected=expected_cost(config, dtype.itemsize),
        bytes_per_value=dtype.itemsize,
        notes=tuple(_notes(source, config, recipe, layer_map)),
    )
    return Blueprint(config, plan, targets + fresh)


def make_config(build: Callable[[], MoRConfig]) -> MoRConfig:
    """Builds a configuration and turns what it refuses into one sentence.

    Raises:
        ConversionError: if a field has a wrong type or value.
    """
    try:
        return build()
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(" ".join(str(error).split())) from error


def common_dtype(weights: TensorSource) -> torch.dtype:
    """The type that most of the weights have."""
    elements: dict[torch.dtype, int] = {}
    for info in weights.infos.values():
        elements[info.dtype] = elements.get(info.dtype, 0) + info.nbytes // info.dtype.itemsize
    return max(elements, key=lambda dtype: elements[dtype])


def copy_of(weights: TensorSource, new_name: str, name: str, dtype: torch.dtype | None) -> TargetTensor:
    """A tensor of the source under another name, in its own type unless one is given."""
    info = weights.infos[name]
    return TargetTensor(new_name, info.shape, dtype or info.dtype, lambda: weights.read(name))


def _mean_of(weights: TensorSource, new_name: str, names: list[str], dtype: torch.dtype | None) -> TargetTensor:
    """The mean of several tensors, summed in fp32 (fp64 for fp64)."""
    info = weights.infos[names[0]]
    wide = torch.float64 if info.dtype == torch.float64 else torch.float32

    def make() -> torch.Tensor:
        total = weights.read(names[0]).to(wide, copy=True)
        for name in names[1:]:
            total += weights.read(name)
        return total.div_(len(names))

    return TargetTensor(new_name, info.shape, dtype or info.dtype, make)


def _body(weights: TensorSource, layer_map: LayerMap, dtype: torch.dtype | None) -> list[TargetTensor]:
    """Embedding, layers, norm and head, in the order of the model."""
    parts: dict[int, list[str]] = {}
    outer = []
    for name in weights.infos:
        match = LAYER_NAME.match(name)
        if match:
            parts.setdefault(int(match[1]), []).append(match[2])
        else:
            outer.append(name)
    front = [name for name in outer if "embed" in name]
    targets = [copy_of(weights, name, name, dtype) for name in front]
    for layer, group in enumerate(layer_map.sources):
        for part in parts[group[0]]:
            names = [f"model.layers.{i}.{part}" for i in group]
            new_name = f"model.layers.{layer}.{part}"
            if len(names) == 1:
                targets.append(copy_of(weights, new_name, names[0], dtype))
            else:
                targets.append(_mean_of(weights, new_name, names, dtype))
    return targets + [copy_of(weights, name, name, dtype) for name in outer if name not in front]


def _with_router_defaults(recipe: Recipe) -> dict[str, Any]:
    """The recipe's MoR fields, with what `router_init` adds.

    Raises:
        ConversionError: if a field contradicts `router_init: on`.
    """
    fields = dict(recipe.mor)
    if fields.get("routing") == "none":
        return fields
    if recipe.router_init == "on":
        if fields.get("router_bias") is False:
            raise ConversionError(
                "`router_bias` is False, but `router_init: on` opens the routers by their bias; leave `router_bias` "
                "out or use `router_init: random`."
            )
        fields["router_bias"] = True
        fields.setdefault("gating", "interpolate")
    return fields


def _planned_layers(layer_map: LayerMap, types: list[str | None]) -> tuple[PlannedLayer, ...]:
    layers = []
    last = len(layer_map.sources) - layer_map.coda_layers
    for layer, group in enumerate(layer_map.sources):
        role = "prelude" if layer < layer_map.prelude_layers else "coda" if layer >= last else "shared"
        extra = (
            layer_map.prelude_layers - layer_map.extra_prelude <= layer < layer_map.prelude_layers
            or last <= layer < last + layer_map.extra_coda
        )
        positions = layer_map.unrolled_positions(layer)
        layers.append(PlannedLayer(layer, role, group, tuple(positions), types[positions[0]], extra))
    return tuple(layers)


def _notes(source: SourceCheckpoint, config: MoRConfig, recipe: Recipe, layer_map: LayerMap) -> list[str]:
    notes = []
    if layer_map.num_recursions == 1:
        notes.append("one recursion shares nothing: the parameters stay as many as they are.")
    if layer_map.extra_prelude or layer_map.extra_coda:
        notes.append(
            f"the depth does not divide: {layer_map.extra_prelude} extra unique layer(s) in front, "
            f"{layer_map.extra_coda} at the end."
        )
    types = attention_types(source.config, source.config.num_hidden_layers)
    if config.num_hidden_layers > len(types) or any(types):
        mixed = differing_types(dict(enumerate(layer_map.sources)), types)
        if mixed:
            notes.append(
                f"layers {', '.join(map(str, mixed))} average source layers of different attention types and take the "
                "type of the first."
            )
    if router_shapes(config):
        if recipe.router_init == "random":
            notes.append("the routers are random: train before use.")
        elif config.gating != "interpolate" or config.router_alpha != 1:
            notes.append(
                f"gating {config.gating!r} with alpha {config.router_alpha} damps what the source's layers add; only "
                "'interpolate' with alpha 1 starts as the source with its layers repeated."
            )
        else:
            notes.append("every token starts at full depth; training lowers it.")
    if config.num_recursions > 1:
        notes.append("repeated layers were not trained to be repeated: expect to heal the model by training.")
    if source.gguf is not None:
        notes.append("the weights come dequantized from GGUF, with its rounding errors, and were loaded whole.")
    return notes
