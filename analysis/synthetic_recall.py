"""Synthetic recall tasks: set disjointness (JRT, arXiv 2407.05483) and multi-query associative recall (Zoology).

    train = draw_all(SET_DISJOINTNESS_TRAIN, seed=123)
    for input_ids, labels in batches(train, 128, seed=0):
        ...

Labels are aligned with the logits, as in the papers: the label at a position is what the logits at this position
should predict. So they are not the `labels` of a `forward`, which shifts them; train on
`cross_entropy(logits.flatten(0, 1), labels.flatten())`, which leaves -100 out, and measure with `recall_accuracy`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


NO_LABEL = -100
CHUNK = 2048  # examples drawn at once: a chunk of random numbers over the vocabulary stays below 70 MB


@dataclass(frozen=True)
class RecallExamples:
    """Examples of one setting.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(examples, length)`): the tokens; there are no pads.
        labels (`torch.LongTensor` of shape `(examples, length)`): what to predict at each position, or -100.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor


class RecallSetting(Protocol):
    """A task in one size."""

    def draw(self, seed: int) -> RecallExamples: ...


@dataclass(frozen=True)
class SetDisjointness:
    """Which token of set A is also in set B? (JRT, Algorithm 1 and Figure 2.)

    An input is `[1] A [2] B [3]`, of `size_a + size_b + 3` tokens; the label of its last position is the one token
    that both sets hold. The ids from 4 on are dealt anew into a half for A and a half for B in each example, as in the
    authors' code: with fixed halves, as in the algorithm's text, the common token could be told by its id. It stands
    in B in place of one of B's own, drawn at random.

    Attributes:
        size_a, size_b: tokens of the sets.
        examples: how many to draw.
        vocab_size: 0 is a mask token that no example holds, 1 to 3 are the marks.

    Raises:
        ValueError: a set larger than its half of the vocabulary, or a size below 1.
    """

    size_a: int
    size_b: int
    examples: int
    vocab_size: int = 2048

    def __post_init__(self) -> None:
        # the half of A is a half of all ids, marks included
        half_a = self.vocab_size // 2
        half_b = self.vocab_size - 4 - half_a
        if not (1 <= self.size_a <= half_a and 1 <= self.size_b <= half_b and self.examples >= 1):
            raise ValueError(
                f"{self.examples} examples with sets of {self.size_a} and {self.size_b} tokens were asked for, but "
                f"with a vocabulary of {self.vocab_size} sets have 1 to {half_a} and 1 to {half_b} tokens; give "
                "smaller sets or a larger vocabulary, and at least 1 example."
            )

    def draw(self, seed: int) -> RecallExamples:
        """The examples of a seed."""
        generator = torch.Generator().manual_seed(seed)
        # distinct ids in random order: as good as dealing out all ids and drawing from each half
        dealt = 4 + _distinct(torch.ones(self.vocab_size - 4), self.examples, self.size_a + self.size_b, generator)
        a, b = dealt.split([self.size_a, self.size_b], dim=1)
        common = a.gather(1, torch.randint(self.size_a, (self.examples, 1), generator=generator))
        b = b.scatter(1, torch.randint(self.size_b, (self.examples, 1), generator=generator), common)
        marks = torch.tensor([1, 2, 3]).expand(self.examples, 3)
        input_ids = torch.cat([marks[:, :1], a, marks[:, 1:2], b, marks[:, 2:]], dim=1)
        labels = torch.full_like(input_ids, NO_LABEL)
        labels[:, -1:] = common
        return RecallExamples(input_ids, labels)


@dataclass(frozen=True)
class MultiQueryRecall:
    """Multi-query associative recall, MQAR (Zoology, arXiv 2312.04927).

    An input starts with `pairs` pairs of key and value, `2 * pairs` tokens. Behind them keys stand again, at even
    offsets and each once; the label there is the value of the key. Offset `2 g` is drawn with a weight of
    `(g + 1) ** (power - 1)`, so that near ones are likelier. Keys are distinct ids of 1 to V/2 - 1, values
    distinct ids of V/2 to V - 1; all other tokens behind the pairs are random ids.

    Attributes:
        length: tokens of an input.
        pairs: pairs of key and value.
        examples: how many to draw.
        queries: how many of the keys are asked for, drawn at random; all of them by default, as in the paper.
        vocab_size: V.
        power: exponent of the gaps' distribution.

    Raises:
        ValueError: more queries than places for them, more pairs than keys, more queries than pairs.
    """

    length: int
    pairs: int
    examples: int
    queries: int | None = None
    vocab_size: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        places, keys, asked = (self.length - 2 * self.pairs) // 2, self.vocab_size // 2 - 1, self.asked
        if not (1 <= asked <= min(places, self.pairs) and self.pairs <= keys and self.examples >= 1):
            raise ValueError(
                f"{self.examples} examples of {self.length} tokens with {self.pairs} pairs and {asked} queries were "
                f"asked for, but a vocabulary of {self.vocab_size} has {keys} keys, and queries need two tokens each "
                f"behind the pairs (room for {places}) and a pair each; give a greater `length` or `vocab_size`, or "
                "fewer pairs or queries, and at least 1 of each."
            )

    @property
    def asked(self) -> int:
        """Queries per example."""
        return self.pairs if self.queries is None else self.queries

    def draw(self, seed: int) -> RecallExamples:
        """The examples of a seed."""
        generator = torch.Generator().manual_seed(seed)
        half, told = self.vocab_size // 2, 2 * self.pairs
        keys = 1 + _distinct(torch.ones(half - 1), self.examples, self.pairs, generator)
        values = half + _distinct(torch.ones(self.vocab_size - half), self.examples, self.pairs, generator)
        weights = torch.arange(1, (self.length - told) // 2 + 1) ** (self.power - 1)
        places = told + 2 * _distinct(weights, self.examples, self.asked, generator)
        input_ids = torch.randint(self.vocab_size, (self.examples, self.length), generator=generator)
        input_ids[:, 0:told:2], input_ids[:, 1:told:2] = keys, values
        labels = torch.full_like(input_ids, NO_LABEL)
        # keys are in random order, so the first ones are a random choice
        input_ids.scatter_(1, places, keys[:, : self.asked])
        labels.scatter_(1, places, values[:, : self.asked])
        return RecallExamples(input_ids, labels)


_SIZES = ((4, 16), (8, 32), (64, 16), (4, 128), (16, 256), (4, 256))
_TEST_SIZES = ((1, 32), (4, 32), (4, 128), (16, 256), (4, 256), (16, 512), (4, 512), (8, 768), (16, 768), (4, 768))
SET_DISJOINTNESS_TRAIN = tuple(SetDisjointness(*size, 20_000) for pair in _SIZES for size in (pair, pair[::-1]))
SET_DISJOINTNESS_TEST = tuple(SetDisjointness(*size, 1_000) for pair in _TEST_SIZES for size in (pair, pair[::-1]))
MQAR_TRAIN = (
    MultiQueryRecall(64, 4, 100_000),
    MultiQueryRecall(128, 8, 20_000),
    MultiQueryRecall(256, 16, 20_000),
    MultiQueryRecall(256, 32, 20_000),
    MultiQueryRecall(256, 64, 20_000),
)
MQAR_TEST = tuple(
    MultiQueryRecall(length, pairs, 1_000)
    for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
)


def draw_all(settings: Sequence[RecallSetting], seed: int) -> list[RecallExamples]:
    """The examples of each setting, every one from a seed of its own that follows from the master seed `seed`.

    Training and test examples of one setting need different master seeds, or one call for both.
    """
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**31, (len(settings),), generator=generator).tolist()
    return [setting.draw(one) for setting, one in zip(settings, seeds, strict=True)]


def batches(
    examples: Sequence[RecallExamples], batch_size: int, *, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch in random order: `input_ids` and `labels` of shape `(batch, length)`, never of two settings at once.

    The last batch of each setting may be smaller.

    Raises:
        ValueError: for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}, but must be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    rows = [
        (one, part)
        for one in examples
        for part in torch.randperm(len(one.input_ids), generator=generator).split(batch_size)
    ]
    for number in torch.randperm(len(rows), generator=generator).tolist():
        one, part = rows[number]
        yield one.input_ids[part], one.labels[part]


def recall_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the labels that the logits rank first.

    Args:
        logits (`torch.Tensor` of shape `(batch, length, vocabulary)`): all of a model's, or its last ones.
        labels (`torch.LongTensor` of shape `(batch, length)`): of the same positions; -100 does not count.

    Raises:
        ValueError: shapes that do not fit, or no label.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} have no label each in labels of shape {tuple(labels.shape)}; give "
            "the labels of the same positions."
        )
    asked = labels != NO_LABEL
    if not asked.any():
        raise ValueError(f"All labels are {NO_LABEL}, so nothing was asked; give the positions that have one.")
    return float((logits.argmax(-1)[asked] == labels[asked]).float().mean())


def _distinct(weights: torch.Tensor, rows: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draws `count` indices of `weights` per row one after another, none twice: shape `(rows, count)`.

    Every index has a clock that rings after an exponential time of rate `weights`; those that ring first are drawn.
    """
    parts = []
    for start in range(0, rows, CHUNK):
        times = torch.empty(min(CHUNK, rows - start), len(weights)).exponential_(generator=generator)
        parts.append((times / weights).topk(count, largest=False).indices)
    return torch.cat(parts)
