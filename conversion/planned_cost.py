"""What a model costs, as plans and descriptions show it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from ..analysis.cost import cost_summary, count_parameters, forward_flops, full_routing, kv_bytes
from ..analysis.recurrent_state import state_bytes
from ..configuration.configuration_jrt import JRTConfig
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
        recursions: parameters that the recursions of a MoR have of their own.
    """

    parameters: int
    non_embedding: int
    flops_per_token: float
    kv_bytes_per_token: float
    layers_per_token: float
    context: int
    recursions: int = 0

    def figures(self, dtype: str = "") -> dict[str, float]:
        """Label and value of each row of a table; `dtype` is the name of the stored type."""
        own = {"of these of each recursion's own": self.recursions} if self.recursions else {}
        return {
            "parameters": self.parameters,
            "without embedding and head": self.non_embedding,
            **own,
            "layers per token": self.layers_per_token,
            f"FLOPs per token at {self.context}": self.flops_per_token,
            f"KV bytes per token{dtype}": self.kv_bytes_per_token,
        }


@dataclass(frozen=True)
class RecurrentCost:
    """Cost of a model whose memory does not grow with the sequence.

    Attributes:
        parameters: all of them; tied ones once.
        non_embedding: parameters without embedding and head.
        state_bytes: of one sequence that is longer than the window.
        flops_per_token: FLOPs of one decode step behind a window, head included.
    """

    parameters: int
    non_embedding: int
    state_bytes: int
    flops_per_token: float

    def figures(self, dtype: str = "") -> dict[str, float]:
        """As in `PlannedCost`."""
        return {
            "parameters": self.parameters,
            "without embedding and head": self.non_embedding,
            "FLOPs per token": self.flops_per_token,
            f"state bytes per sequence{dtype}": self.state_bytes,
        }


def recurrent_cost(config: JRTConfig, bytes_per_value: int) -> RecurrentCost:
    """Cost of a JRT-RNN."""
    count = count_parameters(config)
    flops = forward_flops(config, full_routing(config, 1, config.sliding_window), logits=1).total
    return RecurrentCost(count.total, count.non_embedding, state_bytes(config, bytes_per_value).total, flops)


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
    return PlannedCost(count.total, count.non_embedding, flops, kv, layers, context, count.recursions)


def cost_rows(
    models: Sequence[tuple[str, PlannedCost | RecurrentCost]], dtype: str = "", *, ratios: bool = False
) -> list[tuple]:
    """Rows of a table with a column for each model.

    Args:
        models: name and cost, all of one kind.
        dtype: what stands behind the name of the row whose bytes depend on the stored type.
        ratios: show the later models as multiples of the first, too.
    """
    rows: list[tuple] = [("", *(name for name, _ in models))]
    columns = [cost.figures(dtype) for _, cost in models]
    for label in columns[-1]:
        values = [column.get(label, 0) for column in columns]
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
