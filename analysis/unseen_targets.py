"""Which tokens of a row a model may be scored on, and the logits that score them.

A causal model predicts every token from the tokens before it. A model that reads a prefix (`config.prefix_length` is
above 0, as in a JRT-RNN) sees all of the prefix at each position in it, so its logits there have seen their targets:
only tokens behind the prefix count, the first of them being predicted at the last position of the prefix.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def longest_prefix(model: Any) -> int:
    """Tokens at the start of a row that the model reads non-causally unless told otherwise; 0 for a causal model."""
    return getattr(model.config, "prefix_length", None) or 0


def first_scored(model: Any, prefix_length: int | None) -> int:
    """Index in a row of the first token that may be scored when `prefix_length` tokens are its prefix.

    Args:
        model (`PreTrainedModel`): a causal language model, or one that reads a prefix.
        prefix_length (`int`, *optional*): tokens of each row that are read and not scored. A causal model reads them
            like all others; given to it, the same tokens are scored as for a model that reads a prefix.

    Raises:
        ValueError: no prefix length for a model that reads a prefix, or one below 0.
    """
    if prefix_length is None:
        if longest_prefix(model):
            raise ValueError(
                f"No `prefix_length` was given for a model that reads a prefix of up to {longest_prefix(model)} "
                "tokens non-causally, where its loss has seen the targets; give the `prefix_length` that is read and "
                "not scored, less than the tokens of a window."
            )
        return 1
    if prefix_length < 0:
        raise ValueError(f"`prefix_length` is {prefix_length}, but must be at least 0; 0 reads every token causally.")
    return max(prefix_length, 1)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def pad_rows(
    rows: Sequence[Sequence[int]], device: torch.device, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens as ids and mask, both `torch.LongTensor` of shape `(rows, longest)`; pads are id 0, masked."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def row_logits(
    model: Any, rows: Sequence[Sequence[int]], prefix_length: int | Sequence[int] | None = None
) -> list[torch.Tensor]:
    """Logits of a batch of rows in one forward pass without cache: one tensor `(tokens, vocabulary)` per row.

    Args:
        model (`PreTrainedModel`): a causal language model, or one that reads a prefix.
        rows (sequence of token ids): of any lengths; pads are masked.
        prefix_length (`int` or one per row, *optional*): the prefix, for a model that reads one; others ignore it.
    """
    ids, mask = pad_rows(rows, model.device)
    options: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask}
    if prefix_length is not None and longest_prefix(model):
        same = isinstance(prefix_length, int)
        options["prefix_length"] = prefix_length if same else torch.tensor(prefix_length, device=model.device)
    logits = model(input_ids=ids, use_cache=False, **options).logits
    return [one[: len(row)] for one, row in zip(logits, rows, strict=True)]
