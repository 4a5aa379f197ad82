"""A vanilla checkpoint as a MoR: configuration, plan, and how every tensor is made."""

from typing import Any

from ..configuration.configuration_mor import MoRConfig
from ..modeling.modeling_mor import MoRForCausalLM
from .blueprint import Blueprint, empty_model, make_config
from .body_tensors import body_tensors, common_dtype
from .errors import ConversionError
from .layer_maps import LayerMap, map_layers
from .plan import ConversionPlan, PlannedLayer, attention_types, layer_roles
from .planned_cost import expected_cost, full_depth_cost
from .recipe import DTYPES, Recipe
from .recursion_tensors import relaxed_tensors
from .router_tensors import OPEN_LOGIT, fresh_tensors
from .source_checkpoint import SourceCheckpoint, vanilla_weights


def mor_blueprint(source: SourceCheckpoint, recipe: Recipe, *, quiet: bool = True) -> Blueprint:
    """Plans the conversion of a vanilla checkpoint.

    Args:
        source (`SourceCheckpoint`): one of the supported families.
        recipe (`Recipe`): what to make; `num_recursions` is needed.
        quiet (`bool`): without effect, nothing here takes long.

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
    targets = body_tensors(weights, layer_map.sources, DTYPES[recipe.dtype] if recipe.dtype else None)
    model = empty_model(MoRForCausalLM, config)
    if config.varies_by_recursion:
        targets = relaxed_tensors(targets, weights, layer_map, config, list(model.state_dict()))
    fresh = fresh_tensors(model, router_init=recipe.router_init or "on", seed=recipe.seed or 0, open_bias=OPEN_LOGIT)
    plan = ConversionPlan(
        source=source.name,
        backbone=config.backbone,
        source_depth=depth,
        recipe=recipe.to_dict(),
        layers=_planned_layers(config, layer_map),
        dropped=layer_map.dropped,
        unused=_unused(config, layer_map, depth),
        new={target.name: target.shape for target in fresh},
        before=full_depth_cost(source.config, dtype.itemsize),
        full=full_depth_cost(config, dtype.itemsize),
        expected=expected_cost(config, dtype.itemsize),
        bytes_per_value=dtype.itemsize,
        notes=tuple(_notes(source, config, recipe, layer_map)),
    )
    return Blueprint(model, plan, recipe, targets + fresh)


def _with_router_defaults(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields, with what `router_init` adds.

    Raises:
        ConversionError: if a field contradicts `router_init: on`.
    """
    fields = dict(recipe.fields)
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


def _unused(config: MoRConfig, layer_map: LayerMap, depth: int) -> tuple[int, ...]:
    if config.varies_by_recursion:
        # what a recursion has of its own is made of them
        return ()
    return tuple(sorted(set(range(depth)) - set(layer_map.dropped) - {i for g in layer_map.sources for i in g}))


def _planned_layers(config: MoRConfig, layer_map: LayerMap) -> tuple[PlannedLayer, ...]:
    types = attention_types(config, config.num_hidden_layers)
    layers = []
    last = len(layer_map.sources) - layer_map.coda_layers
    for layer, (role, group) in enumerate(zip(layer_roles(config), layer_map.sources, strict=True)):
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
        mixed = [layer for layer, group in enumerate(layer_map.sources) if len({types[i] for i in group}) > 1]
        if mixed:
            notes.append(
                f"layers {', '.join(map(str, mixed))} average source layers of different attention types and take the "
                "type of the first."
            )
    if config.num_routers:
        if recipe.router_init == "random":
            notes.append("the routers are random: train before use.")
        elif config.gating != "interpolate" or config.router_alpha != 1:
            notes.append(
                f"gating {config.gating!r} with alpha {config.router_alpha} damps what the source's layers add; only "
                "'interpolate' with alpha 1 starts as the source with its layers repeated."
            )
        else:
            notes.append("every token starts at full depth; training lowers it.")
    if config.recursion_rank:
        matrices = "every matrix of a shared layer differs"
        if config.kv_mode == "shared":
            matrices = (
                "the matrices of a shared layer, but for keys and values, which are those of the first source layer "
                "that it replaces, differ"
            )
        notes.append(
            f"at each recursion {matrices} by rank {config.recursion_rank}, at first the best approximation to the "
            "source layer that it replaces."
        )
    if config.recursion_norms:
        notes.append("at each recursion the norms are those of the source layer that is replaced.")
    if config.num_recursions > 1:
        notes.append("repeated layers were not trained to be repeated: expect to heal the model by training.")
    if source.gguf is not None:
        notes.append("the weights come dequantized from GGUF, with its rounding errors, and were loaded whole.")
    return notes
