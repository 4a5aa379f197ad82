"""What routing costs per token: decoding at batch 1 against the vanilla model's time for the layers that run.

    python benchmarks/decode_cost.py [--steps 40] [--past 200 1000] [--threads 2] [--clock wall] [--write]

A 30-layer model of SmolLM2-135M's shape with random weights is timed as vanilla Llama and as MoR with two recursions,
all in one process and in turns (see `interleaved.py`). Times are medians over decode steps; a second copy of vanilla
shows how far apart equal work comes out. The yardstick of a row is vanilla's own time (both copies together) for the
head and as many layers as the row runs: head + (vanilla - head) * layers / 30.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from interleaved import (
    CLOCKS,
    LAYERS,
    SHAPE,
    filled_cache,
    machine,
    make,
    parse_arguments,
    publish,
    take_turns,
    vanilla,
)

from varidepth import MoRConfig, MoRForCausalLM
from varidepth.analysis.cost import RowRouting, forward_flops, full_routing
from varidepth.modeling.cache_naming import CACHE


ALL_TARGET, HALF_TARGET = 1.05, 1.10


@dataclass
class Contender:
    """One row of the table.

    Attributes:
        name: as printed.
        model: the model.
        layers: layers that a decode step runs.
        passes: 1 for each pass that a token enters, 0 for the others; empty where it enters all.
        limit: largest ratio to the yardstick that is a success.
    """

    name: str
    model: Any
    layers: int
    passes: tuple[int, ...] = ()
    limit: float | None = None


def contenders() -> list[Contender]:
    """The models; those of the same depth have the same random weights."""
    plain = routed(routing="none")
    opened = routed(capacities=[1.0, 0.5], biases=(20.0, 20.0))
    half = routed(capacities=[1.0, 0.5], biases=(20.0, -20.0))
    none = routed(capacities=[0.9, 0.5], biases=(-20.0, -20.0))
    block = (LAYERS - 2) // 2
    return [
        Contender("vanilla", vanilla(), LAYERS),
        Contender("vanilla, second copy", vanilla(), LAYERS),
        Contender("MoR, no router", plain, LAYERS, (), ALL_TARGET),
        Contender("MoR, all active", opened, LAYERS, (1, 1), ALL_TARGET),
        Contender("MoR, recursion 2 skipped", half, 2 + block, (1, 0), HALF_TARGET),
        Contender("MoR, both skipped", none, 2, (0, 0)),
    ]


def routed(biases: tuple[float, float] | None = None, **fields: Any) -> Any:
    """MoR with two recursions of 14 layers whose routers always decide as `biases` say."""
    extra = {"router_bias": True, "gating": "interpolate"} if biases else {}
    config = MoRConfig(num_hidden_layers=LAYERS, num_recursions=2, **SHAPE, **fields, **extra)
    model = make(MoRForCausalLM, config)
    if biases:
        with torch.no_grad():
            model.model.routers.weight.zero_()
            model.model.routers.bias.copy_(torch.tensor(biases)[:, None])
    return model


def measure(
    rows: list[Contender], past: int, steps: int, clock: Callable[[], float]
) -> tuple[list[list[float]], list[float]]:
    """Seconds of each decode step per contender, and of vanilla's head."""
    token, hidden = torch.tensor([[7]]), torch.randn(1, 1, SHAPE["hidden_size"])
    runs = [_decoding(row.model, token, past) for row in rows]
    runs.append(lambda step: rows[0].model.lm_head(hidden))
    seconds = take_turns(runs, steps, clock)
    return seconds[:-1], seconds[-1]


def _decoding(model: Any, token: torch.Tensor, past: int) -> Callable[[int], Any]:
    cache = filled_cache(model, past)
    return lambda step: model(token, use_cache=True, logits_to_keep=1, **{CACHE: cache})


def table(rows: list[Contender], seconds: list[list[float]], head_seconds: list[float], past: int) -> list[str]:
    """Markdown lines."""
    medians, head = [statistics.median(times) for times in seconds], statistics.median(head_seconds)
    whole = statistics.median([*seconds[0], *seconds[1]])
    dense = rows[0].model.config
    vanilla_flops = forward_flops(dense, full_routing(dense, 1, past), logits=1).total
    lines = [
        f"Behind {past} tokens; the head alone takes {1000 * head:.1f} ms.",
        "",
        "| model | ms per token | / vanilla | matrix products / vanilla | / (head + executed layers) | target |",
        "|---|---|---|---|---|---|",
    ]
    for row, median in zip(rows, medians, strict=True):
        ratio = median / (head + (whole - head) * row.layers / LAYERS)
        config = row.model.config
        # earlier tokens were routed like this one
        stored = tuple(past * entered for entered in row.passes)
        routing = RowRouting(1, row.passes, past, stored) if row.passes else full_routing(config, 1, past)
        cells = [
            row.name,
            f"{1000 * median:.1f}",
            f"{median / whole:.3f}",
            f"{forward_flops(config, routing, logits=1).total / vanilla_flops:.3f}",
            f"{ratio:.3f}",
            "" if row.limit is None else f"<= {row.limit:.2f}: {'met' if ratio <= row.limit else 'missed'}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    args = parse_arguments((__doc__ or "").partition("\n")[0], steps=40, past=[200, 1000])
    rows = contenders()
    lines = [
        "# Decode cost at batch 1",
        "",
        "Time per token of MoR (SmolLM2-135M's shape, 2 recursions, random weights) against vanilla Llama's time for "
        "the head and the layers that run.",
        "",
        f"Machine: {machine()}. Medians of {args.steps} interleaved steps, {args.clock} time.",
    ]
    for past in args.past:
        lines += ["", *table(rows, *measure(rows, past, args.steps, CLOCKS[args.clock]), past)]
    publish(__file__, lines, args.write)


if __name__ == "__main__":
    main()
