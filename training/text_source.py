"""Where text comes from: files that are read piece by piece, or rows that `datasets` streams, from any place on.

A source is read epoch by epoch. What it has given is told by a small state of numbers and names, from which another
source over the same text goes on with the next piece.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from heapq import heapify, heappop, heappush
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple


TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl",)
# what a loader of `datasets` reads
_LOADERS = {".parquet": "parquet", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
# a text file is read in pieces that end at a blank line behind so many bytes, or anywhere behind the second number
_LEAST_PIECE, _LARGEST_PIECE = 4_000, 64_000
# bytes of a file that are read before another one has its turn
_TURN = 32_768


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        text: of the document.
        ends: the document ends with it.
    """

    text: str
    ends: bool


class TextSource(ABC):
    """Documents in pieces, in an order that depends on the seed and the epoch only.

    Args:
        seed: of the order of files, documents or shards; `None` keeps the given order.
    """

    def __init__(self, seed: int | None):
        self.seed = seed
        self._epoch = 0
        self._from: dict[str, Any] | None = None

    def begin(self, epoch: int, state: Mapping[str, Any] | None = None) -> None:
        """Makes `pieces` start with an epoch, at a state that was taken in the same epoch or at its first piece."""
        self._epoch, self._from = epoch, None if state is None else dict(state)

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """The pieces of the epoch from where `begin` said.

        Raises:
            ValueError: for what cannot be read, or is no text.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the piece that comes next is, as JSON can hold it."""

    def _order(self, count: int) -> list[int]:
        order = list(range(count))
        if self.seed is not None:
            random.Random(f"{self.seed} {self._epoch}").shuffle(order)
        return order


class TextFiles(TextSource):
    """Local files: each `.txt` or `.md` file is a document, and so is each line of a `.jsonl` file.

    With a seed several files are read by turns of some pages, each as often as its size asks for, so that every part
    of the epoch shows all kinds of text; a document ends where its file's turn does.

    Args:
        paths: files.
        column: key of the text in a `.jsonl` file.
        seed: of the turns; `None` reads one file after the other.
    """

    def __init__(self, paths: Sequence[Path], column: str = "text", seed: int | None = None):
        super().__init__(seed)
        self.paths, self.column = list(paths), column
        self._by_turns = seed is not None and len(self.paths) > 1
        self.begin(0)

    def begin(self, epoch: int, state: Mapping[str, Any] | None = None) -> None:
        super().begin(epoch, state)
        # bytes of each file that were read, and the file whose turn it is
        self._read: list[int] = [0] * len(self.paths)
        self._file: int | None = None
        if self._from is not None:
            self._read, self._file = list(self._from["read"]), self._from["file"]

    def pieces(self) -> Iterator[Piece]:
        sizes = [_readable(path, lambda path: path.stat().st_size) for path in self.paths]
        draw = random.Random(f"{self.seed} {self._epoch}")
        # a file of one turn may stand anywhere
        shifts = [draw.random() * min(size, _TURN) for size in sizes]

        def place(number: int) -> float:
            """Of the file's next turn in the epoch, 0 to 1; without turns, of the file among all."""
            if not self._by_turns:
                return float(number)
            return (self._read[number] + shifts[number]) / sizes[number]

        unread = (i for i, size in enumerate(sizes) if self._read[i] < size and i != self._file)
        waiting = [(place(i), i) for i in unread]
        heapify(waiting)
        while self._file is not None or waiting:
            number = heappop(waiting)[1] if self._file is None else self._file
            yield from self._turn(number)
            if self._read[number] < sizes[number]:
                heappush(waiting, (place(number), number))

    def _turn(self, number: int) -> Iterator[Piece]:
        """Pieces of a file to the end of its turn, or of itself."""
        path = self.paths[number]
        read = _json_lines if path.suffix in LINE_SUFFIXES else _text_pieces
        inside = self._file is not None
        with _readable(path, lambda path: path.open("rb")) as file:
            file.seek(self._read[number])
            for piece in read(file, path, self.column):
                turns = self._read[number] // _TURN, file.tell() // _TURN
                over = self._by_turns and turns[0] != turns[1]
                self._read[number], self._file = file.tell(), None if over else number
                if piece.text.strip() or inside:
                    yield Piece(piece.text, piece.ends or over)
                if over:
                    return
                inside = not piece.ends
        self._read[number], self._file = max(self._read[number], path.stat().st_size), None

    def state_dict(self) -> dict[str, Any]:
        return {"read": list(self._read), "file": self._file}


def _readable(path: Path, use: Callable[[Path], Any]) -> Any:
    try:
        return use(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give a text file in UTF-8.") from None


class TextList(TextSource):
    """Documents in memory."""

    def __init__(self, documents: Sequence[str], seed: int | None = None):
        super().__init__(seed)
        self.documents = documents
        self._next = 0

    def begin(self, epoch: int, state: Mapping[str, Any] | None = None) -> None:
        super().begin(epoch, state)
        self._next = 0 if self._from is None else self._from["next"]

    def pieces(self) -> Iterator[Piece]:
        order = self._order(len(self.documents))
        while self._next < len(order):
            text = self.documents[order[self._next]]
            self._next += 1
            if text.strip():
                yield Piece(text, True)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}


class DatasetRows(TextSource):
    """A streaming dataset of `datasets`, each row a document; with a seed its shards are shuffled.

    Args:
        rows (`datasets.IterableDataset`)
        name: for messages.
        column: that holds the text.
        seed: of the order of the shards.

    Raises:
        ValueError: if there is no such column.
    """

    def __init__(self, rows: Any, name: str, column: str = "text", seed: int | None = None):
        super().__init__(seed)
        check_column(rows.column_names, name, column)
        if rows.column_names is not None:
            rows = rows.select_columns([column])
        self.rows = rows if seed is None else _with_shuffled_shards(rows, seed)
        self.name, self.column = name, column
        self._started = False

    def begin(self, epoch: int, state: Mapping[str, Any] | None = None) -> None:
        super().begin(epoch, state)
        self._started = False
        if self.seed is not None:
            self.rows.set_epoch(epoch)
        self.rows.load_state_dict((self._from or {}).get("rows"))

    def pieces(self) -> Iterator[Piece]:
        rows = iter(self.rows)
        while True:
            try:
                with _without_warnings():
                    row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise ValueError(unreadable(self.name, error)) from error
            self._started = True
            check_column(row.keys(), self.name, self.column)
            text = row[self.column]
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"Column {self.column!r} of {self.name} holds a {type(text).__name__}, but must hold text: name "
                    "another column."
                )
            if text and text.strip():
                yield Piece(text, True)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows.state_dict()} if self._started else dict(self._from or {})


def _with_shuffled_shards(rows: Any, seed: int) -> Any:
    """Only shards change places, one is read after the other, and the state of the dataset is exact."""
    options: dict[str, Any] = {"seed": seed, "buffer_size": 1}
    if "max_buffer_input_shards" in signature(rows.shuffle).parameters:
        options["max_buffer_input_shards"] = 1
    return rows.shuffle(**options)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """`datasets` would warn at each new start that a shuffle buffer is lost; it holds no row."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def open_source(
    source: Any,
    *,
    config: str | None = None,
    split: str = "train",
    column: str = "text",
    seed: int | None = None,
) -> TextSource:
    """Opens a text.

    Args:
        source: a file or folder, or several; documents in a list; an (iterable) dataset of `datasets`; `None` for the
            `pydoc` topics that every Python carries; or else the id of a dataset on the Hub, which is streamed.
            `.txt`, `.md` and `.jsonl` files are read here; `.parquet`, `.json`, `.csv`, `.arrow` and compressed files,
            and folders of them or of a dataset as on the Hub, by `datasets`.
        config, split: of a dataset.
        column: that holds the text, for `.jsonl` and `datasets`.
        seed: of the order of files, documents or shards; `None` keeps it.

    Raises:
        ValueError: if there is nothing to read, or no such column.
    """
    if source is None:
        from pydoc_data.topics import topics

        return TextList([topics[name] for name in sorted(topics)], seed)
    if isinstance(source, str | Path):
        if not Path(source).exists():
            _check_id(str(source))
            return DatasetRows(load_rows(str(source), config, split), f"dataset {str(source)!r}", column, seed)
        paths = [Path(source)]
    elif hasattr(source, "column_names"):
        rows = source if hasattr(source, "load_state_dict") else source.to_iterable_dataset()
        return DatasetRows(rows, "the dataset", column, seed)
    elif isinstance(source, Sequence) and source and all(isinstance(entry, Path) for entry in source):
        paths = list(source)
    elif isinstance(source, Sequence) and all(isinstance(entry, str) for entry in source):
        return TextList(list(source), seed)
    else:
        raise ValueError(
            f"The text is a {type(source).__name__}: give a path, paths, the id of a dataset, a list of strings, or "
            "a dataset."
        )
    files = [file for path in paths for file in files_of(path)]
    kinds = {_kind(file) for file in files}
    one_folder = len(paths) == 1 and paths[0].is_dir()
    if one_folder and (kinds - {"text", "lines"} or _describes_dataset(paths[0] / "README.md")):
        return DatasetRows(load_rows(str(paths[0]), config, split), str(paths[0]), column, seed)
    if kinds <= {"text", "lines"}:
        return TextFiles(files, column, seed)
    if len(kinds) > 1:
        raise ValueError(f"The files are of several kinds ({', '.join(sorted(kinds))}): give those of one kind.")
    rows = load_rows(kinds.pop(), None, "train", data_files=[str(file.resolve()) for file in files])
    return DatasetRows(rows, str(paths[0]), column, seed)


def files_of(path: Path) -> list[Path]:
    """The file itself, or the files with text in a folder, in the order of their names.

    Raises:
        ValueError: if there are none.
    """
    if not path.exists():
        raise ValueError(f"The text {str(path)!r} does not exist: give a file or folder that does.")
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and _named_kind(file) is not None)
    if not files:
        known = ", ".join((*TEXT_SUFFIXES, *LINE_SUFFIXES, *_LOADERS))
        raise ValueError(f"The folder {path} holds no text: give one with files of {known}.")
    return files


def _describes_dataset(readme: Path) -> bool:
    """Whether it says which files are which configuration and split."""
    return readme.is_file() and readme.read_text("utf-8", errors="replace").startswith("---")


def _kind(file: Path) -> str:
    """`text`, `lines`, or the loader of `datasets` for a file; a file of no known name is text."""
    return _named_kind(file) or "text"


def _named_kind(file: Path) -> str | None:
    suffix = file.suffix
    if suffix in _COMPRESSED:
        inner = Path(file.stem).suffix
        return "json" if inner in LINE_SUFFIXES else _LOADERS.get(inner)
    if suffix in LINE_SUFFIXES:
        return "lines"
    return "text" if suffix in TEXT_SUFFIXES else _LOADERS.get(suffix)


def load_rows(
    name: str, config: str | None = None, split: str = "train", *, streaming: bool = True, **more: Any
) -> Any:
    """A dataset of `datasets`, or a sentence why there is none.

    Raises:
        ValueError: if the package is missing or the dataset cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{name!r} is no text file or folder here, and to load it as a dataset the package `datasets` is missing: "
            "give a path that exists, or `pip install datasets`."
        ) from None
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming, **more)
    except Exception as error:  # every reason that datasets may have: one sentence with the remedy instead
        raise ValueError(unreadable(f"{name!r}", error)) from error


def unreadable(name: str, error: Exception) -> str:
    """What to say of a dataset that `datasets` does not give."""
    reason = " ".join(str(error).split())
    return (
        f"{name} is no file or folder here, or none of text, and `datasets` cannot load it "
        f"({type(error).__name__}: {reason[:300]}): give a path that exists or the id, config and split of a dataset, "
        "and look to the network."
    )


def check_column(columns: Any, name: str, column: str) -> None:
    """Raises a `ValueError` that names the columns there are."""
    if columns is not None and column not in columns:
        raise ValueError(
            f"{name[0].upper()}{name[1:]} has no column {column!r}, only {sorted(columns)}: name one of these as "
            "the text column."
        )


def text_of_line(line: str, column: str) -> str | None:
    """The text of a line of a `.jsonl` file; `None` if it holds none."""
    try:
        row: Any = json.loads(line)
        found = row if isinstance(row, str) else row[column]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def no_text(number: int, path: Path, column: str) -> ValueError:
    """The error for a line of a `.jsonl` file that holds no text; lines count from 1."""
    return ValueError(
        f"Line {number} of {path} holds no text: each line must be a JSON string or an object "
        f"with a string under the key {column!r}."
    )


def _check_id(source: str) -> None:
    if Path(source).suffix in (*TEXT_SUFFIXES, *LINE_SUFFIXES, *_LOADERS) or Path(source).is_absolute():
        raise ValueError(f"The text {source!r} is no file or folder here: give a path that exists, or a dataset id.")


def _json_lines(file: Any, path: Path, column: str) -> Iterator[Piece]:
    while line := file.readline():
        if not line.strip():
            continue
        text = text_of_line(_decoded(line, path), column)
        if text is None:
            end = file.tell()
            file.seek(0)
            raise no_text(file.read(end).rstrip(b"\n").count(b"\n") + 1, path, column)
        if text.strip():
            yield Piece(text, True)


def _text_pieces(file: Any, path: Path, _column: str) -> Iterator[Piece]:
    begun = file.tell() > 0
    run, size = b"", 0
    while line := file.readline(_LARGEST_PIECE):
        # a line that is too long is cut behind a whole character
        while not line.endswith(b"\n") and (more := file.peek(1)[:1]) and more[0] & 0xC0 == 0x80:
            line += file.read(1)
        run += line
        size += len(line)
        last = not file.peek(1)
        if last or size >= _LARGEST_PIECE or (size >= _LEAST_PIECE and not line.strip()):
            text = _decoded(run, path)
            if text.strip() or (last and begun):
                yield Piece(text, last)
                begun, run, size = True, b"", 0


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): give a text file in UTF-8.") from None
