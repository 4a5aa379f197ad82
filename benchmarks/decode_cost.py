"""What routing costs per token: decoding at batch 1 against the vanilla model's time for the layers that run.

    python benchmarks/decode_cost.py [--steps 40] [--past 200 1000] [--threads 2] [--clock wall] [--write]

A 30-layer model of SmolLM2-135M's shape with random weights is timed as vanilla Llama and as MoR with two recursions,
all in one process and in turns, in a new random order each time, so that neither a slow moment of the machine nor what
the one before left in its caches favours anyone. Times are medians over decode steps; a second copy of vanilla shows
how far apart equal work comes out. The yardstick of a row is vanilla's own time (both copies together) for the head
and as many layers as the row runs: head + (vanilla - head) * layers / 30.
"""

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from varidepth import MoRConfig, MoRForCausalLM
from varidepth.analysis.cost import RowRouting, forward_flops, full_routing


SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "max_position_embeddings": 8192,
}
LAYERS = 30
ALL_TARGET, HALF_TARGET = 1.05, 1.10
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Contender:
    """One row of the table.

    Attributes:
        name: as printed.
        model: the model.
        layers: layers that a decode step runs.
        passes: (block, recursion) passes that a token enters, for the accountant.
        limit: largest ratio to the yardstick that is a success.
    """

    name: str
    model: Any
    layers: int
    passes: tuple[int, ...] = ()
    limit: float | None = None


def contenders() -> list[Contender]:
    """The models; those of the same depth have the same random weights."""
    vanilla = make(LlamaForCausalLM, LlamaConfig(num_hidden_layers=LAYERS, **SHAPE))
    plain = routed(routing="none")
    opened = routed(capacities=[1.0, 0.5], biases=(20.0, 20.0))
    half = routed(capacities=[1.0, 0.5], biases=(20.0, -20.0))
    none = routed(capacities=[0.9, 0.5], biases=(-20.0, -20.0))
    block = (LAYERS - 2) // 2
    return [
        Contender("vanilla", vanilla, LAYERS),
        Contender("vanilla, second copy", make(LlamaForCausalLM, vanilla.config), LAYERS),
        Contender("MoR, no router", plain, LAYERS, (), ALL_TARGET),
        Contender("MoR, all active", opened, LAYERS, (1, 1), ALL_TARGET),
        Contender("MoR, recursion 2 skipped", half, 2 + block, (1, 0), HALF_TARGET),
        Contender("MoR, both skipped", none, 2, (0, 0)),
    ]


def make(architecture: Any, config: Any) -> Any:
    """A model in eval mode with fixed random weights and sdpa attention."""
    torch.manual_seed(0)
    return architecture._from_config(config, attn_implementation="sdpa").eval()


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


@torch.no_grad()
def filled_cache(model: Any, past: int) -> Any:
    """The model's cache behind a prompt of `past` tokens."""
    torch.manual_seed(1)
    ids = torch.randint(3, SHAPE["vocab_size"], (1, past))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def measure(
    rows: list[Contender], past: int, steps: int, clock: Callable[[], float], warm_up: int = 3
) -> tuple[list[list[float]], list[float]]:
    """Seconds of each decode step per contender, and of vanilla's head; all take turns, in a random order."""
    order = random.Random(0)
    token, hidden = torch.tensor([[7]]), torch.randn(1, 1, SHAPE["hidden_size"])
    runs: list[Callable[[], Any]] = []
    for row in rows:
        arguments = {"past_key_values": filled_cache(row.model, past), "use_cache": True, "logits_to_keep": 1}
        runs.append(partial(row.model, token, **arguments))
    runs.append(partial(rows[0].model.lm_head, hidden))
    seconds: list[list[float]] = [[] for _ in runs]
    for step in range(steps + warm_up):
        for i in order.sample(range(len(runs)), len(runs)):
            start = clock()
            runs[i]()
            elapsed = clock() - start
            if step >= warm_up:
                seconds[i].append(elapsed)
    return seconds[:-1], seconds[-1]


def table(rows: list[Contender], seconds: list[list[float]], head_seconds: list[float], past: int) -> list[str]:
    """Markdown lines."""
    medians, head = [statistics.median(times) for times in seconds], statistics.median(head_seconds)
    whole = statistics.median([*seconds[0], *seconds[1]])
    vanilla = rows[0].model.config
    vanilla_flops = forward_flops(vanilla, full_routing(vanilla, 1, past), logits=1).total
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


def machine() -> str:
    """The machine and the versions, in a sentence."""
    cpu = platform.processor() or platform.machine()
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    except OSError:
        pass
    return (
        f"{cpu}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, fp32, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="decode steps per model (default: 40)")
    parser.add_argument("--past", type=int, nargs="+", default=[200, 1000], help="tokens in the cache before")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu time ignores other processes; use it with --threads 1"
    )
    parser.add_argument("--write", action="store_true", help="write the report beside this script")
    args = parser.parse_args()
    if args.steps < 1 or min(args.past) < 1:
        parser.error("--steps and --past must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = contenders()
    lines = [
        "# Decode cost at batch 1",
        "",
        "Time per token of MoR (SmolLM2-135M's shape, 2 recursions, random weights) against vanilla Llama's time for "
        "the head and the layers that run. Made by `python benchmarks/decode_cost.py --write`.",
        "",
        f"Machine: {machine()}. Medians of {args.steps} interleaved steps, {args.clock} time.",
    ]
    for past in args.past:
        lines += ["", *table(rows, *measure(rows, past, args.steps, CLOCKS[args.clock]), past)]
    report = "\n".join(lines) + "\n"
    print(report)
    if args.write:
        target = Path(__file__).with_suffix(".md")
        unfinished = target.with_suffix(".md.partial")
        unfinished.write_text(report, encoding="utf-8")
        unfinished.replace(target)


if __name__ == "__main__":
    main()
