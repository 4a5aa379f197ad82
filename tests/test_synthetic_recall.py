"""Synthetic recall tasks: what every example must hold, how its parts are distributed, batches and accuracy."""

import dataclasses

import pytest
import torch

from varidepth.analysis.synthetic_recall import (
    MQAR_TEST,
    MQAR_TRAIN,
    SET_DISJOINTNESS_TEST,
    SET_DISJOINTNESS_TRAIN,
    MultiQueryRecall,
    SetDisjointness,
    batches,
    draw_all,
    recall_accuracy,
)


@pytest.mark.parametrize("sizes", [(3, 9), (9, 3), (1, 6), (25, 22)])
def test_sets_share_exactly_the_label(sizes):
    a, b = sizes
    examples = SetDisjointness(a, b, 300, vocab_size=51).draw(seed=1)
    assert examples.input_ids.shape == examples.labels.shape == (300, a + b + 3)
    assert (examples.labels[:, :-1] == -100).all()
    for row, label in zip(examples.input_ids.tolist(), examples.labels[:, -1].tolist(), strict=True):
        assert (row[0], row[a + 1], row[-1]) == (1, 2, 3)
        set_a, set_b = row[1 : a + 1], row[a + 2 : -1]
        assert len(set(set_a)) == a and len(set(set_b)) == b and min(set_a + set_b) >= 4
        assert set(set_a) & set(set_b) == {label}


def test_the_common_token_is_anywhere_in_either_set_and_any_token():
    examples = SetDisjointness(4, 5, 3000, vocab_size=24).draw(seed=0)
    common = examples.labels[:, -1:]
    for start, size in ((1, 4), (6, 5)):
        counts = (examples.input_ids[:, start : start + size] == common).sum(0)
        assert counts.tolist() == pytest.approx([3000 / size] * size, rel=0.2)
    assert common.flatten().bincount(minlength=24)[4:].tolist() == pytest.approx([150] * 20, rel=0.4)


@pytest.mark.parametrize("queries", [None, 2])
def test_every_query_is_a_key_and_its_label_the_value(queries):
    setting = MultiQueryRecall(length=31, pairs=5, examples=200, queries=queries, vocab_size=40)
    examples = setting.draw(seed=3)
    assert examples.input_ids.shape == examples.labels.shape == (200, 31)
    asked = 5 if queries is None else queries
    for row, labels in zip(examples.input_ids.tolist(), examples.labels.tolist(), strict=True):
        keys, values = row[0:10:2], row[1:10:2]
        assert len(set(keys)) == len(set(values)) == 5
        assert all(1 <= key < 20 for key in keys) and all(20 <= value < 40 for value in values)
        places = [place for place, label in enumerate(labels) if label != -100]
        assert len(places) == asked and all(place >= 10 and place % 2 == 0 for place in places)
        assert len({row[place] for place in places}) == asked
        value_of = dict(zip(keys, values, strict=True))
        assert all(labels[place] == value_of[row[place]] for place in places)
    unasked = examples.input_ids[:, 10:][examples.labels[:, 10:] == -100]
    assert set(unasked.tolist()) == set(range(40))


def test_gaps_follow_the_power_law():
    examples = MultiQueryRecall(length=22, pairs=1, examples=20_000, vocab_size=64, power=0.1).draw(seed=0)
    weights = torch.arange(1, 11) ** -0.9
    found = (examples.labels[:, 2::2] != -100).float().mean(0)
    assert found.tolist() == pytest.approx((weights / weights.sum()).tolist(), abs=0.01)


def test_examples_follow_from_the_master_seed():
    setting = SetDisjointness(3, 4, 50, vocab_size=64)
    first, second = draw_all([setting, setting], seed=123)
    again, _ = draw_all([setting, setting], seed=123)
    other, _ = draw_all([setting, setting], seed=2)
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.input_ids, second.input_ids) and not torch.equal(first.input_ids, other.input_ids)


def test_batches_never_mix_settings_and_hold_every_example_once():
    sizes = ((2, 5), (5, 2), (1, 1))
    examples = draw_all([SetDisjointness(a, b, 50, vocab_size=64) for a, b in sizes], seed=0)
    epoch = list(batches(examples, 16, seed=0))
    assert len(epoch) == 3 * 4 and {len(ids) for ids, _ in epoch} == {16, 2}
    rows = {tuple(row) for ids, _ in epoch for row in ids.tolist()}
    assert rows == {tuple(row) for one in examples for row in one.input_ids.tolist()}
    for ids, labels in epoch:
        # the second separator stands where the setting puts it
        assert len({int(place) for place in (ids == 2).nonzero()[:, 1]}) == 1 and labels.shape == ids.shape
    lengths = [ids.shape[1] for ids, _ in epoch]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)
    assert not torch.equal(epoch[0][0], next(batches(examples, 16, seed=1))[0])


def test_accuracy_counts_labels_only():
    labels = torch.tensor([[-100, 2, -100], [1, -100, 0]])
    logits = torch.zeros(2, 3, 4)
    logits[0, 1, 2] = logits[1, 0, 1] = logits[1, 2, 3] = 1.0
    assert recall_accuracy(logits, labels) == pytest.approx(2 / 3)
    assert recall_accuracy(logits[:, -1:], labels[:, -1:]) == 0.0
    with pytest.raises(ValueError, match="labels of the same positions"):
        recall_accuracy(logits[:, -1:], labels)
    with pytest.raises(ValueError, match="All labels are -100"):
        recall_accuracy(logits[:1, :1], labels[:1, :1])


def test_the_settings_of_the_papers():
    assert sum(setting.examples for setting in SET_DISJOINTNESS_TRAIN) == 240_000
    assert sum(setting.examples for setting in SET_DISJOINTNESS_TEST) == 20_000
    assert {(s.size_b, s.size_a) for s in SET_DISJOINTNESS_TEST} == {
        (s.size_a, s.size_b) for s in SET_DISJOINTNESS_TEST
    }
    assert sum(setting.examples for setting in MQAR_TRAIN) == 180_000
    assert (MQAR_TEST[-1].length, MQAR_TEST[-1].pairs, MQAR_TEST[-1].vocab_size) == (1024, 256, 8192)
    for setting in (*SET_DISJOINTNESS_TRAIN, *SET_DISJOINTNESS_TEST, *MQAR_TRAIN, *MQAR_TEST):
        assert dataclasses.replace(setting, examples=2).draw(0).input_ids.max() < setting.vocab_size


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SetDisjointness(1025, 4, 8), "sets have 1 to 1024 and 1 to 1020 tokens"),
        (lambda: SetDisjointness(4, 0, 8), "give smaller sets or a larger vocabulary"),
        (lambda: SetDisjointness(4, 4, 0), "at least 1 example"),
        (lambda: MultiQueryRecall(64, 17, 8), r"room for 15\).* give a greater `length`"),
        (lambda: MultiQueryRecall(64, 4, 8, queries=5), "4 pairs and 5 queries"),
        (lambda: MultiQueryRecall(64, 10, 8, vocab_size=20), "a vocabulary of 20 has 9 keys"),
        (lambda: next(batches([], 0, seed=0)), "`batch_size` is 0"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
