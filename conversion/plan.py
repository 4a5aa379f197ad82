"""The plan of a conversion: what becomes what, what is new, what is lost, what it costs. Printed before anything is
written, and saved beside the weights as `varidepth_plan.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from ..analysis.cost import cost_summary, count_parameters, forward_flops, full_routing, kv_bytes
from ..configuration.configuration_mor import MoRConfig


@dataclass(frozen=True)
class PlannedLayer:
    """One physical layer of the new model.

    Attributes:
        layer: physical index, as in its parameter names.
        role: `prelude`, `shared` or `coda`.
        sources: where its weights come from: source layers (several are averaged), or names in a MoR source.
        positions: unrolled indices at which it is applied, which are its KV cache slots.
        attention: attention type, where the family has several.
        extra: unique only because the depth does not divide.
    """

    layer: int
    role: str
    sources: tuple[int | str, ...]
    positions: tuple[int, ...]
    attention: str | None = None
    extra: bool = False


@dataclass(frozen=True)
class PlannedCost:
    """Cost of one model.

    Attributes:
        parameters: all of them; shared and tied ones once.
        non_embedding: parameters without embedding and head.
        flops_per_token: FLOPs of one decode step behind `context` tokens, head included.
        kv_bytes_per_token: bytes of keys and values that one more token adds behind full windows.
        layers_per_token: decoder layers that a token runs.
        context: tokens in the cache.
    """

    parameters: int
    non_embedding: int
    flops_per_token: float
    kv_bytes_per_token: float
    layers_per_token: float
    context: int


@dataclass(frozen=True)
class ConversionPlan:
    """
    Attributes:
        source: name of the source.
        backbone: family.
        source_depth: its layers.
        recipe: the recipe, flat.
        layers: the new model's physical layers.
        dropped: source layers that the new model's depth has no place for (official dropping).
        unused: source layers whose weights are in no physical layer, because another layer takes their place.
        new: fresh tensors, name to shape.
        before: cost of the source.
        full: cost of the new model when every token runs every recursion, as after `router_init: on`.
        expected: cost when routing follows the capacities; equal to `full` without routing.
        bytes_per_value: of a stored key or value.
        notes: what the user should know before training or using the result.
    """

    source: str
    backbone: str
    source_depth: int
    recipe: dict[str, Any]
    layers: tuple[PlannedLayer, ...]
    dropped: tuple[int, ...]
    unused: tuple[int, ...]
    new: dict[str, tuple[int, ...]]
    before: PlannedCost
    full: PlannedCost
    expected: PlannedCost
    bytes_per_value: int
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {"format": 1, **asdict(self)}

    def table(self) -> str:
        """The plan as text for a terminal."""
        shown = ("to", "init", "num_recursions", "sharing", "routing", "router_init")
        head = ", ".join(f"{key} {self.recipe[key]}" for key in shown if key in self.recipe)
        lines = [f"{self.source} ({self.backbone}, {self.source_depth} layers): {head}", ""]
        rows: list[tuple[str, ...]] = [("layer", "role", "made of source layer", "applied at depth")]
        typed = any(layer.attention for layer in self.layers)
        for layer in self.layers:
            made = spans(layer.sources) if len(layer.sources) == 1 else f"mean of {spans(layer.sources)}"
            role = f"{layer.role} (extra)" if layer.extra else layer.role
            rows.append((str(layer.layer), role, made, spans(layer.positions)))
        if typed:
            rows = [
                (*row, "attention" if i == 0 else self.layers[i - 1].attention or "") for i, row in enumerate(rows)
            ]
        lines += format_columns(rows)
        lines.append("")
        if self.dropped:
            lines.append(f"dropped source layers: {spans(self.dropped)}")
        if self.unused:
            lines.append(f"source layers replaced by shared ones: {spans(self.unused)}")
        for name, shape in self.new.items():
            lines.append(f"new: {name} {list(shape)}")
        lines += [f"note: {note}" for note in self.notes]
        lines.append("")
        lines += self._cost_table()
        return "\n".join(lines)

    def _cost_table(self) -> list[str]:
        figures = [
            ("parameters", "parameters", 1.0),
            ("without embedding and head", "non_embedding", 1.0),
            ("layers per token", "layers_per_token", 1.0),
            (f"FLOPs per token at {self.before.context}", "flops_per_token", 1.0),
            ("KV bytes per token", "kv_bytes_per_token", 1.0),
        ]
        models = [("before", self.before), ("after, full depth", self.full)]
        if self.expected != self.full:
            models.append(("at the capacities", self.expected))
        rows = [("", *(name for name, _ in models))]
        for label, attribute, _ in figures:
            before = getattr(self.before, attribute)
            cells = [figure(before)]
            for _, cost in models[1:]:
                value = getattr(cost, attribute)
                cells.append(f"{figure(value)} ({value / before:.3f}x)" if before else figure(value))
            rows.append((label, *cells))
        return format_columns(rows)


def full_depth_cost(config: PreTrainedConfig, bytes_per_value: int, context: int = 1024) -> PlannedCost:
    """Cost of a vanilla model, or of a MoR in which every token runs every recursion (its routers still count)."""
    behind_windows = max(context, getattr(config, "sliding_window", None) or 0)
    held = [kv_bytes(config, full_routing(config, 1, behind_windows + i), bytes_per_value) for i in (0, 1)]
    flops = forward_flops(config, full_routing(config, 1, context), logits=1).total
    return _cost(config, flops, held[1] - held[0], config.num_hidden_layers, context)


def expected_cost(config: MoRConfig, bytes_per_value: int, context: int = 1024) -> PlannedCost:
    """Cost when routing follows the capacities (or balances the depths) exactly."""
    summary = cost_summary(config, context=context, bytes_per_value=bytes_per_value)
    return _cost(config, summary.flops_per_token, summary.kv_bytes_per_token, summary.mean_layers, context)


def _cost(config: PreTrainedConfig, flops: float, kv: float, layers: float, context: int) -> PlannedCost:
    count = count_parameters(config)
    inner = count.layers + count.final_norm + count.routers
    return PlannedCost(count.embedding + count.head + inner, inner, flops, kv, layers, context)


def figure(value: float) -> str:
    """A number for people: 134.52M, 57.8k, 30."""
    if value >= 1e5:
        for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= size:
                return f"{value / size:.2f}{unit}"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def spans(values: tuple[int | str, ...]) -> str:
    """Indices or names in a line, `0-3, 7`: runs of three or more as a span."""
    parts: list[str] = []
    i = 0
    while i < len(values):
        j = i
        while j + 1 < len(values) and isinstance(values[j], int) and values[j + 1] == values[j] + 1:  # type: ignore[operator]
            j += 1
        parts += [f"{values[i]}-{values[j]}"] if j - i > 1 else [str(value) for value in values[i : j + 1]]
        i = j + 1
    return ", ".join(parts)


def format_columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines of aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def attention_types(config: PreTrainedConfig | MoRConfig, depth: int) -> list[str | None]:
    """Attention type of each layer where the family has several; `nope` marks layers without rotary embedding."""
    types: list[str | None] = list(getattr(config, "layer_types", None) or [None] * depth)
    rotary = getattr(config, "no_rope_layers", None)
    if rotary and not all(rotary):
        types = [
            f"{kind or 'full_attention'}{'' if uses else ', nope'}" for kind, uses in zip(types, rotary, strict=True)
        ]
    if len(set(types)) == 1:
        return [None] * depth
    return types


def differing_types(sources: Mapping[int, tuple[int, ...]], types: list[str | None]) -> list[int]:
    """Physical layers whose averaged source layers have different attention types."""
    return [layer for layer, group in sources.items() if len({types[i] for i in group}) > 1]
