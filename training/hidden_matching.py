"""How far a student's hidden states are from its teacher's, where both have the same part of the depth behind them."""

from __future__ import annotations

from typing import Any

import torch

from ..configuration.config_basics import check_choice


MATCHED_STATES = ("boundaries", "all")


def matched_states(student: Any, teacher: Any, where: str = "boundaries") -> list[tuple[int, int, int | None]]:
    """Which entries of `hidden_states` (0 is the embeddings) are compared.

    A student with fewer unrolled layers than its teacher is compared at the same share of the depth.

    Args:
        student, teacher: configurations.
        where: `boundaries` before the first and behind each recursion or routed layer, or `all` layers. A student
            without passes (a vanilla model) is compared at all layers.

    Returns:
        Entry of the student, entry of the teacher, and the number of the pass that its layer is of (`None` for none),
        in ascending order; never the last entry, which the final norm has changed.
    """
    check_choice("where", where, MATCHED_STATES)
    depth, other = student.num_hidden_layers, teacher.num_hidden_layers
    passes = getattr(student, "routed_passes", [])
    behind = {slot + 1: number for number, p in enumerate(passes) for slot in p.slots}
    if where == "boundaries" and passes:
        entries = {passes[0].slots[0], *(p.slots[-1] + 1 for p in passes)}
    else:
        entries = set(range(1, depth))
    return [(e, round(e * other / depth), behind.get(e)) for e in sorted(entries) if 0 < e < depth]


def hidden_distance(
    student: tuple[torch.Tensor, ...],
    teacher: tuple[torch.Tensor, ...],
    pairs: list[tuple[int, int, int | None]],
    routing_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared distance of the states relative to the teacher's square, per token: a mean over the pairs.

    Relative to each token, since a few tokens have states that are hundreds of times larger than all others.

    Args:
        student, teacher: hidden states, each of shape `(batch, seq_len, hidden_size)`.
        pairs: as `matched_states` gives them.
        routing_mask (`torch.BoolTensor` of shape `(batch, seq_len, passes)`, *optional*):
            A state behind a pass counts only for the tokens that entered the pass: the others stand where they were.

    Returns:
        `torch.Tensor` of shape `(batch, seq_len)`, fp32.

    Raises:
        ValueError: if the hidden sizes differ, or nothing is compared.
    """
    sizes = student[0].shape[-1], teacher[0].shape[-1]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The student's states have {sizes[0]} values and the teacher's {sizes[1]}, so that they cannot be "
            "compared: give the teacher that the student was made of, or hidden_weight=0."
        )
    if not pairs:
        raise ValueError("The student has no layer between its embeddings and its end: use hidden_weight=0.")
    total = torch.zeros((), device=student[0].device)
    for entry, other, number in pairs:
        target = teacher[other].float()
        distance = (student[entry].float() - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)
        if number is not None and routing_mask is not None:
            distance = distance * routing_mask[..., number]
        total = total + distance
    return total / len(pairs)
