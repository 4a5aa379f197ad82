"""Text to train on: documents of a source, their split into a training and a held-out part, blocks of tokens.

train, held_out = split_documents(load_documents("book.txt"))
blocks = token_blocks(train, tokenizer, length=256)
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from .text_source import check_column, load_rows, no_text, text_of_line


DOCUMENT_CHARACTERS = 4000  # least size of a document cut from a plain text file


class TokenBlocks(Dataset):
    """Blocks of `length` tokens; item `i` is `{"input_ids", "labels"}`, both `torch.LongTensor` of shape `(length,)`.

    Args:
        blocks (`torch.Tensor` of shape `(number of blocks, length)`): token ids.
    """

    def __init__(self, blocks: torch.Tensor):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}

    @property
    def num_tokens(self) -> int:
        return self.blocks.numel()


def load_documents(source: str | Path | Sequence[str] | None = None, *, text_column: str = "text") -> list[str]:
    """The documents of a text source.

    Args:
        source: `None` for the `pydoc` topics (English prose that every Python carries); a list of documents;
            a folder (each `.txt` or `.md` file is a document); a `.jsonl` file (each line is a document, its text in
            `text_column`); any other file (cut at blank lines into documents of at least 4000 characters); or else the
            id of a dataset, loaded with `datasets` (its "train" split, each row is a document).
        text_column: the column that holds the text, for `.jsonl` and `datasets`.

    Returns:
        Non-empty documents in the order of the source.

    Raises:
        ValueError: nothing to read there, no text in it, or something that is no text.
    """
    if source is None:
        from pydoc_data.topics import topics

        documents: Iterable[str] = [topics[name] for name in sorted(topics)]
    elif not isinstance(source, str | Path):
        documents = list(source)
    elif (path := Path(source)).is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md"))
        documents = [_text_of(p) for p in files]
    elif path.is_file():
        documents = _documents_of_file(path, text_column)
    else:
        documents = _documents_of_dataset(str(source), text_column)
    documents = list(documents)
    for number, text in enumerate(documents, 1):
        if not isinstance(text, str):
            raise ValueError(
                f"Document {number} of {source if isinstance(source, str) else 'the list'} is of type "
                f"{type(text).__name__}: every document must be a string, so leave this one out or convert it."
            )
    kept = [text.strip() for text in documents if text.strip()]
    if not kept:
        raise ValueError(f"No text in {source!s}: give a text file, a folder of .txt files, or a dataset with text.")
    return kept


def _documents_of_file(path: Path, text_column: str) -> list[str]:
    text = _text_of(path)
    if path.suffix != ".jsonl":
        return _cut(text)
    documents = []
    # str.splitlines would also cut at U+2028 and others, which JSON strings may hold
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        found = text_of_line(line, text_column)
        if found is None:
            raise no_text(number, path, text_column)
        documents.append(found)
    return documents


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): give a text file in UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give a text file in UTF-8.") from None


def _cut(text: str) -> list[str]:
    """Runs of paragraphs, so that neighbouring paragraphs mostly stay on the same side of a split."""
    documents: list[str] = []
    run: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        run.append(paragraph)
        size += len(paragraph)
        if size >= DOCUMENT_CHARACTERS:
            documents.append("\n\n".join(run))
            run, size = [], 0
    return documents + ["\n\n".join(run)] if run else documents


def _documents_of_dataset(name: str, text_column: str) -> Iterable[str]:
    rows = load_rows(name, streaming=False)
    check_column(rows.column_names, f"dataset {name!r}", text_column)
    return rows[text_column]


def split_documents(documents: Sequence[str], *, held_out: float = 0.1, seed: int = 0) -> tuple[list[str], list[str]]:
    """A random split by document: the held-out part holds about `held_out` of the characters, at least one document.

    Raises:
        ValueError: fewer than two documents, or `held_out` not between 0 and 1.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out={held_out} is not a share: give a number between 0 and 1, such as 0.1.")
    if len(documents) < 2:
        raise ValueError(
            f"{len(documents)} document cannot be split into a training and a held-out part: give at least two."
        )
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    wanted = held_out * sum(len(text) for text in documents)
    taken, size = 0, 0
    while taken < len(order) - 1 and size < wanted:
        size += len(documents[order[taken]])
        taken += 1
    aside = set(order[:taken])
    return (
        [text for i, text in enumerate(documents) if i not in aside],
        [text for i, text in enumerate(documents) if i in aside],
    )


def token_blocks(documents: Sequence[str], tokenizer: Any, length: int) -> TokenBlocks:
    """Tokenizes documents, joins them with the end-of-text token and cuts blocks of `length` tokens.

    The last tokens, fewer than `length`, are left out.

    Raises:
        ValueError: not enough text for one block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for ids in tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]:
        stream += ids + end
    count = len(stream) // length
    if count == 0:
        raise ValueError(
            f"{len(documents)} documents give {len(stream)} tokens, less than one block of {length}: "
            "give more text or a smaller length."
        )
    return TokenBlocks(torch.tensor(stream[: count * length], dtype=torch.long).view(count, length))
