"""What the benchmarks share: models of one shape with random weights, timed in one process and in turns.

The turns are in a new random order each time, so that neither a slow moment of the machine nor what the one before
left in its caches favours anyone.
"""

import argparse
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from varidepth.modeling.cache_naming import CACHE


# SmolLM2-135M
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
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 3


def make(architecture: Any, config: Any) -> Any:
    """A model in eval mode with fixed random weights and sdpa attention; the same ones for the same depth."""
    torch.manual_seed(0)
    return architecture._from_config(config, attn_implementation="sdpa").eval()


def vanilla() -> Any:
    """Llama of the shape."""
    return make(LlamaForCausalLM, LlamaConfig(num_hidden_layers=LAYERS, **SHAPE))


def random_ids(tokens: int, seed: int = 1) -> torch.Tensor:
    """Token ids of shape `(1, tokens)`, the same ones for everybody."""
    return torch.randint(3, SHAPE["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def filled_cache(model: Any, past: int) -> Any:
    """The model's cache behind a prompt of `past` tokens."""
    cache = DynamicCache(config=model.config)
    model(random_ids(past), use_cache=True, logits_to_keep=1, **{CACHE: cache})
    return cache


@torch.no_grad()
def take_turns(
    runs: list[Callable[[int], Any]], steps: int, clock: Callable[[], float], warm_up: int = WARM_UP
) -> list[list[float]]:
    """Seconds of each call of each run, which gets the number of the step; the first `warm_up` steps do not count."""
    order = random.Random(0)
    seconds: list[list[float]] = [[] for _ in runs]
    for step in range(warm_up + steps):
        for i in order.sample(range(len(runs)), len(runs)):
            start = clock()
            runs[i](step)
            elapsed = clock() - start
            if step >= warm_up:
                seconds[i].append(elapsed)
    return seconds


def machine() -> str:
    """The machine, its load and the versions, in a sentence."""
    cpu = platform.processor() or platform.machine()
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    except OSError:
        pass
    load = f"load {os.getloadavg()[0]:.1f} before the run, " if hasattr(os, "getloadavg") else ""
    return (
        f"{cpu}, {os.cpu_count()} CPUs, {load}{torch.get_num_threads()} threads, fp32, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def parse_arguments(description: str, steps: int, past: list[int]) -> argparse.Namespace:
    """The command line of every timing script; sets the threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help=f"timed calls per model (default: {steps})")
    parser.add_argument("--past", type=int, nargs="+", default=past, help="tokens in the cache before, or in the row")
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
    return args


def publish(script: str, lines: list[str], write: bool) -> None:
    """Prints the report and how it was made; with `write` it also becomes `<script>.md`."""
    # names of files, not where they lie on this machine
    words = [Path(word).name if os.sep in word and Path(word).exists() else word for word in sys.argv[1:]]
    made_by = shlex.join(["python", f"benchmarks/{Path(script).name}", *words])
    report = "\n".join([*lines, "", f"Made by `{made_by}`."]) + "\n"
    print(report)
    if write:
        target = Path(script).with_suffix(".md")
        unfinished = target.with_suffix(".md.partial")
        unfinished.write_text(report, encoding="utf-8")
        unfinished.replace(target)
