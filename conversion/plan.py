"""The plan of a conversion: what becomes what, what is new, what is lost, what it costs. Printed before anything is
written, and saved beside the weights as `varidepth_plan.json`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from .layer_redundancy import LayerRedundancy
from .planned_cost import PlannedCost, RecurrentCost, cost_rows, format_columns


@dataclass(frozen=True)
class PlannedLayer:
    """One physical layer of the new model.

    Attributes:
        layer: physical index, as in its parameter names.
        role: see `layer_roles`.
        sources: where its weights come from: source layers (several are averaged), or names in an official source.
        positions: unrolled indices at which it is applied, which are its KV cache slots.
        attention: attention type, where the family has several.
        extra: unique only because the depth does not divide.
        unit: what of a routed layer a token can pass by: `block`, `attention` or `mlp`.
        capacity: share of the tokens that a routed layer takes.
    """

    layer: int
    role: str
    sources: tuple[int | str, ...]
    positions: tuple[int, ...]
    attention: str | None = None
    extra: bool = False
    unit: str | None = None
    capacity: float | None = None


@dataclass(frozen=True)
class ConversionPlan:
    """
    Attributes:
        source: name of the source.
        backbone: family, or what the source is where it has none.
        source_depth: its layers.
        recipe: the recipe, flat.
        layers: the new model's physical layers.
        dropped: source layers that the new model's depth has no place for (official dropping).
        unused: source layers whose weights are in no physical layer, because another layer takes their place.
        new: fresh tensors, name to shape.
        before: cost of the source.
        full: cost of the new model when every token runs everything, as after `router_init: on`.
        expected: cost when routing follows the capacities; equal to `full` without routing.
        bytes_per_value: of a stored key or value.
        notes: what the user should know before training or using the result.
        redundancy: the measurement by which `routed_layers: auto` chose.
    """

    source: str
    backbone: str
    source_depth: int
    recipe: dict[str, Any]
    layers: tuple[PlannedLayer, ...]
    dropped: tuple[int, ...]
    unused: tuple[int, ...]
    new: dict[str, tuple[int, ...]]
    before: PlannedCost | RecurrentCost
    full: PlannedCost | RecurrentCost
    expected: PlannedCost | RecurrentCost
    bytes_per_value: int
    notes: tuple[str, ...] = field(default=())
    redundancy: LayerRedundancy | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {"format": 1, **asdict(self)}

    def table(self) -> str:
        """The plan as text for a terminal."""
        head = ", ".join(f"{key} {self.recipe[key]}" for key in _SHOWN if key in self.recipe)
        lines = [f"{self.source} ({self.backbone}, {self.source_depth} layers): {head}", ""]
        lines += format_columns(list(zip(*self._columns(), strict=True)))
        lines.append("")
        if self.dropped:
            lines.append(f"dropped source layers: {spans(self.dropped)}")
        if self.unused:
            lines.append(f"source layers replaced by shared ones: {spans(self.unused)}")
        for name, shape in self.new.items():
            lines.append(f"new: {name} {list(shape)}")
        lines += [f"note: {note}" for note in self.notes]
        lines.append("")
        models = [("before", self.before), ("after, full depth", self.full)]
        if self.before == self.full:
            models = [("before and after", self.full)]
        if self.expected != self.full:
            models.append(("at the capacities", self.expected))
        lines += format_columns(cost_rows(models, ratios=True))
        return "\n".join(lines)

    def _columns(self) -> list[tuple[str, ...]]:
        """The columns of the table of layers, heading first; those that say nothing of any layer are left out."""
        layers = self.layers
        made = [spans(x.sources) if len(x.sources) == 1 else f"mean of {spans(x.sources)}" for x in layers]
        increases = self.redundancy.loss_increases if self.redundancy else [None] * len(layers)
        columns = [
            ("layer", *(str(x.layer) for x in layers)),
            ("role", *(f"{x.role} (extra)" if x.extra else x.role for x in layers)),
        ]
        if any(x.sources != (x.layer,) for x in layers):
            columns.append(("made of source layer", *made))
        if any(x.positions != (x.layer,) for x in layers):
            columns.append(("applied at depth", *(spans(x.positions) for x in layers)))
        columns += [
            ("unit", *(x.unit or "" for x in layers)),
            ("capacity", *("" if x.capacity is None else f"{x.capacity:g}" for x in layers)),
            ("loss increase", *("" if value is None else f"{value:+.4f}" for value in increases)),
            ("attention", *(x.attention or "" for x in layers)),
        ]
        return [column for column in columns if any(column[1:])]


_SHOWN = """
    to init num_recursions sharing recursion_rank recursion_norms routing routing_unit gate router_init
    prefix_length short_prompt sliding_window
""".split()


def layer_roles(config: Any) -> list[str]:
    """Role of each physical layer: `prelude`, `shared` or `coda` in a MoR, `dense` or `routed` in a MoD, the mixer in
    a JRT-RNN."""
    if config.model_type == "jrt":
        return list(config.layer_types)
    if config.model_type == "mod":
        routed = {slot for routed_pass in config.routed_passes if not routed_pass.always for slot in routed_pass.slots}
        return ["routed" if layer in routed else "dense" for layer in range(config.num_hidden_layers)]
    unique = ["prelude"] * config.prelude_layers, ["coda"] * config.coda_layers
    return [*unique[0], *["shared"] * config.num_shared_layers, *unique[1]]


def spans(values: Sequence[int | str]) -> str:
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


def attention_types(config: PreTrainedConfig, depth: int) -> list[str | None]:
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
