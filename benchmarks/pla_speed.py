"""Prefix linear attention against scaled_dot_product_attention and against its own quadratic form, by length.

The setting of the JRT paper's table 5: 16 heads, feature size 16, head size 64, a prefix of half the tokens, one
layer's attention alone. Attention has queries and keys of the head size, as a model would have.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from interleaved import CLOCKS, machine, publish, take_turns
from torch.nn import functional as F

from varidepth import prefix_linear_attention


HEADS, FEATURES, VALUES, EXPANDED = 16, 16, 64, 153
CHUNK = 64
# beyond, the quadratic forms need gigabytes; in bf16 a processor without units for it would take minutes
LONGEST_QUADRATIC, LONGEST_TRAINING = 4096, 8192
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def problem(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query, key, value, prefix key and prefix value."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(tokens, FEATURES), (tokens, FEATURES), (tokens, VALUES), (tokens // 2, FEATURES), (tokens // 2, VALUES)]
    return tuple(torch.randn(1, HEADS, *size, generator=generator).to(dtype) for size in sizes)


def full_features(vectors: torch.Tensor) -> torch.Tensor:
    """All 273 features of the second-order Taylor map."""
    square = (vectors[..., :, None] * vectors[..., None, :]).flatten(-2)
    size = vectors.shape[-1]
    return torch.cat([torch.ones_like(vectors[..., :1]), vectors / size**0.25, square / (2 * size) ** 0.5], dim=-1)


def quadratic(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefix_key: torch.Tensor, prefix_value: torch.Tensor
) -> torch.Tensor:
    """The form that models were trained in: weights of all pairs from 273 features, and a sum for the normaliser."""
    query, key, prefix_key = (full_features(vectors) for vectors in (query, key, prefix_key))
    numerator = (query @ key.mT).tril() @ value + (query @ prefix_key.mT) @ prefix_value
    normaliser = query * (key.cumsum(dim=2) + prefix_key.sum(dim=2, keepdim=True))
    return numerator / (normaliser.sum(dim=-1, keepdim=True) + 1e-12)


def matrix_flops(tokens: int) -> float:
    """Of the chunked form: pairs within chunks, the state written and read, the prefix read."""
    within = CHUNK * (FEATURES + 1 + VALUES + 1)
    state = EXPANDED * (VALUES + 1)
    return 2.0 * HEADS * tokens * (within + 2 * state + state / 2)


def contenders(tokens: int, dtype: torch.dtype) -> dict[str, Callable[[int], Any]]:
    """Name -> one forward pass over `tokens` tokens."""
    tensors = problem(tokens, dtype)
    heads = torch.randn(3, 1, HEADS, tokens, VALUES, dtype=dtype)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    mask[:, : tokens // 10] = False
    odd = [tensor[:, :, : -(-tensor.shape[2] * 99 // 100)] for tensor in tensors]
    runs = {
        "sdpa": lambda step: F.scaled_dot_product_attention(*heads, is_causal=True),
        "chunked": lambda step: prefix_linear_attention(*tensors),
        "chunked, a tenth padding": lambda step: prefix_linear_attention(
            *tensors, attention_mask=mask, prefix_mask=mask[:, : tokens // 2]
        ),
        "chunked, 1 % shorter": lambda step: prefix_linear_attention(*odd),
    }
    if tokens <= LONGEST_QUADRATIC and dtype == torch.float32:
        runs["quadratic, 273 features"] = lambda step: quadratic(*tensors)
        runs["quadratic, packed"] = lambda step: prefix_linear_attention(*tensors, implementation="reference")
    return runs


def training(tokens: int, dtype: torch.dtype) -> dict[str, Callable[[int], Any]]:
    """Name -> forward and backward pass."""
    tensors = [tensor.requires_grad_() for tensor in problem(tokens, dtype)]
    heads = [torch.randn(1, HEADS, tokens, VALUES, dtype=dtype, requires_grad=True) for _ in range(3)]

    @torch.enable_grad()
    def sdpa(step: int) -> Any:
        return torch.autograd.grad(F.scaled_dot_product_attention(*heads, is_causal=True).sum(), heads)

    @torch.enable_grad()
    def chunked(step: int) -> Any:
        return torch.autograd.grad(prefix_linear_attention(*tensors)[0].sum(), tensors)

    return {"sdpa": sdpa, "chunked": chunked}


def measure(runs: dict[str, Callable[[int], Any]], steps: int, clock: str) -> dict[str, float]:
    """Median seconds of each run, taken in turns."""
    seconds = take_turns(list(runs.values()), steps, CLOCKS[clock], warm_up=1)
    return {name: statistics.median(times) for name, times in zip(runs, seconds, strict=True)}


def peak(clock: str) -> float:
    """FLOPs per second of a large fp32 matrix product."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = take_turns([lambda step: left @ right], 15, CLOCKS[clock])[0]
    return 2 * 1024**3 / statistics.median(seconds)


def inference_table(args: argparse.Namespace, name: str) -> list[str]:
    lines = [
        f"## {name}",
        "",
        "Time of the others over that of the chunked form; its share of the peak of fp32 matrix products.",
        "",
        "| tokens | sdpa | quadratic, 273 features | quadratic, packed | with padding | any length | share of peak |",
        "|---|---|---|---|---|---|---|",
    ]
    chunked: dict[int, float] = {}
    for tokens in args.tokens:
        steps = max(3, min(args.steps, args.steps * 8192 // tokens))
        with torch.no_grad():
            before = peak(args.clock)
            seconds = measure(contenders(tokens, TYPES[name]), steps, args.clock)
            fastest = (before + peak(args.clock)) / 2
        base = chunked[tokens] = seconds["chunked"]
        cells = [f"{seconds[run] / base:.2f}" if run in seconds else "" for run in ("sdpa", "quadratic, 273 features")]
        cells.append(f"{seconds['quadratic, packed'] / base:.2f}" if "quadratic, packed" in seconds else "")
        cells += [f"{seconds[run] / base:.2f}" for run in ("chunked, a tenth padding", "chunked, 1 % shorter")]
        cells.append(f"{matrix_flops(tokens) / base / fastest:.0%}")
        lines.append(f"| {tokens} | {' | '.join(cells)} |")
    grown = [tokens for tokens in args.tokens if tokens >= 4096]
    if len(grown) > 1:
        exponent = math.log(chunked[grown[-1]] / chunked[grown[0]]) / math.log(grown[-1] / grown[0])
        lines += ["", f"Growth of the chunked form from {grown[0]} to {grown[-1]} tokens: exponent {exponent:.3f}."]
    return lines


def training_table(args: argparse.Namespace, name: str) -> list[str]:
    lines = [f"## {name}, forward and backward", "", "| tokens | sdpa / chunked |", "|---|---|"]
    for tokens in args.tokens:
        if tokens <= LONGEST_TRAINING:
            seconds = measure(training(tokens, TYPES[name]), max(3, args.steps // 3), args.clock)
            lines.append(f"| {tokens} | {seconds['sdpa'] / seconds['chunked']:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**power for power in range(10, 16)])
    parser.add_argument("--steps", type=int, default=9, help="timed calls up to 8192 tokens, fewer beyond")
    parser.add_argument("--types", choices=TYPES, nargs="+", default=list(TYPES))
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu time ignores other processes")
    parser.add_argument("--write", action="store_true", help="write the report beside this script")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    lines = [
        "# Speed of prefix linear attention",
        "",
        "One attention of 16 heads, feature size 16, head size 64, a prefix of half the tokens (JRT paper, table 5), "
        "batch 1, against `scaled_dot_product_attention` of head size 64 and against the quadratic form.",
        "",
        f"Machine: {machine()}. Medians of interleaved calls, {args.clock} time.",
    ]
    for name in args.types:
        lines += ["", *inference_table(args, name)]
    lines += ["", *training_table(args, args.types[0])]
    publish(__file__, lines, args.write)


if __name__ == "__main__":
    main()
