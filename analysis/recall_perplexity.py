"""Loss split into associative recall and the rest, in nats per token.

A token is an associative-recall hit if it completes a pair of tokens that occurred before in the same window, so that
the answer could be looked up (Zoology, arXiv 2312.04927; JRT, arXiv 2407.05483, Figure 3). A pair that is frequent in
the training text is known by heart instead, so where these are given only the other pairs are hits.
"""

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .perplexity import document_tokens, window_losses


DISTANCES = (1, 16, 64, 256, 1024)


@dataclass
class LossSlice:
    """Loss of a part of the tokens.

    Attributes:
        nats: summed negative log-likelihood.
        tokens: how many tokens these are.
    """

    nats: float = 0.0
    tokens: int = 0

    @property
    def nats_per_token(self) -> float:
        """NaN without a token."""
        return self.nats / self.tokens if self.tokens else float("nan")

    def add(self, nats: float) -> None:
        self.nats += nats
        self.tokens += 1


@dataclass
class RecallLoss:
    """Loss by what a token asks of the model.

    Attributes:
        hits: tokens that complete an earlier pair of their window, unless the pair is a frequent one.
        rest: all other tokens.
        rare_rest: those of the rest whose pair is not a frequent one; `None` where no frequent pairs were given.
        hits_by_distance: hits by how many tokens ago the pair last ended; the key is the least distance of its class.
    """

    hits: LossSlice = field(default_factory=LossSlice)
    rest: LossSlice = field(default_factory=LossSlice)
    rare_rest: LossSlice | None = None
    hits_by_distance: dict[int, LossSlice] = field(default_factory=dict)


def frequent_bigrams(tokenizer: Any, documents: str | Iterable[str], *, more_than: int) -> set[tuple[int, int]]:
    """The pairs of neighbouring tokens that occur more than so often in documents, for `recall_loss`."""
    texts = [documents] if isinstance(documents, str) else documents
    counts = Counter(pair for text in texts for pair in pairwise(document_tokens(tokenizer, text)[0]))
    return {pair for pair, count in counts.items() if count > more_than}


def recall_loss(
    model: Any,
    tokenizer: Any,
    documents: str | Iterable[str],
    *,
    frequent: Container[tuple[int, int]] | None = None,
    distances: Sequence[int] = DISTANCES,
    **options: Any,
) -> RecallLoss:
    """Loss of `model` on associative-recall hits and on the rest.

    Args:
        model, tokenizer, documents, options: as in `held_out_loss`; the windows and the scored tokens are the same.
            A pair counts as having occurred wherever in the window it did, in an unscored prefix too.
        frequent (container of pairs of token ids, *optional*): pairs that are no hits because the model may know them
            by heart, from `frequent_bigrams` of its training text.
        distances (sequence of `int`): least distances, in tokens, of the classes of `hits_by_distance`, ascending from
            1.

    Raises:
        ValueError: for classes that do not ascend from 1, and as `held_out_loss`.
    """
    edges = list(distances)
    if edges[:1] != [1] or any(low >= high for low, high in pairwise(edges)):
        raise ValueError(f"`distances` is {edges}, but must ascend from 1, as in {list(DISTANCES)}.")
    texts = [documents] if isinstance(documents, str) else list(documents)
    result = RecallLoss(
        rare_rest=None if frequent is None else LossSlice(),
        hits_by_distance={edge: LossSlice() for edge in edges},
    )
    tokens = [document_tokens(tokenizer, text)[0] for text in texts]
    for window in window_losses(model, tokens, **options):
        first = len(window.tokens) - len(window.nats)
        losses = window.nats.tolist()
        last_end: dict[tuple[int, int], int] = {}
        for place, pair in enumerate(pairwise(window.tokens), 1):
            if place >= first:
                nats = losses[place - first]
                is_rare = frequent is None or pair not in frequent
                if is_rare and pair in last_end:
                    distance = place - last_end[pair]
                    result.hits.add(nats)
                    result.hits_by_distance[max(edge for edge in edges if edge <= distance)].add(nats)
                else:
                    result.rest.add(nats)
                    if result.rare_rest is not None and is_rare:
                        result.rare_rest.add(nats)
            last_end[pair] = place
    return result
