"""What passing by layers saves: decoding and prefill at batch 1 against vanilla, beside the accountant's limit.

    python benchmarks/mod_speed.py [--steps 40] [--past 200 1000] [--threads 2] [--clock wall] [--write]

A 30-layer model of SmolLM2-135M's shape with random weights is timed as vanilla Llama and as MoD, all in one process
and in turns (see `interleaved.py`); a second copy of vanilla shows how far apart equal work comes out. The routers'
thresholds are set so that the wanted share of random tokens enters, and what entered in the timed calls is what the
accountant counts. A decode step is mostly a walk through the weights, so its limit is the share of the weights that
are read; that of a prefill, which has a fifth of the timed calls, is the share of the matrix products.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from interleaved import (
    CLOCKS,
    LAYERS,
    SHAPE,
    WARM_UP,
    filled_cache,
    machine,
    make,
    parse_arguments,
    publish,
    random_ids,
    take_turns,
    vanilla,
)

from varidepth import MoDConfig, MoDForCausalLM
from varidepth.analysis.cost import RowRouting, forward_flops, full_routing
from varidepth.analysis.counts import FlopCount
from varidepth.analysis.routing_statistics import measured_routing
from varidepth.modeling.cache_naming import CACHE


FITTING_TOKENS, FITTING_ROUNDS = 512, 4


@dataclass
class Contender:
    """One row of the tables."""

    name: str
    model: Any

    @property
    def routes(self) -> bool:
        return hasattr(self.model.config, "routed_passes")


def contenders() -> list[Contender]:
    """The models; all have the same random weights."""
    every = list(range(LAYERS))
    return [
        Contender("vanilla", vanilla()),
        Contender("vanilla, second copy", vanilla()),
        Contender("MoD, attention, all enter", routed(1.0, every, "attention")),
        Contender("MoD, attention, 25 % skip", routed(0.75, every, "attention")),
        Contender("MoD, attention, 50 % skip", routed(0.5, every, "attention")),
        Contender("MoD, every other block, 12.5 % enter", routed(0.125, None, "block")),
    ]


@torch.no_grad()
def routed(share: float, layers: list[int] | None, unit: str) -> Any:
    """A MoD whose causal rule lets a share of random tokens into each routed layer."""
    config = MoDConfig(
        num_hidden_layers=LAYERS,
        routed_layers=layers,
        routing_unit=unit,
        gate="straight_through",
        capacity=min(share, 0.999),
        **SHAPE,
    )
    model = make(MoDForCausalLM, config)
    thresholds = torch.zeros(config.num_routers)
    # each layer's scores depend on who entered the layers before
    for _ in range(FITTING_ROUNDS if share < 1 else 1):
        config.router_thresholds = thresholds.tolist()
        logits = model(random_ids(FITTING_TOKENS), use_cache=False, output_routing=True).decision_logits[0]
        thresholds = logits.quantile(1 - share, dim=0).sigmoid()
    config.router_thresholds = thresholds.tolist() if share < 1 else [0.0] * config.num_routers
    return model


def decoding(row: Contender, past: int, ids: torch.Tensor) -> Callable[[int], Any]:
    """One step: the next of `ids`, behind `past` tokens and the ids before."""
    call = partial(row.model, use_cache=True, logits_to_keep=1, **{CACHE: filled_cache(row.model, past)})
    return lambda step: call(ids[:, step : step + 1])


def prefill(row: Contender, tokens: int) -> Callable[[int], Any]:
    """One call over a row of `tokens`, into an empty cache."""
    ids = random_ids(tokens)
    return lambda step: row.model(ids, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def decode_routings(row: Contender, past: int, ids: torch.Tensor) -> list[RowRouting]:
    """What enters in the timed steps."""
    config = row.model.config
    if not row.routes:
        return [full_routing(config, 1, past + step) for step in range(WARM_UP, ids.shape[1])]
    output = row.model(random_ids(past), use_cache=True, output_routing=True, logits_to_keep=1)
    routings = measured_routing(output)
    for step in range(ids.shape[1]):
        cache = output.cache
        output = row.model(ids[:, step : step + 1], cache=cache, use_cache=True, output_routing=True)
        routings += measured_routing(output, routings[-1:])
    return routings[1 + WARM_UP :]


@torch.no_grad()
def prefill_routings(row: Contender, tokens: int) -> list[RowRouting]:
    """What enters in a timed call."""
    if not row.routes:
        return [full_routing(row.model.config, tokens)]
    return measured_routing(row.model(random_ids(tokens), use_cache=False, output_routing=True, logits_to_keep=1))


def table(
    rows: list[Contender], seconds: list[list[float]], routings: list[list[RowRouting]], title: str, decodes: bool
) -> list[str]:
    """Markdown lines."""
    whole = statistics.median([*seconds[0], *seconds[1]])
    flops = [mean_flops(row.model.config, seen) for row, seen in zip(rows, routings, strict=True)]
    columns = ["model", "entered", "ms", "time / vanilla", "matrix products / vanilla", "weights read / vanilla"]
    columns = columns if decodes else columns[:-1]
    lines = [title, "", f"| {' | '.join([*columns, 'time / limit'])} |", f"|{'---|' * (len(columns) + 1)}"]
    for row, times, seen, count in zip(rows, seconds, routings, flops, strict=True):
        ratio = statistics.median(times) / whole
        limits = [count.total / flops[0].total]
        if decodes:
            # at one token per call a weight that is read is in one product
            limits.append((count.total - count.attention) / (flops[0].total - flops[0].attention))
        entered = sum(sum(one.entered) for one in seen)
        possible = sum(len(one.entered) * one.tokens for one in seen)
        cells = [
            row.name,
            f"{100 * entered / possible:.1f} %" if row.routes else "",
            f"{1000 * statistics.median(times):.1f}",
            f"{ratio:.3f}",
            *(f"{limit:.3f}" for limit in limits),
            f"{ratio / limits[-1]:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def mean_flops(config: Any, routings: list[RowRouting]) -> FlopCount:
    """Of one call."""
    counts = [forward_flops(config, routing, logits=1) for routing in routings]
    return FlopCount(*(statistics.fmean(getattr(count, part) for count in counts) for part in vars(counts[0])))


def main() -> None:
    args = parse_arguments((__doc__ or "").partition("\n")[0], steps=40, past=[200, 1000])
    clock, prefills = CLOCKS[args.clock], max(args.steps // 5, 1)
    host = machine()
    rows = contenders()
    ids = random_ids(WARM_UP + args.steps, seed=2)
    lines = [
        "# Speed of MoD at batch 1",
        "",
        "Decoding and prefill of MoD (SmolLM2-135M's shape, random weights) against vanilla Llama. `entered` is the "
        "share of routed layers that the tokens of the timed calls entered, from which the accountant's figures "
        "follow; `limit` is the weights read in decoding, and the matrix products in prefill.",
        "",
        f"Machine: {host}. Medians of {args.steps} interleaved decode steps and {prefills} prefills, {args.clock} "
        "time.",
    ]
    for past in args.past:
        seconds = take_turns([decoding(row, past, ids) for row in rows], args.steps, clock)
        routings = [decode_routings(row, past, ids) for row in rows]
        lines += ["", *table(rows, seconds, routings, f"Decoding behind {past} tokens.", decodes=True)]
    for tokens in args.past:
        seconds = take_turns([prefill(row, tokens) for row in rows], prefills, clock, warm_up=1)
        routings = [prefill_routings(row, tokens) for row in rows]
        lines += ["", *table(rows, seconds, routings, f"Prefill of {tokens} tokens.", decodes=False)]
    publish(__file__, lines, args.write)


if __name__ == "__main__":
    main()
