"""The loss of associative-recall hits against a search through every window."""

import math

import pytest
from prefix_reader import PrefixReader
from real_text import VOCABULARY, text_tokenizer

from varidepth.analysis.perplexity import held_out_loss
from varidepth.analysis.recall_perplexity import frequent_bigrams, recall_loss


TEXTS = [
    "The clerk wrote the code of Tavori into the book. The code of Tavori is kept in the book of the clerk.",
    "one and one and one and one is four and two and two is four",
]
WINDOW = 44


def token_windows() -> list[list[int]]:
    rows = [[1, *text_tokenizer()(text, add_special_tokens=False)["input_ids"]] for text in TEXTS]
    return [row[i : i + WINDOW] for row in rows for i in range(0, len(row) - 1, WINDOW - 1)]


def slow_slices(model, first: int, frequent=()) -> dict[str, list[float]]:
    """Losses by kind of token; the last place of a pair is searched for from the back."""
    slices: dict[str, list[float]] = {"hits": [], "rest": [], "rare_rest": [], "near": [], "far": []}
    for window in token_windows():
        for i in range(first, len(window)):
            pair = (window[i - 1], window[i])
            nats = -float(model.bigrams.log_softmax(-1)[pair])
            places = [j for j in range(i - 1, 0, -1) if (window[j - 1], window[j]) == pair]
            if places and pair not in frequent:
                slices["hits"].append(nats)
                slices["near" if i - places[0] < 4 else "far"].append(nats)
            else:
                slices["rest"].append(nats)
                slices["rare_rest"] += [nats] if pair not in frequent else []
    return slices


def check(found, expected: list[float]) -> None:
    assert expected and found.tokens == len(expected)
    assert found.nats == pytest.approx(sum(expected), rel=1e-5)
    assert found.nats_per_token == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize(("prefix_length", "reads"), [(None, 0), (6, 0), (6, 64)])
def test_hits_and_the_rest(prefix_length, reads):
    model, tokenizer = PrefixReader(VOCABULARY, reads), text_tokenizer()
    options = {"window": WINDOW, "batch_size": 2, "prefix_length": prefix_length}
    loss = recall_loss(model, tokenizer, TEXTS, distances=(1, 4, 500), **options)
    expected = slow_slices(model, prefix_length or 1)
    check(loss.hits, expected["hits"])
    check(loss.rest, expected["rest"])
    check(loss.hits_by_distance[1], expected["near"])
    check(loss.hits_by_distance[4], expected["far"])
    assert loss.rare_rest is None and loss.hits_by_distance[500].tokens == 0
    assert math.isnan(loss.hits_by_distance[500].nats_per_token)
    whole = held_out_loss(model, tokenizer, TEXTS, **options)
    assert loss.hits.tokens + loss.rest.tokens == whole.tokens
    assert loss.hits.nats + loss.rest.nats == pytest.approx(whole.nats, rel=1e-5)


def test_frequent_pairs_are_no_hits():
    model, tokenizer = PrefixReader(VOCABULARY, 0), text_tokenizer()
    frequent = frequent_bigrams(tokenizer, TEXTS[1], more_than=2)
    assert frequent and frequent < frequent_bigrams(tokenizer, TEXTS[1], more_than=1)
    loss = recall_loss(model, tokenizer, iter(TEXTS), frequent=frequent, window=WINDOW)
    expected = slow_slices(model, 1, frequent)
    assert len(expected["hits"]) < len(slow_slices(model, 1)["hits"])
    for name in ("hits", "rest", "rare_rest"):
        check(getattr(loss, name), expected[name])


def test_what_is_refused():
    tokenizer = text_tokenizer()
    for distances in ((), (0, 4), (1, 4, 4)):
        with pytest.raises(ValueError, match="must ascend from 1"):
            recall_loss(PrefixReader(VOCABULARY, 0), tokenizer, TEXTS, distances=distances)
    with pytest.raises(ValueError, match="No `prefix_length` was given"):
        recall_loss(PrefixReader(VOCABULARY, 64), tokenizer, TEXTS)
