"""The MoR paper's own way to count FLOPs and training steps (arXiv 2507.10524, Table 3 and appendix D).

It is kept apart from `cost`, which counts what is executed. The paper counts a forward pass only, takes keys and
values as wide as queries (grouped-query attention is ignored), halves attention for causality, and leaves out the
embedding, the head, norms, softmax and routers. It reproduces every published budget to four digits.
"""

from typing import Any

from .cost import passes_of


PAPER_SEQUENCE_LENGTH = 2048
PAPER_TOKENS_PER_STEP = 1024 * 2048


def paper_flops_per_token(config: Any, sequence_length: int = PAPER_SEQUENCE_LENGTH) -> float:
    """FLOPs of a forward pass per token under the paper's rule.

    A layer costs F_lin = 2 (4 d^2 + 3 d d_ff) and F_attn = 2 d S; a pass that a share c of the tokens enters costs
    c F_lin + c^2 F_attn, since both queries and keys shrink. With `kv_mode="shared"` the deeper recursions drop the
    key and value projections and read all keys: c 2 (2 d^2 + 3 d d_ff) + c F_attn.

    Args:
        config: a vanilla configuration with a gated MLP, or a routed one whose tokens pass by whole layers.
        sequence_length: S, in tokens.

    Raises:
        ValueError: if only a part of the layers is routed, for which the rule says nothing.
    """
    d, inner = config.hidden_size, config.intermediate_size
    linear, attention = 2 * (4 * d * d + 3 * d * inner), 2 * d * sequence_length
    passes = passes_of(config)
    dense = config.num_hidden_layers - sum(len(routed_pass.slots) for routed_pass in passes)
    flops = float(dense * (linear + attention))
    for routed_pass in passes:
        if routed_pass.unit != "block":
            raise ValueError(
                f"`routing_unit` is {routed_pass.unit!r}, but the paper's rule only counts whole layers; use "
                "`varidepth.analysis.cost`."
            )
        share = routed_pass.share
        if routed_pass.writes_kv:
            one = share * linear + share**2 * attention
        else:
            one = share * (linear - 4 * d * d) + share * attention
        flops += len(routed_pass.slots) * one
    return flops


def paper_training_flops(
    config: Any,
    steps: int,
    sequence_length: int = PAPER_SEQUENCE_LENGTH,
    tokens_per_step: int = PAPER_TOKENS_PER_STEP,
) -> float:
    """FLOPs of a training run under the paper's rule (forward passes only, so about a third of the real ones)."""
    return paper_flops_per_token(config, sequence_length) * tokens_per_step * steps


def paper_training_steps(
    config: Any,
    budget: float,
    sequence_length: int = PAPER_SEQUENCE_LENGTH,
    tokens_per_step: int = PAPER_TOKENS_PER_STEP,
) -> int:
    """Optimizer steps that a budget of `budget` FLOPs pays for under the paper's rule, rounded to the nearest."""
    return round(budget / (paper_flops_per_token(config, sequence_length) * tokens_per_step))
