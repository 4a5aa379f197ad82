"""Checkpoints of the official MoR code, in which every recursion has its own copy of the shared layers.

Expert choice: `model.layers.{i}.block.{j}.*` and `model.layers.{i}.mor_router.router.*`, one `i` per recursion. Token
choice: `model.layers.{i}.block_list.{r}.{j}.*` and one router. With Middle-Cycle sharing the first and the last layer
are plain. Their config.json is a plain llama one, so sharing and routing are read off the names.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration.configuration_mor import MoRConfig
from ..modeling.modeling_mor import MoRForCausalLM
from .blueprint import Blueprint, empty_model, make_config
from .body_tensors import common_dtype, copy_of
from .checkpoint_writer import TargetTensor
from .errors import ConversionError
from .plan import ConversionPlan, PlannedLayer
from .planned_cost import expected_cost, full_depth_cost
from .recipe import DTYPES, Recipe
from .router_tensors import ROUTER_DTYPE, fresh_buffers
from .source_checkpoint import DERIVED, SourceCheckpoint
from .tensor_source import TensorSource


_BLOCK = re.compile(r"^model\.layers\.(\d+)\.block\.(\d+)\.(.+)$")
_BLOCK_LIST = re.compile(r"^model\.layers\.(\d+)\.block_list\.(\d+)\.(\d+)\.(.+)$")
_PLAIN = re.compile(r"^model\.layers\.(\d+)\.((?:self_attn|mlp|input_layernorm|post_attention_layernorm)\..+)$")
_ROUTER = re.compile(r"^model\.layers\.(\d+)\.(mor_router|mlp_router)\.router\.(?:(\d)\.)?weight$")
_BIAS = re.compile(r"^model\.layers\.(\d+)\.router_bias$")
_GROUPS = {"mor_router": "routers", "mlp_router": "predictors"}


@dataclass
class _Layout:
    """The names of an official checkpoint, sorted by what they are."""

    token_choice: bool
    shared: dict[tuple[int, int], dict[str, str]]  # (recursion, j) -> part -> name
    plain: dict[int, dict[str, str]]
    routers: dict[tuple[str, int, str], str]  # (group, official layer, "" or index in the MLP) -> name
    bias: str | None
    outer: list[str]


def is_official(weights: TensorSource) -> bool:
    """Whether the names are those of the official MoR code."""
    return any(_BLOCK.match(name) or _BLOCK_LIST.match(name) for name in weights.infos)


def official_blueprint(source: SourceCheckpoint, recipe: Recipe) -> Blueprint:
    """Plans the conversion of an official MoR checkpoint; the function it computes stays the same.

    Args:
        source (`SourceCheckpoint`): a llama configuration with the official names.
        recipe (`Recipe`):
            fields that the names do not tell (`gating`, `router_alpha`, `capacities` ...) as in the training YAML; the
            paper's by default. What the names tell may be left out, or must agree.

    Raises:
        ConversionError: if the copies of a shared layer differ, a tensor is missing or unknown, or a field disagrees.
    """
    weights = source.weights
    layout = _read_layout(weights)
    recursions = _recursions(weights, layout)
    shared_layers = 1 + max(j for _, j in layout.shared)
    _check_copies(weights, layout, recursions, shared_layers)

    middle = bool(layout.plain)
    found: dict[str, Any] = {
        "num_recursions": recursions,
        "sharing": "middle_cycle" if middle else "cycle",
        "prelude_layers": 1 if middle else 0,
        "coda_layers": 1 if middle else 0,
        "routing": "token_choice" if layout.token_choice else "expert_choice",
        "router_type": "mlp" if any(index for _, _, index in layout.routers) else "linear",
        "router_bias": False,
    }
    if any(group == "predictors" for group, _, _ in layout.routers):
        found["inference_rule"] = "predictor"
    if layout.bias:
        found["balancing"] = "loss_free"
    for field, value in found.items():
        if field in recipe.fields and recipe.fields[field] != value:
            raise ConversionError(
                f"`{field}` is {recipe.fields[field]!r}, but the official checkpoint has {value!r}; leave it out."
            )
    physical = shared_layers + (2 if middle else 0)
    depth = shared_layers * recursions + (2 if middle else 0)
    config = make_config(
        lambda: MoRConfig.from_backbone(
            source.config,
            source_layers=[0] * physical,
            num_hidden_layers=depth,
            **{**recipe.fields, **found},
        )
    )
    dtype = DTYPES[recipe.dtype] if recipe.dtype else common_dtype(weights)
    config.dtype = dtype
    tied = _tied(source, layout)
    config.tie_word_embeddings = tied
    targets, rows = _targets(weights, layout, config, recursions, DTYPES[recipe.dtype] if recipe.dtype else None, tied)
    model = empty_model(MoRForCausalLM, config)
    fresh = [t for t in fresh_buffers(model) if t.name not in {target.name for target in targets}]
    plan = ConversionPlan(
        source=source.name,
        backbone=config.backbone,
        source_depth=depth,
        recipe=recipe.to_dict() | found,
        layers=tuple(rows),
        dropped=(),
        unused=(),
        new={target.name: target.shape for target in fresh},
        before=full_depth_cost(config, dtype.itemsize),
        full=full_depth_cost(config, dtype.itemsize),
        expected=expected_cost(config, dtype.itemsize),
        bytes_per_value=dtype.itemsize,
        notes=("an official MoR checkpoint: its shared copies are equal and are stored once.",),
    )
    return Blueprint(model, plan, recipe, targets + fresh)


def _read_layout(weights: TensorSource) -> _Layout:
    token_choice = any(_BLOCK_LIST.match(name) for name in weights.infos)
    layout = _Layout(token_choice, {}, {}, {}, None, [])
    # safetensors may have dropped all copies but the first, while every recursion has a router
    blocks = sorted({int(m[1]) for pattern in (_BLOCK, _ROUTER) for m in map(pattern.match, weights.infos) if m})
    for name in weights.infos:
        if match := _BLOCK.match(name):
            layout.shared.setdefault((blocks.index(int(match[1])), int(match[2])), {})[match[3]] = name
        elif match := _BLOCK_LIST.match(name):
            layout.shared.setdefault((int(match[2]), int(match[3])), {})[match[4]] = name
        elif match := _PLAIN.match(name):
            layout.plain.setdefault(int(match[1]), {})[match[2]] = name
        elif match := _ROUTER.match(name):
            layout.routers[_GROUPS[match[2]], int(match[1]), match[3] or ""] = name
        elif _BIAS.match(name):
            layout.bias = name
        elif name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            layout.outer.append(name)
        elif not DERIVED.search(name):
            raise ConversionError(
                f"The tensor {name} is part of no known official MoR layout (expert or token choice, Middle-Cycle or "
                "Cycle); checkpoints with relaxation cannot be converted."
            )
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        if name not in layout.outer:
            raise ConversionError(f"The official checkpoint lacks {name}; it is incomplete.")
    if len(layout.plain) not in (0, 2):
        raise ConversionError(
            f"The official checkpoint has {len(layout.plain)} plain layers beside its blocks, but Middle-Cycle has 2 "
            "and Cycle none; it is incomplete."
        )
    return layout


def _recursions(weights: TensorSource, layout: _Layout) -> int:
    """N_r: expert choice has one router per recursion, token choice one logit."""
    copies = 1 + max(r for r, _ in layout.shared)
    routers = {layer for group, layer, _ in layout.routers if group == "routers"}
    if layout.token_choice:
        outputs = [weights.infos[name].shape[0] for (_, _, index), name in layout.routers.items() if index != "0"]
        return max([copies, *outputs])
    return max(copies, len(routers))


def _check_copies(weights: TensorSource, layout: _Layout, recursions: int, shared_layers: int) -> None:
    """All copies of a shared tensor must be equal; safetensors may hold only the first one."""
    for j in range(shared_layers):
        first = layout.shared.get((0, j))
        if not first:
            raise ConversionError(f"The official checkpoint lacks layer {j} of its first block; it is incomplete.")
        for r in range(1, recursions):
            for part, name in layout.shared.get((r, j), {}).items():
                if part not in first:
                    raise ConversionError(
                        f"The official checkpoint has {name}, but not its first copy; it is incomplete."
                    )
                if not weights.equal(name, first[part]):
                    what = "attention weights" if part.startswith("self_attn") else "weights"
                    raise ConversionError(
                        f"The {what} {first[part]} and {name} differ, but recursions must share them: the checkpoint "
                        "was trained with the untied-attention defect of the official code (its issue 17) and is no "
                        "MoR; train it again with the fixed code."
                    )


def _tied(source: SourceCheckpoint, layout: _Layout) -> bool:
    if "lm_head.weight" not in layout.outer:
        if not source.config.tie_word_embeddings:
            raise ConversionError("The weights lack lm_head.weight, and config.json does not tie it to the embedding.")
        return True
    return source.weights.equal("lm_head.weight", "model.embed_tokens.weight")


def _targets(
    weights: TensorSource, layout: _Layout, config: MoRConfig, recursions: int, dtype: torch.dtype | None, tied: bool
) -> tuple[list[TargetTensor], list[PlannedLayer]]:
    groups = []
    plain = sorted(layout.plain)
    if plain:
        groups.append(("prelude", layout.plain[plain[0]]))
    groups += [("shared", layout.shared[0, j]) for j in range(config.num_shared_layers)]
    if plain:
        groups.append(("coda", layout.plain[plain[1]]))
    parts = set(groups[0][1])
    targets, rows = [copy_of(weights, "model.embed_tokens.weight", "model.embed_tokens.weight", dtype)], []
    for layer, (role, names) in enumerate(groups):
        if set(names) != parts:
            odd = sorted(parts ^ set(names))[0]
            raise ConversionError(f"The official checkpoint has {odd} in some layers only; it is incomplete.")
        targets += [copy_of(weights, f"model.layers.{layer}.{part}", names[part], dtype) for part in names]
        positions = tuple(i for i, physical in enumerate(config.physical_layers) if physical == layer)
        part, name = next(iter(names.items()))
        rows.append(PlannedLayer(layer, role, (name.removesuffix(f".{part}"),), positions))
    targets.append(copy_of(weights, "model.norm.weight", "model.norm.weight", dtype))
    if not tied:
        targets.append(copy_of(weights, "lm_head.weight", "lm_head.weight", dtype))
    targets += _router_targets(weights, layout)
    if layout.bias:
        name = layout.bias
        shape = (len(config.recursive_blocks), recursions)
        targets.append(
            TargetTensor("model.balancing_bias", shape, torch.float32, lambda: weights.read(name).float().view(shape))
        )
    return targets, rows


def _router_targets(weights: TensorSource, layout: _Layout) -> list[TargetTensor]:
    """Stacks the routers of the recursions: (num_routers, out, in)."""
    stacks: dict[str, list[str]] = {}
    for group, _, index in layout.routers:
        # in an MLP the first matrix (index 0) widens, the second one (index 2) scores
        stacks.setdefault(f"model.{group}.{'expand_weight' if index == '0' else 'weight'}", [])
    for (group, _, index), name in sorted(layout.routers.items()):
        stacks[f"model.{group}.{'expand_weight' if index == '0' else 'weight'}"].append(name)
    targets = []
    for new_name, names in stacks.items():
        shape = (len(names), *weights.infos[names[0]].shape)
        targets.append(TargetTensor(new_name, shape, ROUTER_DTYPE, _stack(weights, names)))
    return targets


def _stack(weights: TensorSource, names: list[str]) -> Any:
    return lambda: torch.stack([weights.read(name) for name in names])
