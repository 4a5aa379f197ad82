"""Batches of JRT-RNN, token by token as the paper and its code make them."""

import pytest
import torch
from tiny_jrt import MASK, tiny_jrt, tokens
from torch.utils.data import DataLoader

from varidepth import JRTConfig
from varidepth.training.jrt_collator import JRTCollator


def rows(*lengths: int, **fields):
    return [{"input_ids": tokens(n, seed=i).tolist(), **fields} for i, n in enumerate(lengths)]


def written_out(ids: list[int], masked: set[int], prefix: int, learned=None) -> tuple[list[int], list[int]]:
    """Inputs and labels of one row, from its definition."""
    inputs, labels = list(ids), []
    for place, token in enumerate(ids):
        if place in masked:
            inputs[place] = MASK
        known = place in masked if place < prefix else place > 0
        labels.append(token if known and (place < prefix or learned is None or learned[place]) else -100)
    return inputs, labels


def check(batch, examples, prefixes, side="right", learned=None):
    """Every row is that of `written_out` for the places that are masked in it, and padded at one side."""
    width = batch["input_ids"].shape[1]
    assert all(batch[name].dtype == torch.long for name in batch)
    assert batch["prefix_length"].tolist() == prefixes
    for row, (example, prefix) in enumerate(zip(examples, prefixes, strict=True)):
        ids = torch.as_tensor(example["input_ids"]).tolist()
        pads = width - len(ids)
        here = slice(pads, None) if side == "left" else slice(0, len(ids))
        inputs = batch["input_ids"][row, here].tolist()
        masked = {place for place, token in enumerate(inputs) if token == MASK}
        assert all(place < prefix for place in masked)
        expected = written_out(ids, masked, prefix, None if learned is None else learned[row])
        assert (inputs, batch["labels"][row, here].tolist()) == expected
        outside = torch.ones(width, dtype=torch.bool)
        outside[here] = False
        assert batch["attention_mask"][row].tolist() == (~outside).long().tolist()
        assert (batch["labels"][row, outside] == -100).all() and (batch["input_ids"][row, outside] == 0).all()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prefix", [0, 1, 4, 9])
def test_every_token_of_a_batch(side, prefix):
    """Prefixes of a number, for lists and tensors; a row of fewer tokens is all prefix."""
    examples = rows(12, 5, 9)
    examples[1]["input_ids"] = torch.tensor(examples[1]["input_ids"])
    collator = JRTCollator(MASK, prefix, mlm_probability=0.5, padding_side=side)
    check(collator(examples), examples, [min(prefix, n) for n in (12, 5, 9)], side)


def test_prefixes_of_the_examples_go_before_that_of_the_collator():
    examples = rows(8, 8)
    examples[0]["prefix_length"] = torch.tensor(7)
    check(JRTCollator(MASK, 3, mlm_probability=0.5)(examples), examples, [7, 3])
    examples[1]["prefix_length"] = 0
    check(JRTCollator(MASK, mlm_probability=0.5)(examples), examples, [7, 0])


@pytest.mark.parametrize("side", ["right", "left"])
def test_prompts_are_prefixes(side):
    """By labels as of supervised fine-tuning and by a completion mask; what is not learned behind stays so."""
    learned = [[0, 0, 0, 1, 1, 0, 0, 1], [0, 0, 1, 1, 1]]
    examples = rows(8, 5)
    by_mask = [{**row, "completion_mask": mask} for row, mask in zip(examples, learned, strict=True)]
    by_labels = [
        {**row, "labels": [t if m else -100 for t, m in zip(row["input_ids"], mask, strict=True)]}
        for row, mask in zip(examples, learned, strict=True)
    ]
    for marked in (by_mask, by_labels):
        collator = JRTCollator(MASK, "prompt", mlm_probability=0.5, padding_side=side)
        check(collator(marked), marked, [3, 2], side, learned)
        check(JRTCollator(MASK, 1, padding_side=side)(marked), marked, [1, 1], side, learned)


def test_tokens_that_an_example_masks_are_pads():
    padded = {"input_ids": [9, 0, 7, 8, 5, 6], "attention_mask": [1, 0, 1, 1, 1, 1]}
    batch = JRTCollator(MASK, 3, mlm_probability=1.0)([padded])
    assert batch["input_ids"].tolist() == [[MASK, 0, MASK, MASK, 5, 6]]
    assert batch["labels"].tolist() == [[9, -100, 7, 8, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 0, 1, 1, 1, 1]]


def test_masks_are_fresh_and_as_frequent_as_told():
    torch.manual_seed(0)
    examples = rows(*[300] * 40)
    collator = JRTCollator(MASK, 250)
    first, second = collator(examples)["input_ids"], collator(examples)["input_ids"]
    masked = first == MASK
    assert not torch.equal(first, second)
    assert not masked[:, 250:].any()
    # 10,000 independent draws: four standard deviations
    assert masked[:, :250].float().mean().item() == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / 10_000) ** 0.5)
    assert masked[:, :250].float().mean(dim=0).max() < 0.5 and masked[:, :250].float().mean(dim=1).max() < 0.3


def test_a_seed_masks_a_batch_that_comes_again_as_before():
    examples = rows(*[30] * 4)
    collator = JRTCollator(MASK, 20, seed=7)
    found = collator(examples)["input_ids"]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert torch.equal(collator(examples)["input_ids"], found)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    workers = DataLoader(examples, batch_size=4, collate_fn=collator, num_workers=1)
    assert torch.equal(next(iter(workers))["input_ids"], found)
    for other in (JRTCollator(MASK, 20, seed=8)(examples), collator(examples[::-1])):
        assert not torch.equal(other["input_ids"] == MASK, found == MASK)


def test_special_tokens_stay_if_asked_and_mask_tokens_are_no_target():
    ids = [1, MASK, 5, 2, 6, 7]
    batch = JRTCollator(MASK, 5, mlm_probability=1.0, unmasked_token_ids=[1, 2])([{"input_ids": ids}])
    assert batch["input_ids"].tolist() == [[1, MASK, MASK, 2, MASK, 7]]
    assert batch["labels"].tolist() == [[-100, -100, 5, -100, 6, 7]]


@pytest.mark.parametrize("fields", [{"mask_token_id": None}, {"mask_token_id": MASK, "mlm_probability": 0.0}])
def test_a_plain_prefix_language_model(fields):
    examples = rows(9, 6)
    batch = JRTCollator(prefix_length=4, **fields)(examples)
    check(batch, examples, [4, 4])
    assert (batch["labels"][:, :4] == -100).all() and not (batch["input_ids"] == MASK).any()


def test_row_lengths_are_multiples():
    examples = rows(9, 6)
    for side in ("right", "left"):
        batch = JRTCollator(MASK, 4, padding_side=side, pad_to_multiple_of=8)(examples)
        assert batch["input_ids"].shape == (2, 16)
        check(batch, examples, [4, 4], side)


def test_a_model_tells_its_tokens_and_prefix():
    config = JRTConfig()
    assert JRTCollator.from_model_config(config) == JRTCollator(50263, 1024)
    assert JRTCollator.from_model_config(config, prefix_length="prompt", seed=1) == JRTCollator(
        50263, "prompt", seed=1
    )
    config = tiny_jrt(mask_token_id=None, pad_token_id=2).config
    assert JRTCollator.from_model_config(config, mask_token_id=None) == JRTCollator(None, 6, pad_token_id=2)
    with pytest.raises(ValueError, match="config.mask_token_id is None"):
        JRTCollator.from_model_config(config)


def test_a_row_without_a_next_token_is_reported(monkeypatch):
    said = []
    monkeypatch.setattr("varidepth.training.jrt_collator.logger.warning_once", said.append)
    collator = JRTCollator(MASK, 8, mlm_probability=1.0)
    collator(rows(10, 9))
    assert not said
    batch = collator(rows(8, 10))
    assert "a row lies wholly in its prefix" in said[0]
    assert (batch["labels"][0, :8] != -100).all()


@pytest.mark.parametrize(
    ("fields", "examples", "message"),
    [
        ({"mlm_probability": 1.5}, None, "mlm_probability=1.5 is no probability: give a number from 0 to 1"),
        ({"prefix_length": -1}, None, "prefix_length=-1 counts tokens: give at least 0, or 'prompt'"),
        ({"prefix_length": "prompts"}, None, "`prefix_length` is 'prompts', but must be one of 'prompt'"),
        ({"padding_side": "both"}, None, "`padding_side` is 'both', but must be one of 'right', 'left'"),
        ({"prefix_length": None}, rows(4), "of an example of 4 tokens is None: give a number from 0 to 4"),
        ({}, rows(4, prefix_length=5), "of an example of 4 tokens is 5: give a number from 0 to 4"),
        ({"prefix_length": "prompt"}, rows(4), "neither labels nor completion_mask .* remove_unused_columns=False"),
        ({}, rows(4, labels=[1, 2, 3]), r"`labels` of an example has shape \(3,\), but `input_ids` \(4,\)"),
        ({}, [{"input_ids": [[1, 2]]}], r"has shape \(1, 2\): give one row of tokens"),
    ],
)
def test_refused(fields, examples, message):
    with pytest.raises(ValueError, match=message):
        JRTCollator(**{"mask_token_id": MASK, "prefix_length": 2, **fields})(examples)
