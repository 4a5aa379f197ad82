"""A vanilla checkpoint as a MoD: the same layers, of which tokens can pass by some."""

import zlib
from typing import Any

import torch

from ..configuration.backbone_config import MOE_BACKBONES
from ..configuration.configuration_mod import MoDConfig
from ..modeling.modeling_mod import MoDForCausalLM
from ..modeling.token_routing import activate
from .blueprint import Blueprint, empty_model, make_config
from .body_tensors import body_tensors, common_dtype
from .checkpoint_writer import TargetTensor
from .errors import ConversionError
from .layer_redundancy import LayerRedundancy, measure_redundancy
from .plan import ConversionPlan, PlannedLayer, attention_types, layer_roles
from .planned_cost import expected_cost, full_depth_cost
from .recipe import DTYPES, Recipe
from .recipe_fields import AUTO
from .router_tensors import fresh_tensors
from .source_checkpoint import SourceCheckpoint, vanilla_weights
from .tensor_source import TensorSource


# the cheap, proven way to a routed model of a pretrained one: attention alone, and only some of it
DEFAULTS = {"routing_unit": "attention", "capacity": 0.5, "always_route_first": 1}


def mod_blueprint(source: SourceCheckpoint, recipe: Recipe, *, quiet: bool = True) -> Blueprint:
    """Plans the conversion of a vanilla checkpoint.

    Args:
        source (`SourceCheckpoint`): one of the supported families.
        recipe (`Recipe`): what to make.
        quiet (`bool`): no progress of a measurement on stderr.

    Raises:
        ConversionError: if weights and configuration disagree, or a field does not fit.
    """
    weights = vanilla_weights(source)
    recipe = _with_defaults(recipe, source)
    redundancy = None
    if recipe.fields["routed_layers"] == AUTO:
        recipe, redundancy = _choose_layers(source, weights, recipe, quiet)
    config = make_config(lambda: MoDConfig.from_backbone(source.config, **recipe.fields))
    dtype = DTYPES[recipe.dtype] if recipe.dtype else common_dtype(weights)
    config.dtype = dtype
    depth = config.num_hidden_layers
    written = DTYPES[recipe.dtype] if recipe.dtype else None
    targets = body_tensors(weights, [[layer] for layer in range(depth)], written)
    model = empty_model(MoDForCausalLM, config)
    seed = recipe.seed or 0
    if config.num_noop_experts:
        targets = [_with_noop_experts(target, config, seed) for target in targets]
    fresh = fresh_tensors(model, router_init=recipe.router_init or "on", seed=seed)
    plan = ConversionPlan(
        source=source.name,
        backbone=config.backbone,
        source_depth=depth,
        recipe=recipe.to_dict(),
        layers=_planned_layers(config),
        dropped=(),
        unused=(),
        new={target.name: target.shape for target in fresh},
        before=full_depth_cost(source.config, dtype.itemsize),
        full=full_depth_cost(config, dtype.itemsize),
        expected=expected_cost(config, dtype.itemsize),
        bytes_per_value=dtype.itemsize,
        notes=tuple(_notes(source, config, recipe, redundancy)),
        redundancy=redundancy,
    )
    return Blueprint(model, plan, recipe, targets + fresh)


def _with_defaults(recipe: Recipe, source: SourceCheckpoint) -> Recipe:
    """The recipe with what a conversion sets where nothing is said.

    Raises:
        ConversionError: if a field contradicts `router_init: on`.
    """
    depth = source.config.num_hidden_layers
    # every other layer between a dense first and a dense last one
    defaults: dict[str, Any] = {"routed_layers": list(range(1, depth - 1, 2)) or [depth - 1], **DEFAULTS}
    if recipe.router_init == "on":
        defaults |= {"gate": "straight_through", "router_bias": True}
        if recipe.fields.get("gate") == "raw":
            raise ConversionError(
                "`gate` is 'raw', but `router_init: on` starts with routers of zero, whose raw gate shuts every layer "
                "off; use 'straight_through' or 'one_plus_tanh', or `router_init: random`."
            )
        if recipe.fields.get("num_noop_experts") and source.config.model_type in MOE_BACKBONES:
            raise ConversionError(
                f"`num_noop_experts` is {recipe.fields['num_noop_experts']}, but `router_init: on` starts as the "
                "source, and experts without effect take weight from the others at once; use `router_init: random` "
                "and train, or leave it out."
            )
    return recipe.with_fields(**{**defaults, **recipe.fields})


def _choose_layers(
    source: SourceCheckpoint, weights: TensorSource, recipe: Recipe, quiet: bool
) -> tuple[Recipe, LayerRedundancy]:
    """The recipe with the layers that a measurement chose in the place of `auto`."""
    fields = recipe.fields
    candidates = source.config.num_hidden_layers - 1
    count = recipe.num_routed_layers
    if count is None:
        count = max(1, source.config.num_hidden_layers // 2)
    if not 1 <= count <= candidates:
        raise ConversionError(
            f"`num_routed_layers` is {count}, but the source has {candidates} layers that can be routed (all but the "
            f"first); choose from 1 to {candidates}."
        )
    # what the configuration refuses it refuses before the measurement, which takes its time
    trial = recipe.with_chosen_layers(list(range(1, count + 1)))
    make_config(lambda: MoDConfig.from_backbone(source.config, **trial.fields))
    redundancy = measure_redundancy(
        source,
        weights,
        unit=fields["routing_unit"],
        always_first=fields["always_route_first"],
        text=recipe.calibration_text,
        quiet=quiet,
    )
    return recipe.with_chosen_layers(redundancy.least_costly(count)), redundancy


def _with_noop_experts(target: TargetTensor, config: MoDConfig, seed: int) -> TargetTensor:
    """The gate of a mixture of experts with random rows for the new experts; every other tensor as it is."""
    if not target.name.endswith(".mlp.gate.weight"):
        return target
    rows = (config.num_noop_experts, *target.shape[1:])

    def make() -> torch.Tensor:
        old = target.make()
        generator = torch.Generator().manual_seed(seed + zlib.crc32(target.name.encode()))
        new = torch.randn(rows, generator=generator) * config.initializer_range
        return torch.cat([old, new.to(old.dtype)])

    return TargetTensor(target.name, (target.shape[0] + rows[0], *rows[1:]), target.dtype, make)


def _planned_layers(config: MoDConfig) -> tuple[PlannedLayer, ...]:
    passes = {slot: routed_pass for routed_pass in config.routed_passes for slot in routed_pass.slots}
    types = attention_types(config, config.num_hidden_layers)
    layers = []
    for layer, role in enumerate(layer_roles(config)):
        routed = passes[layer] if role == "routed" else None
        layers.append(
            PlannedLayer(
                layer,
                role,
                (layer,),
                (layer,),
                types[layer],
                unit=routed.unit if routed else None,
                capacity=routed.share if routed else None,
            )
        )
    return tuple(layers)


def _notes(
    source: SourceCheckpoint, config: MoDConfig, recipe: Recipe, redundancy: LayerRedundancy | None
) -> list[str]:
    notes = []
    if redundancy is not None:
        notes.append(
            f"routed layers chosen by the rise of the loss on {redundancy.tokens} tokens of {redundancy.text} "
            f"(source: {redundancy.source_loss:.4f} nats per token) when all tokens pass by the {redundancy.unit} of "
            "a layer; the source was loaded whole for it."
        )
    if config.routing == "stochastic":
        notes.append("tokens are drawn at random, without routers: a control to train, not a model to use.")
    elif recipe.router_init == "random":
        notes.append("the routers are random: train before use.")
    elif float(activate(torch.zeros(()), config.gate, config.router_alpha)) != 1:
        notes.append(
            f"gate {config.gate!r} with alpha {config.router_alpha} damps what the routed layers add; only "
            "'straight_through' and 'one_plus_tanh' start as the source."
        )
    else:
        notes.append("every token enters every layer until the routers are trained or calibrated.")
    if config.inference_rule == "topk":
        notes.append("inference_rule 'topk' looks at future tokens and drops by rank: it only serves to measure.")
    if config.num_noop_experts:
        notes.append("the experts without effect compete from the start: train before use.")
    if source.gguf is not None:
        notes.append("the weights come dequantized from GGUF, with its rounding errors, and were loaded whole.")
    return notes
