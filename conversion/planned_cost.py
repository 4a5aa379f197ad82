"""What a model costs, as plans and descriptions show it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from ..analysis.cost import cost_summary, count_parameters, forward_flops, full_routing, kv_bytes
from ..configuration.routed_config import RoutedConfig


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


def full_depth_cost(config: PreTrainedConfig, bytes_per_value: int, context: int = 1024) -> PlannedCost:
    """Cost of a vanilla model, or of one in which every token enters every pass (its routers still count)."""
    behind_windows = max(context, getattr(config, "sliding_window", None) or 0)
    held = [kv_bytes(config, full_routing(config, 1, behind_windows + i), bytes_per_value) for i in (0, 1)]
    flops = forward_flops(config, full_routing(config, 1, context), logits=1).total
    return _cost(config, flops, held[1] - held[0], config.num_hidden_layers, context)


def expected_cost(config: RoutedConfig, bytes_per_value: int, context: int = 1024) -> PlannedCost:
    """Cost when routing follows the capacities (or balances the depths) exactly."""
    summary = cost_summary(config, context=context, bytes_per_value=bytes_per_value)
    return _cost(config, summary.flops_per_token, summary.kv_bytes_per_token, summary.mean_layers, context)


def _cost(config: Any, flops: float, kv: float, layers: float, context: int) -> PlannedCost:
    count = count_parameters(config)
    inner = count.layers + count.final_norm + count.routers
    return PlannedCost(count.embedding + count.head + inner, inner, flops, kv, layers, context)


def cost_rows(models: Sequence[tuple[str, PlannedCost]], kv_note: str = "", *, ratios: bool = False) -> list[tuple]:
    """Rows of a table with a column for each model.

    Args:
        models: name and cost.
        kv_note: what stands behind the name of the row of KV bytes.
        ratios: show the later models as multiples of the first, too.
    """
    rows: list[tuple] = [("", *(name for name, _ in models))]
    for label, attribute in (
        ("parameters", "parameters"),
        ("without embedding and head", "non_embedding"),
        ("layers per token", "layers_per_token"),
        (f"FLOPs per token at {models[0][1].context}", "flops_per_token"),
        (f"KV bytes per token{kv_note}", "kv_bytes_per_token"),
    ):
        values = [getattr(cost, attribute) for _, cost in models]
        cells = [figure(value) for value in values]
        if ratios and values[0]:
            cells[1:] = [f"{figure(value)} ({value / values[0]:.3f}x)" for value in values[1:]]
        rows.append((label, *cells))
    return rows


def figure(value: float) -> str:
    """A number for people: 134.52M, 57.8k, 30."""
    if value >= 1e5:
        for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= size:
                return f"{value / size:.2f}{unit}"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def format_columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines of aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
