"""Log-likelihood of a continuation behind a context, as evaluation harnesses rank answers by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .unseen_targets import evaluating, longest_prefix, row_logits


@dataclass(frozen=True)
class ContinuationScore:
    """How likely a continuation is.

    Attributes:
        log_likelihood: summed log-probability of its tokens, in nats.
        tokens: how many these are.
        greedy: whether each of them is the most likely token, so that greedy generation would write it.
    """

    log_likelihood: float
    tokens: int
    greedy: bool


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> ContinuationScore:
    """`log_likelihoods` of one pair."""
    return log_likelihoods(model, tokenizer, [(context, continuation)])[0]


def log_likelihoods(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, batch_size: int = 8
) -> list[ContinuationScore]:
    """Scores of pairs of context and continuation, in their order.

    Context and continuation are tokenized together, without special tokens, and divided behind as many tokens as the
    context has alone; blanks at the end of the context go to the continuation first (as in the lm-evaluation-harness).
    An empty context is the start token, BOS or else EOS. A model that reads a prefix reads no more than the context as
    such, so that no token was seen before it is scored. Nothing is cut: a pair must fit into the model.

    Args:
        model (`PreTrainedModel`): a causal language model, or one that reads a prefix; in eval mode for the call.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        pairs (sequence of pairs of `str`): context and continuation.
        batch_size (`int`): pairs per forward pass.

    Raises:
        ValueError: a continuation without a token; an empty context for a model that reads a prefix, or for a
            tokenizer without a start token; a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}, but must be at least 1.")
    encoded = [_encode(model, tokenizer, *pair) for pair in pairs]
    # neighbours in length waste few pads
    order = sorted(range(len(encoded)), key=lambda number: len(encoded[number][0]))
    scores: dict[int, ContinuationScore] = {}
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows, firsts = zip(*(encoded[number] for number in batch), strict=True)
            logits = row_logits(model, rows, [min(longest_prefix(model), first) for first in firsts])
            for number, row, first, one in zip(batch, rows, firsts, logits, strict=True):
                scores[number] = _score(one[first - 1 : -1].float(), row[first:])
    return [scores[number] for number in range(len(encoded))]


def _encode(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """Tokens of context and continuation, and the index of the first of the continuation."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    blanks = len(context) - len(context.rstrip())
    if 0 < blanks < len(context):
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    before, whole = tokens(context), tokens(context + continuation)
    if not before:
        if longest_prefix(model):
            raise ValueError(
                f"The context of {continuation!r} is empty, but the model reads a prefix and predicts only behind it; "
                "give a context of at least one token."
            )
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError(
                f"The context of {continuation!r} is empty and the tokenizer has neither BOS nor EOS to stand in its "
                "place; give a context of at least one token."
            )
        before, whole = [start], [start, *whole]
    if len(whole) <= len(before):
        raise ValueError(
            f"The continuation {continuation!r} adds no token to the {len(before)} of its context; give a longer one."
        )
    return whole, len(before)


def _score(logits: torch.Tensor, targets: Sequence[int]) -> ContinuationScore:
    """Score of targets under logits of shape `(targets, vocabulary)`."""
    wanted = torch.tensor(targets, device=logits.device)
    log_probs = logits.log_softmax(-1).gather(1, wanted.unsqueeze(1))
    return ContinuationScore(float(log_probs.sum()), len(targets), bool((logits.argmax(-1) == wanted).all()))
