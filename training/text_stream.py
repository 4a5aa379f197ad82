"""Rows of tokens to train on, made of a text as it is read: from the Hub, from files of any size, or from a list.

stream = TextStream("HuggingFaceFW/fineweb-edu", tokenizer, seq_len=2048, config="sample-10BT", shuffle_buffer=1024)
trainer = Trainer(model, args, train_dataset=stream, data_collator=stream.collate)
StreamCallback(stream).attach(trainer)  # exact resume, without reading again what was read
trainer.train()
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset, get_worker_info
from transformers import DataCollatorWithPadding, Trainer, default_data_collator

from ..configuration.config_basics import check_choice
from ..modeling.prefix_loss import IGNORED
from .text_source import Piece, TextSource, open_source
from .training_checkpoints import KeptCallback


PACKINGS = ("documents", "joined", "separate")
# rows that are read at a time where they are not shuffled
_WINDOW = 64
# what the tokenizer gets at a time, whichever is reached first
_BATCH_PIECES, _BATCH_CHARACTERS = 64, 200_000
# windows whose beginning is remembered, for checkpoints of rows that were given long ago
_REMEMBERED = 4096


class TextStream(IterableDataset):
    """Rows of at most `seq_len` tokens: documents, each with the end-of-text token, packed or apart.

    Each item is `{"input_ids", "labels"}`, with `packing="documents"` also `position_ids`; all are `torch.LongTensor`
    of shape `(tokens,)`. Give a model no `attention_mask` beside `position_ids`: only without one are documents
    masked from each other, and counted apart by the routers of this package.

    Rows of the next window are read and tokenized by a thread while those of this one are given; memory does not grow
    with the text. The order depends on text, tokenizer and arguments only: all processes read the same rows, of which
    accelerate (as in `Trainer`) gives each its own. Iteration begins at the first row, or once at a loaded state.

    Args:
        source: what `text_source.open_source` takes: a file, a folder, a dataset id, a list of documents, a dataset.
        tokenizer: of transformers; its end-of-text token ends documents, if it has one.
        seq_len: tokens per row.
        config, split, column: of a dataset; `column` also is the key of the text in a `.jsonl` file.
        packing:
            `documents`: rows are full, and documents in them apart by `position_ids`, which begin at 0 for each of
            them and at a row's begin; the first token of a document has no label. `joined`: rows are full, and tokens
            see the documents before theirs, as in the papers; for JRT-RNN, which cannot keep documents apart.
            `separate`: no row holds more than one document, so rows differ in length.
        shuffle_buffer: rows that are shuffled together; 0 keeps the order, also of files and shards.
        seed: of the shuffling. Each epoch has another order.
        epochs: times that the text is read; `None` for without end, as training by steps needs it.

    Raises:
        ValueError: for arguments out of range, and for what cannot be read.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any,
        seq_len: int,
        *,
        config: str | None = None,
        split: str = "train",
        column: str = "text",
        packing: str = "documents",
        shuffle_buffer: int = 0,
        seed: int = 0,
        epochs: int | None = None,
    ):
        super().__init__()
        check_choice("packing", packing, PACKINGS)
        if seq_len < 2:
            raise ValueError(f"seq_len={seq_len} leaves no next token to learn: give at least 2.")
        if shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer={shuffle_buffer} counts rows: give 0 for none, or more.")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs={epochs} reads nothing: give at least 1, or None for without end.")
        self._open: dict[str, Any] = {
            "config": config,
            "split": split,
            "column": column,
            "seed": seed if shuffle_buffer else None,
        }
        self.source, self.tokenizer, self.seq_len, self.packing = source, tokenizer, seq_len, packing
        self.shuffle_buffer, self.seed, self.epochs = shuffle_buffer, seed, epochs
        # what cannot be opened is said now, not in the first step
        self._text: TextSource | None = open_source(source, **self._open)
        self._loaded: dict[str, Any] | None = None
        self._windows: deque[_Mark] = deque(maxlen=_REMEMBERED)
        self._given = 0
        self._mixed: tuple[torch.Tensor, float] | None = None

    def mix_in(self, rows: torch.Tensor, share: float) -> None:
        """Gives other rows in the place of a share of its own, chosen by their number: each epoch leaves out others.

        Args:
            rows (`torch.LongTensor` of shape `(rows, seq_len)`): each a document of its own.
            share: 0 to 1.
        """
        self._mixed = rows.int(), share

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if get_worker_info() is not None:
            raise ValueError(
                "A TextStream reads ahead by itself, and each worker of a DataLoader would read all of it again: set "
                "dataloader_num_workers (num_workers) to 0."
            )
        state, self._loaded = self._loaded or {"rows": 0, "window": 0, "place": 0, "reader": None}, None
        text, self._text = self._text or open_source(self.source, **self._open), None
        reader = _RowReader(text, self.tokenizer, self.seq_len, self.packing, self.epochs, state["reader"])
        self._windows.clear()
        self._given = state["rows"]
        return self._rows(reader, state)

    def _rows(self, reader: _RowReader, state: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
        first, place = state["rows"] - state["place"], state["place"]
        self._windows.append(_Mark(first, state["window"], reader.state_dict()))
        thread = ThreadPoolExecutor(1, thread_name_prefix="text")
        try:
            window: Future[list[_Row]] = thread.submit(self._read, reader, state["window"])
            while rows := window.result():
                mark = self._windows[-1]
                following = _Mark(mark.first + len(rows), mark.window + 1, reader.state_dict())
                window = thread.submit(self._read, reader, following.window)
                for row in islice(rows, place, None):
                    row = self._mixed_row(self._given) or row
                    self._given += 1
                    yield row.tensors(self.packing)
                self._windows.append(following)
                place = 0
        finally:
            thread.shutdown(wait=False)

    def _mixed_row(self, number: int) -> _Row | None:
        if self._mixed is None:
            return None
        rows, share = self._mixed
        draw = random.Random(f"{self.seed} mixed {number}")
        return _Row(draw.choice(rows), []) if draw.random() < share else None

    def _read(self, reader: _RowReader, window: int) -> list[_Row]:
        """The rows of a window, none at the end; one that reaches the end of an epoch is shorter."""
        rows: list[_Row] = []
        epoch = reader.epoch
        while len(rows) < (self.shuffle_buffer or _WINDOW) and reader.epoch == epoch:
            row = reader.next_row()
            if row is None:
                break
            rows.append(row)
        if self.shuffle_buffer:
            random.Random(f"{self.seed} {window}").shuffle(rows)
        return rows

    def state_dict(self, rows: int | None = None) -> dict[str, Any]:
        """A state that JSON can hold, from which another stream with these arguments goes on.

        Args:
            rows: how many rows, counted from the first of all, were used; by default all that were given. A
                `DataLoader` takes some before they are used.

        Raises:
            ValueError: if fewer rows were given, or the place was given up because it is too far back.
        """
        rows = self._given if rows is None else rows
        if self._loaded is not None and rows == self._loaded["rows"]:
            return dict(self._loaded)
        if not self._windows and rows == 0:
            return {"rows": 0, "window": 0, "place": 0, "reader": None}
        marks = [mark for mark in self._windows if mark.first <= rows]
        if not marks or rows > self._given:
            raise ValueError(
                f"The state after {rows} rows is not known: {self._given} rows were given, and the place of the "
                f"{self._windows[0].first if self._windows else 0} first is not kept; ask for one between them."
            )
        mark = marks[-1]
        return {"rows": rows, "window": mark.window, "place": rows - mark.first, "reader": mark.reader}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on behind the rows that were used when the state was taken."""
        self._loaded = dict(state)
        self._given = self._loaded["rows"]
        self._windows.clear()

    def collate(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """A batch of rows, for `data_collator`; rows of other lengths are padded on the right, with a mask."""
        batch = {name: [row[name] for row in rows] for name in rows[0]}
        if len({len(row["input_ids"]) for row in rows}) == 1:
            return {name: torch.stack(values) for name, values in batch.items()}
        batch["attention_mask"] = [torch.ones_like(row["input_ids"]) for row in rows]
        pads = {"labels": IGNORED, "input_ids": getattr(self.tokenizer, "pad_token_id", None) or 0}
        return {
            name: pad_sequence(values, batch_first=True, padding_value=pads.get(name, 0))
            for name, values in batch.items()
        }


class StreamCallback(KeptCallback):
    """Keeps the place of a `TextStream` in each checkpoint, so that resumed training goes on with the next token.

    `Trainer` itself would read everything again up to that place. Attach it before training:

        StreamCallback(stream).attach(trainer)

    Models that draw random numbers in training (dropout, stochastic routing) draw others after a resume; give
    `JRTCollator` a seed.

    Args:
        stream: `train_dataset` of the trainer.
    """

    def __init__(self, stream: TextStream):
        self.stream = stream
        self._trainer: Trainer | None = None
        self._first: tuple[int, int] | None = None

    def attach(self, trainer: Trainer) -> None:
        """Adds this callback to a trainer, which then reads nothing again, and batches rows as the stream does it.

        A data collator of yours stays, but those of transformers that add an `attention_mask` would let documents
        see each other.
        """
        if isinstance(trainer.data_collator, DataCollatorWithPadding) or (
            trainer.data_collator is default_data_collator
        ):
            trainer.data_collator = self.stream.collate
        if self.stream.packing == "separate":
            # batches of unequal length cannot be sent from one process to the others: each makes its own
            trainer.accelerator.dataloader_config.dispatch_batches = False
        trainer.args.ignore_data_skip = True
        trainer.add_callback(self)
        self._trainer = trainer

    def restore(self, kept: dict[str, Any] | None, step: int) -> None:
        if kept is None or kept["text"] is None:
            raise ValueError(
                f"The checkpoint of step {step} does not say how far the text was read, as it was made without a "
                "StreamCallback: resume without one, which reads up to there again, or start anew."
            )
        self.stream.load_state_dict(kept["text"])

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._first = state.global_step, self.stream.state_dict()["rows"]

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        self._first = None

    def keep(self) -> dict[str, Any]:
        """The place behind the rows that all processes together have used so far."""
        text = None
        if self._trainer is not None and self._first is not None:
            step, row = self._first
            per_step = self._trainer.get_total_train_batch_size(self._trainer.args)
            text = self.stream.state_dict(row + (self._trainer.state.global_step - step) * per_step)
        return {"text": text}


class _Mark(NamedTuple):
    """The beginning of a window: rows before it, its number, and the state of the reader there."""

    first: int
    window: int
    reader: dict[str, Any]


class _Row(NamedTuple):
    """Tokens of a row, and where in it a document begins that is not at the row's begin."""

    ids: torch.Tensor
    starts: list[int]

    def tensors(self, packing: str) -> dict[str, torch.Tensor]:
        ids = self.ids.long()
        labels = ids.clone()
        row = {"input_ids": ids, "labels": labels}
        if packing == "documents":
            positions = torch.arange(len(ids))
            for start in self.starts:
                positions[start:] = torch.arange(len(ids) - start)
            # nothing of its own document stands before a first token
            labels[self.starts] = IGNORED
            row["position_ids"] = positions
        return row


class _RowReader:
    """Rows in the order of the text, with a state between any two of them.

    A state is that of the source before a batch of pieces, and how many tokens of the batch were used.
    """

    def __init__(
        self,
        text: TextSource,
        tokenizer: Any,
        seq_len: int,
        packing: str,
        epochs: int | None,
        state: Mapping[str, Any] | None,
    ):
        self.text, self.tokenizer, self.seq_len = text, tokenizer, seq_len
        self.packing, self.epochs = packing, epochs
        state = state or {"epoch": 0, "text": None, "inside": False, "tokens": 0}
        self.epoch = state["epoch"]
        text.begin(self.epoch, state["text"])
        self._pieces = text.pieces()
        # of the batch: state before it, whether it begins inside a document, tokens used and not used yet
        self._before, self._batch_inside, self._used = state["text"], state["inside"], state["tokens"]
        self._chunks: deque[_Chunk] = deque()
        self._skip: int | None = state["tokens"]
        self._inside = state["inside"]
        self._seen = 0
        self._resumed = state["text"] is not None
        self.rows = 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "text": self._before, "inside": self._batch_inside, "tokens": self._used}

    def next_row(self) -> _Row | None:
        """The next row; `None` when all epochs are over, where tokens that do not fill a row are left out.

        Raises:
            ValueError: if the text has no token, or all of it does not fill a row.
        """
        self._drop_used()
        ids: list[int] = []
        starts: list[int] = []
        apart = self.packing == "separate"
        while len(ids) < self.seq_len:
            if not self._chunks and not self._refill():
                break
            chunk = self._chunks[0]
            if apart and chunk.begins and len(ids) > 1:
                break
            if apart and chunk.begins:
                ids = []  # one token alone, with no next one to learn
            if chunk.begins and ids:
                starts.append(len(ids))
            taken = chunk.take(self.seq_len - len(ids))
            ids += taken
            self._used += len(taken)
            if chunk.rest == 0:
                self._chunks.popleft()
        if len(ids) < (2 if apart else self.seq_len):
            if not self.rows and not self._resumed:
                raise ValueError(
                    f"The text gives {self._seen} tokens, less than one row of {self.seq_len}: give more text, a "
                    "smaller seq_len, or more epochs."
                )
            return None
        self.rows += 1
        return _Row(torch.tensor(ids, dtype=torch.int32), starts)

    def _drop_used(self) -> None:
        """Reads the batch of a loaded state again, up to its place."""
        if self._skip is None:
            return
        skip, self._skip = self._skip, None
        if skip and self._refill():
            self._used = skip
            while skip:
                skip -= len(self._chunks[0].take(skip))
                if self._chunks[0].rest == 0:
                    self._chunks.popleft()

    def _refill(self) -> bool:
        """Tokenizes the next pieces; False when all epochs are over."""
        while True:
            self._before, self._batch_inside, self._used = self.text.state_dict(), self._inside, 0
            pieces: list[Piece] = []
            size = 0
            while len(pieces) < _BATCH_PIECES and size < _BATCH_CHARACTERS:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                pieces.append(piece)
                size += len(piece.text)
            if pieces:
                self._add(pieces)
                if self._chunks:
                    return True
            elif not self._next_epoch():
                return False

    def _add(self, pieces: Sequence[Piece]) -> None:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        encoded = self.tokenizer([piece.text for piece in pieces], add_special_tokens=False, verbose=False)
        for piece, ids in zip(pieces, encoded["input_ids"], strict=True):
            ids = ids + end if piece.ends else ids
            if ids:
                self._chunks.append(_Chunk(ids, not self._inside))
                self._inside = True
                self._seen += len(ids)
            if piece.ends:
                self._inside = False

    def _next_epoch(self) -> bool:
        if not self._seen and not self._resumed:
            raise ValueError("The text holds no token: give a file, folder or dataset with text.")
        if self.epochs is not None and self.epoch + 1 >= self.epochs:
            return False
        self.epoch += 1
        self._inside = self._resumed = False
        self.text.begin(self.epoch)
        self._pieces = self.text.pieces()
        return True


class _Chunk:
    """Tokens of a piece that are taken from the front."""

    def __init__(self, ids: list[int], begins: bool):
        self.ids, self.begins, self._place = ids, begins, 0

    @property
    def rest(self) -> int:
        return len(self.ids) - self._place

    def take(self, count: int) -> list[int]:
        taken = self.ids[self._place : self._place + count]
        self._place += len(taken)
        self.begins = self.begins and not taken
        return taken
