"""The six recall tasks of JRT-Prompt (arXiv 2407.05483, Table 1): prompts, gold answers and truncation of their rows.

A row is a mapping with the columns of the published datasets (`hazyresearch/based-fda` and so on). The wording and the
clean-up of each prompt are those of the official evaluation, so that scores can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from .jrt_prompt import repeat_reading
from .jrt_truncation import answer_position, window_around_answer


Row = Mapping[str, Any]
# what is stripped from a text, one after the other; `None` is whitespace
Strips = tuple[str | None, ...]


class Reading(NamedTuple):
    """The parts of a prompt, for `repeat_reading`."""

    announcement: str
    context: str
    reading: str


@dataclass(frozen=True)
class RecallTask:
    """One task.

    Attributes:
        read: the parts of the prompt of a row; the official clean-up depends on whether it is the repeated one.
        context: the column that truncation cuts.
        answer: the column of the gold answer or answers.
        searched: the columns whose strings the window is laid around; without any it begins at the start.
        clean: applied to the context before anything else.
    """

    read: Callable[[Row, str, bool], Reading]
    context: str
    answer: str
    searched: tuple[str, ...]
    clean: Callable[[str], str] = str


def _sentence(text: str, strips: Strips) -> str:
    """The text with one full stop at its end."""
    for characters in strips:
        text = text.strip(characters)
    return text if text.endswith(".") else f"{text}."


def _without_trailing(text: str, question: str) -> str:
    """Without the copies of the question that some documents end in."""
    while question and text[-len(question) :].lower() == question.lower():
        text = text[: -len(question)]
    return text


def _attribute(row: Row, text: str, strips: Strips) -> Reading:
    name = row["key"][:1].upper() + row["key"][1:]
    context = _sentence(_without_trailing(text, f"{row['key']}:"), strips)
    return Reading(f"Information about {name.strip(':')}.", context, f"{context} {name}:")


def _fda(row: Row, text: str, repeated: bool) -> Reading:
    return _attribute(row, text, ("\n", "."))


def _swde(row: Row, text: str, repeated: bool) -> Reading:
    return _attribute(row, text, ("\n", ".", None) if repeated else (None, "."))


def _cloze(row: Row, text: str, repeated: bool, without: Callable[[str, str], str] = _without_trailing) -> Reading:
    question = row["question"].strip()
    context = _sentence(without(text, question), (None, ".", None) if repeated else (None, "."))
    return Reading(row["orig_question"].strip(":"), context, f"{context} {question}")


def _nq(row: Row, text: str, repeated: bool) -> Reading:
    # for the prompt without repetition the official code removes one copy of the question, in its own case only
    return _cloze(row, text.strip(), repeated, _without_trailing if repeated else str.removesuffix)


def _drop(row: Row, text: str, repeated: bool) -> Reading:
    return _cloze(row, text.strip(), repeated)


def _triviaqa(row: Row, text: str, repeated: bool) -> Reading:
    cleaned = re.sub(r"\[(?:PAR|DOC|TLE)\]", "", text.strip())
    return _cloze(row, cleaned, repeated)._replace(announcement=row["orig_question"])


def _squad(row: Row, text: str, repeated: bool) -> Reading:
    # `text` is the passage with the beginning of the answering sentence
    return Reading(row["question"], row["context"].partition("Question:")[0], text.strip())


def _before_summary(text: str) -> str:
    return text.partition("Summary of information above...")[0]


TASKS = {
    "fda": RecallTask(_fda, context="text", answer="value", searched=("key", "value")),
    "swde": RecallTask(_swde, context="text", answer="value", searched=("key", "value"), clean=_before_summary),
    "nq": RecallTask(_nq, context="context", answer="answers", searched=("answers",)),
    "drop": RecallTask(_drop, context="context", answer="answers", searched=()),
    "triviaqa": RecallTask(_triviaqa, context="context", answer="answers", searched=()),
    "squad": RecallTask(_squad, context="text", answer="value", searched=("value",)),
}


def task_prompt(task: str, row: Row, *, repeats: int = 2) -> str:
    """The prompt of a row.

    Args:
        task: a name of `TASKS`.
        row: its columns; it is not changed.
        repeats: 1 for the paper's default prompt, 2 for its "twice"; more go on in the same way.

    Raises:
        ValueError: an unknown task, a row without a column or context, or `repeats` below 1.
    """
    known = _known(task)
    with _columns_of(task, row):
        text = known.clean(row[known.context])
        if not text.strip():
            raise ValueError(f"The column {known.context!r} of the row is empty, but task {task!r} reads it; fill it.")
        announcement, context, reading = known.read(row, text, repeats != 1)
    return repeat_reading(announcement, context, reading, repeats=repeats)


def task_answers(task: str, row: Row) -> list[str]:
    """The gold answers of a row, for `analysis.contains`.

    Raises:
        ValueError: an unknown task, or a row without the column.
    """
    with _columns_of(task, row):
        return _strings(row[_known(task).answer])


def truncate_row(task: str, row: Row, tokenizer: Any, **window: Any) -> dict[str, Any] | None:
    """The row with its context cut to the paper's window around the answer.

    For NQ the first answer is looked for, then the column `alt_answers` where there is one; Drop and TriviaQA keep the
    start.

    Args:
        task, row: as in `task_prompt`.
        tokenizer, window: as in `window_around_answer`: `context_length`, `answer_length`, `missing`.

    Returns:
        A changed copy, or `None` for a row that the paper leaves out: what is looked for has a single character.

    Raises:
        ValueError: as `task_prompt` and `window_around_answer`.
    """
    known = _known(task)
    with _columns_of(task, row):
        context = known.clean(row[known.context])
        wanted = [text for column in known.searched for text in _strings(row[column])[:1]]
    if any(len(text) <= 1 for text in wanted):
        return None
    if wanted and answer_position(context, wanted) is None:
        others = row.get("alt_answers") or ()
        wanted = next(([other] for other in others if answer_position(context, [other]) is not None), wanted)
    return {**row, known.context: window_around_answer(tokenizer, context, wanted, **window)}


def _known(task: str) -> RecallTask:
    if task not in TASKS:
        raise ValueError(f"{task!r} is no recall task of the paper; give one of {', '.join(TASKS)}.")
    return TASKS[task]


@contextmanager
def _columns_of(task: str, row: Row) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"The row has the columns {sorted(row)}, but task {task!r} also reads {error}; rename a column, or give "
            "the task that the row belongs to."
        ) from None


def _strings(answers: Any) -> list[str]:
    return [answers] if isinstance(answers, str) else list(answers)
