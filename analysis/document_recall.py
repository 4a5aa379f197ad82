"""Recall of facts that are planted in real documents, asked for by a cloze question behind them.

Every document gets one fact per depth, such as "Password of Velmora: Tarikel." at its start, its middle and its end,
with names that no text holds, and the model continues "Password of Velmora:". The other facts of the document are what
it could be mistaken for. A prompt shows the document in one of the orders of `ORDERS`; "twice" is that of JRT-Prompt
(arXiv 2407.05483).
"""

import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from .contains import contains
from .unseen_targets import evaluating, pad_rows


ORDERS = {
    "after": "{document}\n{attribute}:",
    "before_and_after": "Information about {attribute}. {document}\n{attribute}:",
    "twice": "Information about {attribute}. {document}\n{document}\n{attribute}:",
}
DEPTHS = (0.0, 0.5, 1.0)
KINDS = ("Password", "Birthplace", "Codename", "Employer", "Landlord", "Hometown", "Surname", "Supplier")


@dataclass(frozen=True)
class RecallQuestion:
    """One question about a document.

    Attributes:
        document: the text, with all facts in it.
        attribute: what is asked for, "Password of Velmora".
        value: the answer, "Tarikel".
        depth: where in the document the answer stands, from 0 (start) to 1 (end).
    """

    document: str
    attribute: str
    value: str
    depth: float

    def prompt(self, order: str) -> str:
        """The prompt in an order of `ORDERS`; it ends in the colon that the value follows."""
        return ORDERS[order].format(document=self.document, attribute=self.attribute)


@dataclass(frozen=True)
class RecallShare:
    """Answered questions.

    Attributes:
        correct: questions whose continuation contains the value.
        questions: all of them.
    """

    correct: int
    questions: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, for questions that are independent of each other."""
        z, n, p = 1.96, self.questions, self.accuracy
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        scale = 1 + z * z / n
        return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@dataclass(frozen=True)
class DocumentRecall:
    """Recall by order and depth.

    Attributes:
        shares: the questions of each pair of order and depth.
    """

    shares: dict[tuple[str, float], RecallShare]

    def of_order(self, order: str) -> RecallShare:
        """All depths of an order."""
        shares = [share for (name, _), share in self.shares.items() if name == order]
        return RecallShare(sum(share.correct for share in shares), sum(share.questions for share in shares))

    def table(self) -> str:
        """A Markdown table: accuracy with its interval, in percent."""

        def cell(share: RecallShare) -> str:
            low, high = share.interval
            return f"{share.accuracy:.1%} ({low:.1%} to {high:.1%})"

        orders = list(dict.fromkeys(order for order, _ in self.shares))
        depths = list(dict.fromkeys(depth for _, depth in self.shares))
        lines = ["| order | " + " | ".join(f"depth {depth:g}" for depth in depths) + " | all |"]
        lines += ["|---|" + "---|" * (len(depths) + 1)]
        for order in orders:
            cells = [cell(self.shares[order, depth]) for depth in depths] + [cell(self.of_order(order))]
            lines += [f"| {order} | " + " | ".join(cells) + " |"]
        return "\n".join(lines)


def recall_questions(
    documents: Iterable[str], *, depths: Sequence[float] = DEPTHS, seed: int = 0
) -> list[RecallQuestion]:
    """Plants a fact per depth in every document and asks for each.

    A fact is a sentence of its own, at the end of a sentence or, where there is none near, between two words.

    Args:
        documents (iterable of `str`): real texts; blank ones are left out.
        depths (sequence of `float`): where facts stand, from 0 (start) to 1 (end), ascending.
        seed (`int`): of the names.

    Raises:
        ValueError: no text, or depths that do not ascend within 0 to 1.
    """
    ascending = list(depths) == sorted(set(depths)) and all(0 <= depth <= 1 for depth in depths)
    if not ascending or not 1 <= len(depths) <= len(KINDS):
        raise ValueError(
            f"`depths` is {list(depths)}, but must be 1 to {len(KINDS)} numbers that ascend from 0 (start) to 1 (end)."
        )
    draw, questions = random.Random(seed), []
    for text in (text.strip() for text in documents):
        if not text:
            continue
        attributes = [f"{kind} of {_name(draw)}" for kind in draw.sample(KINDS, len(depths))]
        values = [_name(draw) for _ in depths]
        planted, last = [], 0
        for depth, attribute, value in zip(depths, attributes, values, strict=True):
            place = max(_boundary(text, round(depth * len(text))), last)
            planted += [text[last:place].strip(), f"{attribute}: {value}."]
            last = place
        document = " ".join(part for part in (*planted, text[last:].strip()) if part)
        questions += [
            RecallQuestion(document, attribute, value, depth)
            for depth, attribute, value in zip(depths, attributes, values, strict=True)
        ]
    if not questions:
        raise ValueError("There is no text to plant facts in; give documents with some words.")
    return questions


def document_recall(
    model: Any,
    tokenizer: Any,
    questions: Sequence[RecallQuestion],
    *,
    orders: Sequence[str] = tuple(ORDERS),
    batch_size: int = 8,
    max_new_tokens: int = 24,
    progress: bool = False,
) -> DocumentRecall:
    """Share of questions that `model` answers, by order of the prompt and depth of the fact.

    It continues each prompt greedily; what it writes on the first line is right if it contains the value, letter case
    aside. Prompts are not cut: the document, twice for "twice", must fit into the model.

    Args:
        model (`PreTrainedModel`): any model that can `generate`; in eval mode for the call. One that reads a prefix
            reads the prompt as such.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, with whose special tokens a prompt starts.
        questions (sequence of `RecallQuestion`): from `recall_questions`.
        orders (sequence of `str`): keys of `ORDERS`.
        batch_size (`int`): prompts per call of `generate`, which are padded on the left.
        max_new_tokens (`int`): tokens to write at most.
        progress (`bool`): show a progress bar.

    Raises:
        ValueError: no question, an order that does not exist, or a size below 1.
    """
    if unknown := [order for order in orders if order not in ORDERS]:
        raise ValueError(f"`orders` holds {unknown[0]!r}, but orders are {', '.join(ORDERS)}; give some of these.")
    if not questions or not orders:
        raise ValueError(
            "There is nothing to ask; give at least one question, from `recall_questions`, and one order."
        )
    for name, size in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if size < 1:
            raise ValueError(f"`{name}` is {size}, but must be at least 1.")
    asked = [(order, question) for order in orders for question in questions]
    rows = [tokenizer(question.prompt(order), verbose=False)["input_ids"] for order, question in asked]
    # neighbours in length waste few pads
    by_length = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    correct: dict[tuple[str, float], list[bool]] = {(order, question.depth): [] for order, question in asked}
    with evaluating(model):
        steps = range(0, len(rows), batch_size)
        for start in tqdm(steps, desc="document recall", unit="batch", disable=not progress):
            batch = by_length[start : start + batch_size]
            written = _continuations(model, tokenizer, [rows[number] for number in batch], max_new_tokens)
            for number, text in zip(batch, written, strict=True):
                order, question = asked[number]
                correct[order, question.depth] += [contains(text.partition("\n")[0], question.value)]
    return DocumentRecall({key: RecallShare(sum(right), len(right)) for key, right in correct.items()})


@torch.no_grad()
def _continuations(model: Any, tokenizer: Any, rows: list[list[int]], max_new_tokens: int) -> list[str]:
    """What greedy generation writes behind each row."""
    ids, mask = pad_rows(rows, model.device, left=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
    )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def _name(draw: random.Random) -> str:
    """A made-up name."""
    syllables = [draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3)]
    return "".join(syllables).capitalize() + draw.choice("lnrs")


def _boundary(text: str, place: int) -> int:
    """The end of a sentence nearest to a place, or the end of a word if there is none within a tenth of the text."""
    if place in (0, len(text)):
        return place
    for pattern in (r"[.!?]['\")]*\s", r"\s"):
        ends = [match.end() for match in re.finditer(pattern, text)]
        near = [end for end in ends if abs(end - place) <= max(len(text) // 10, 1)]
        if near:
            return min(near, key=lambda end: abs(end - place))
    return place
