"""Decoding of JRT-RNN behind contexts of growing length: time per token and bytes that are kept.

The layout of the 360M model at a quarter of its width (head size 64 as there), random weights, batch 1. The context is
read in calls of at most 2048 tokens, whose time per token is shown too.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from interleaved import CLOCKS, machine, publish, random_ids, take_turns
from transformers import DynamicCache

from varidepth import JRTConfig, JRTForCausalLM
from varidepth.analysis.recurrent_state import state_bytes


PREFILL_TOKENS = 2048


def make_model() -> JRTForCausalLM:
    torch.manual_seed(0)
    config = JRTConfig.preset("360m", hidden_size=256, intermediate_size=512, num_attention_heads=4)
    return JRTForCausalLM(config).eval()


@torch.no_grad()
def read(model: JRTForCausalLM, tokens: int, clock: str) -> tuple[DynamicCache, float]:
    """The cache behind a context, and the seconds that it took."""
    cache, ids = DynamicCache(config=model.config), random_ids(tokens)
    start = CLOCKS[clock]()
    for part in ids.split(PREFILL_TOKENS, dim=1):
        model(part, cache=cache, logits_to_keep=1)
    return cache, CLOCKS[clock]() - start


def stored_bytes(cache: DynamicCache) -> int:
    """Bytes of everything that the cache holds."""
    found: dict[int, torch.Tensor] = {}
    for layer in cache.layers:
        values = [*vars(layer).values(), *getattr(layer, "conv_states", {}).values()]
        tensors = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
        found |= {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu time ignores other processes")
    parser.add_argument("--write", action="store_true", help="write the report beside this script")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = make_model()
    caches: list[Any] = []
    prefill: list[float] = []
    for tokens in args.context:
        cache, seconds = read(model, tokens, args.clock)
        caches.append(cache)
        prefill.append(seconds / tokens)
    token = torch.tensor([[7]])
    runs = [partial(lambda cache, step: model(token, cache=cache), cache) for cache in caches]
    medians = [statistics.median(times) for times in take_turns(runs, args.steps, CLOCKS[args.clock])]
    held = [stored_bytes(cache) for cache in caches]
    lines = [
        "# Decoding of JRT-RNN behind long contexts",
        "",
        "The 360M layout at a quarter of its width, random weights, batch 1, a prefix of 1024 tokens; in proportion "
        "to the shortest context.",
        "",
        f"Machine: {machine()}. Medians of {args.steps} interleaved steps, {args.clock} time.",
        "",
        "| context | time per new token | bytes held | predicted / held | time of the prefill per token |",
        "|---|---|---|---|---|",
    ]
    predicted = state_bytes(model.config).total
    for tokens, median, size, seconds in zip(args.context, medians, held, prefill, strict=True):
        ratios = median / medians[0], size / held[0], predicted / size, seconds / prefill[0]
        lines.append(f"| {tokens} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |")
    publish(__file__, lines, args.write)


if __name__ == "__main__":
    main()
