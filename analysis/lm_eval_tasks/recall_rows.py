"""What the task files beside this one call: rows with their prompts, and their score.

lm-eval loads this file by its path, so it imports the package by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from varidepth.analysis.contains import contains
from varidepth.generation.jrt_prompt import first_line
from varidepth.generation.jrt_tasks import task_answers, task_prompt, truncate_row


def task_folder() -> Path:
    """The folder for `lm_eval --include_path`."""
    return Path(__file__).parent


def prompted_rows(
    path: str,
    recall_task: str,
    repeats: int,
    *,
    data_files: Any = None,
    context_length: int | None = None,
    answer_length: int = 50,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **metadata: Any,
) -> dict[str, Any]:
    """The dataset of a task file: the rows as `prompt` and `answers`.

    Args:
        path, data_files: as in `datasets.load_dataset`.
        recall_task, repeats: as `task` and `repeats` of `task_prompt`.
        context_length, answer_length: cut the contexts as in `truncate_row`; by default they stay whole. Table 1 of
            the paper has `--metadata '{"context_length": 1000}'`.
        tokenizer, pretrained: the tokenizer that counts, or the model it belongs to; lm-eval passes `--model_args`.
        metadata: what else lm-eval passes.

    Raises:
        ValueError: a `context_length` without a tokenizer, and as `task_prompt` and `truncate_row`.
    """
    from datasets import Dataset, load_dataset

    rows: Sequence[Any] = load_dataset(path, data_files=data_files, split="validation")
    if context_length is not None:
        rows = _truncated(rows, recall_task, tokenizer or pretrained, context_length, answer_length)
    return {
        "validation": Dataset.from_list(
            [
                {
                    "prompt": task_prompt(recall_task, row, repeats=repeats),
                    "answers": task_answers(recall_task, row),
                }
                for row in rows
            ]
        )
    }


def _truncated(
    rows: Sequence[Any], recall_task: str, tokenizer: str | None, context_length: int, answer_length: int
) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    if tokenizer is None:
        raise ValueError(
            f"context_length={context_length} counts tokens, but no tokenizer is given; add "
            '"tokenizer": "..." to the metadata.'
        )
    counting = AutoTokenizer.from_pretrained(tokenizer)
    cut = (
        truncate_row(recall_task, row, counting, context_length=context_length, answer_length=answer_length)
        for row in rows
    )
    return [row for row in cut if row is not None]


def score(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`contains` of the first generated line.

    Args:
        row: a row of `prompted_rows`.
        results: the generated text.
    """
    return {"contains": float(contains(first_line(results[0]), row["answers"]))}
