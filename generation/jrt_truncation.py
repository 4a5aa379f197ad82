"""Shorter contexts for JRT-Prompt, counted in tokens: their start or end, or the paper's window around the answer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without special ones."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def truncate_context(tokenizer: Any, context: str, max_tokens: int, *, keep: Literal["start", "end"] = "start") -> str:
    """The first or last `max_tokens` tokens of a context; one that is no longer stays as it is.

    Raises:
        ValueError: `max_tokens` below 1, or another `keep`.
    """
    if max_tokens < 1:
        raise ValueError(f"A context of {max_tokens} tokens would be empty; leave room for at least 1.")
    if keep not in ("start", "end"):
        raise ValueError(f"`keep` is {keep!r}, but a context keeps its 'start' or its 'end'; give one of these.")
    tokens = token_ids(tokenizer, context)
    if len(tokens) <= max_tokens:
        return context
    return _text(tokenizer, tokens[:max_tokens] if keep == "start" else tokens[-max_tokens:])


def answer_position(context: str, answers: Iterable[str]) -> int | None:
    """Character of the earliest occurrence of an answer, whatever the case; `None` if none occurs."""
    found = [re.search(re.escape(answer), context, re.IGNORECASE) for answer in answers]
    return min((match.start() for match in found if match), default=None)


def window_around_answer(
    tokenizer: Any,
    context: str,
    answers: Iterable[str],
    *,
    context_length: int = 1000,
    answer_length: int = 50,
    missing: Literal["start", "end"] = "start",
) -> str:
    """The paper's cut for evaluation: tokens around the earliest occurrence of an answer (950 of them in Table 1).

    Half of the tokens lie before the answer if there are as many. As in the official code, a context that would fit is
    cut there too, and near its end the window is shorter.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): whose tokens count.
        context: the document.
        answers: strings to look for; none cuts at the start.
        context_length, answer_length: the window has `context_length - answer_length` tokens.
        missing: what is kept if no answer occurs: the start; or half a window at the end, which is what the official
            code keeps, by a negative index.

    Raises:
        ValueError: no token is left for the window, or another `missing`.
    """
    size = context_length - answer_length
    if size < 1:
        raise ValueError(
            f"A context_length of {context_length} with an answer_length of {answer_length} leaves no token for the "
            "context; raise the first."
        )
    if missing not in ("start", "end"):
        raise ValueError(f"`missing` is {missing!r}, but a context without the answer keeps its 'start' or its 'end'.")
    context, answers = context.strip(), list(answers)
    tokens = token_ids(tokenizer, context)
    position = answer_position(context, answers)
    if position is None:
        position = -1 if answers and missing == "end" else 0
    before = len(token_ids(tokenizer, context[:position]))
    start = max(0, before - size // 2)
    return _text(tokenizer, tokens[start : start + size])


def _text(tokenizer: Any, tokens: list[int]) -> str:
    # a cut between the bytes of a character leaves a replacement character
    return tokenizer.decode(tokens, skip_special_tokens=True).strip("\ufffd")
