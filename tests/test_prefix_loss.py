"""The objective of JRT-RNN: by hand, in the layout of the official code, and never on a token that was seen."""

import math

import pytest
import torch
from tiny_jrt import MASK, VOCABULARY, tiny_jrt, tokens

from varidepth.modeling import prefix_loss
from varidepth.modeling.prefix_loss import IGNORED, prefix_lm_loss
from varidepth.modeling.prefix_tokens import find_prefix
from varidepth.training.jrt_collator import JRTCollator


# ids 0 to 2 and the mask token 3; what each position says of the token that it is to name, as a power of two
TOKENS = torch.tensor([[0, 1, 2, 1, 0, 2]])
INPUTS = torch.tensor([[3, 1, 2, 1, 0, 2]])
LABELS = torch.tensor([[0, IGNORED, IGNORED, 1, 0, 2]])
BITS = {(0, 0): 1, (2, 1): 4, (3, 0): 3, (4, 2): 1}


def spoken_logits() -> torch.Tensor:
    probabilities = torch.full((1, 6, 4), 0.25, dtype=torch.float64)
    for (place, token), bits in BITS.items():
        probabilities[0, place] = (1 - 2.0**-bits) / 3
        probabilities[0, place, token] = 2.0**-bits
    return probabilities.log().requires_grad_()


def bits(loss: torch.Tensor) -> float:
    return loss.item() / math.log(2)


def loss_of(labels=LABELS, inputs=INPUTS, length=3, mask_token_id=3, weight=0.25, **fields) -> torch.Tensor:
    prefix = find_prefix(inputs, prefix_length=length)
    return prefix_lm_loss(spoken_logits(), labels, inputs, prefix, mask_token_id, weight, **fields)


def test_both_terms_by_hand():
    """Three next tokens of 4, 3 and 1 bits, the first from the end of the prefix; a masked token of 1, with id 0."""
    assert bits(loss_of()) == pytest.approx((4 + 3 + 1) / 3 + 0.25 * 1)
    assert bits(loss_of(weight=2.0)) == pytest.approx((4 + 3 + 1) / 3 + 2.0 * 1)
    assert bits(loss_of(mask_token_id=None, inputs=TOKENS)) == pytest.approx((4 + 3 + 1) / 3)
    official = LABELS.clone()
    official[0, 3] = IGNORED
    assert bits(loss_of(official)) == pytest.approx((3 + 1) / 2 + 0.25 * 1)


def test_labels_that_the_prefix_has_seen_are_not_read():
    """Plain labels, and a mask token behind the prefix, whose label is a next token as all others."""
    assert bits(loss_of(TOKENS)) == pytest.approx((4 + 3 + 1) / 3 + 0.25 * 1)
    inputs = INPUTS.clone()
    inputs[0, 4] = 3
    assert bits(loss_of(TOKENS, inputs)) == pytest.approx((4 + 3 + 1) / 3 + 0.25 * 1)
    assert loss_of(TOKENS, length=0).item() == pytest.approx(
        torch.nn.functional.cross_entropy(spoken_logits()[0, :-1], TOKENS[0, 1:]).item()
    )


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0), torch.tensor(7)])
def test_no_labels_are_no_loss(items):
    """Neither masked tokens, nor next ones, in this part or in the whole batch: zero, with a gradient of zero."""
    masked_only = LABELS.masked_fill(torch.arange(6) > 0, IGNORED)
    for labels in (torch.full_like(LABELS, IGNORED), masked_only):
        logits = spoken_logits()
        prefix = find_prefix(INPUTS, prefix_length=3)
        loss = prefix_lm_loss(logits, labels, INPUTS, prefix, 3, 0.25, items)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all()
    assert bits(loss_of(LABELS.masked_fill(INPUTS == 3, IGNORED))) == pytest.approx((4 + 3 + 1) / 3)
    assert bits(loss_of(masked_only)) == pytest.approx(0.25)


def test_a_part_counts_by_its_share_of_the_labels():
    """Parts with as many labels of each kind make the loss of their batch; a part of six labels in ten counts 0.6."""
    assert bits(loss_of(num_items_in_batch=6)) == pytest.approx(0.5 * bits(loss_of()))
    assert bits(loss_of(num_items_in_batch=torch.tensor(5))) == pytest.approx(0.6 * bits(loss_of()))


def test_labels_that_are_not_read_are_told(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(prefix_loss.logger, "warning_once", told.append)
    for mask_token_id in (None, 1):
        loss_of(mask_token_id=mask_token_id)
        assert (
            f"hides behind another than the mask token of the model (`config.mask_token_id` is {mask_token_id})"
            in (told.pop())
        )
    loss_of()
    assert not told


def test_labels_that_were_shifted_beforehand():
    """As in context parallelism: those of next tokens count, `labels` are for masked tokens alone."""
    model, ids = tiny_jrt(), tokens(1, 12)
    shifted = torch.cat([ids[:, 1:], torch.full((1, 1), IGNORED)], dim=1)
    loss = model(ids, labels=ids, prefix_length=5).loss
    assert torch.equal(model(ids, labels=ids, shift_labels=shifted, prefix_length=5).loss, loss)
    moved = shifted.clone()
    moved[0, :4] = 3
    assert torch.equal(model(ids, labels=ids, shift_labels=moved, prefix_length=5).loss, loss)
    moved[0, 4] = 3
    assert not torch.equal(model(ids, labels=ids, shift_labels=moved, prefix_length=5).loss, loss)


def test_refused():
    with pytest.raises(ValueError, match="every label lies in the prefix, .* pass a shorter `prefix_length`"):
        loss_of(TOKENS, TOKENS, length=6)


def official_loss(model, stream: torch.Tensor, masked: torch.Tensor, prefix: int) -> torch.Tensor:
    """Reference 3.1 and 3.2 in loops: inputs t_0 to t_(N-1), labels shifted beforehand, two means."""
    inputs = torch.where(masked, MASK, stream)[:, :-1]
    log_probabilities = model(input_ids=inputs, prefix_length=prefix).logits.log_softmax(-1)
    next_tokens, masked_tokens = [], []
    for row in range(stream.shape[0]):
        for i in range(inputs.shape[1]):
            if i >= prefix:
                next_tokens.append(-log_probabilities[row, i, stream[row, i + 1]])
            elif masked[row, i]:
                masked_tokens.append(-log_probabilities[row, i, stream[row, i]])
    return torch.stack(next_tokens).mean() + 0.25 * torch.stack(masked_tokens).mean()


def test_official_layout():
    """A model on N + 1 tokens, whose last position is not read, without the first token behind the prefix."""
    model, stream, prefix = tiny_jrt(), tokens(3, 17), 6
    batch = JRTCollator(MASK, prefix, mlm_probability=0.4, seed=1)([{"input_ids": row} for row in stream])
    expected = official_loss(model, stream, batch["input_ids"] == MASK, prefix)
    assert (model(**batch).loss - expected).abs() > 1e-3
    batch["labels"][:, prefix] = IGNORED
    torch.testing.assert_close(model(**batch).loss, expected)


WIDTH = 12
HOLES = torch.tensor([[1, 0, 1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 1, 0]])
PREFIXES = {
    "default": {},
    "length": {"prefix_length": 4},
    "lengths": {"prefix_length": torch.tensor([7, 0, 3])},
    "holes": {"encoder_mask": HOLES},
}
PADS = {"no": (0, 0, 0), "left": (0, 3, 1), "right": (0, 3, 1)}


def masked_inputs(side: str, prefix: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rows with mask tokens here and there, with pads, and a prefix; and all their tokens as labels."""
    original = tokens(len(PADS[side]), WIDTH, seed=5)
    places = torch.arange(WIDTH).expand_as(original)
    pads = torch.tensor(PADS[side])[:, None]
    valid = places >= pads if side == "left" else places < WIDTH - pads
    hidden = torch.rand(original.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    inputs = {"input_ids": torch.where(hidden, MASK, original).masked_fill(~valid, 0), "attention_mask": valid.long()}
    inputs.update(PREFIXES[prefix])
    if "encoder_mask" in inputs:
        inputs["encoder_mask"] = inputs["encoder_mask"] * valid[:, : HOLES.shape[1]]
    return inputs, original.masked_fill(~valid, IGNORED)


def readings(model, inputs, labels) -> list[tuple[int, int, int]]:
    """Row, place and position from which it is predicted, of every label that tells in the loss."""

    def gradient(labels):
        outputs = model(**inputs, labels=labels)
        return torch.autograd.grad(outputs.loss, outputs.logits)[0]

    found, plain = [], gradient(labels)
    for place in range(WIDTH):
        other = labels.clone()
        other[:, place] = torch.where(labels[:, place] < 0, IGNORED, (labels[:, place] + 1) % VOCABULARY)
        changed = (gradient(other) != plain).any(dim=-1)
        found += [(row, place, position) for row, position in changed.nonzero().tolist()]
    return found


def assert_nothing_seen(model, inputs, labels) -> list[tuple[int, int, int]]:
    """A label's token may stand in the input only where the logits that predict it do not see it."""
    found = readings(model, inputs, labels)
    with torch.no_grad():
        plain = model(**inputs).logits
        for place in range(WIDTH):
            ids = inputs["input_ids"].clone()
            stands = ids[:, place] == labels[:, place]
            ids[:, place] = torch.where(stands, (ids[:, place] + 7) % MASK, ids[:, place])
            moved = (model(**{**inputs, "input_ids": ids}).logits - plain).abs().amax(dim=-1)
            for row, _, position in (one for one in found if one[1] == place):
                assert moved[row, position] < 1e-6, f"row {row}: the token at {place} is seen from {position}"
            # the model is not blind either
            assert all(moved[row, place] > 1e-4 for row in stands.nonzero().flatten().tolist())
    return found


@pytest.mark.parametrize("side", PADS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_no_label_is_read_whose_token_was_seen(prefix, side):
    model = tiny_jrt(seed=3)
    inputs, labels = masked_inputs(side, prefix)
    found = assert_nothing_seen(model, inputs, labels)
    known = find_prefix(*(inputs.get(k) for k in ("input_ids", "attention_mask", "prefix_length", "encoder_mask")), 6)
    expected = []
    for row, place in (labels >= 0).nonzero().tolist():
        in_prefix = known.mask[row].nonzero().flatten().tolist()
        if place in in_prefix and inputs["input_ids"][row, place] == MASK:
            expected.append((row, place, place))
        elif place > max(in_prefix, default=0):
            expected.append((row, place, place - 1))
    assert sorted(found) == sorted(expected)
    assert {position == place for _, place, position in found} == {True, False}, "both kinds of labels are read"


BROKEN = {
    "all labels": lambda labels, prefix: labels,
    "labels in holes": lambda labels, prefix: labels.masked_fill(
        torch.nn.functional.pad(prefix.mask[:, 1:], (0, 1)), IGNORED
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_loss_that_reads_what_was_seen_is_found_out(broken, monkeypatch):
    monkeypatch.setattr(prefix_loss, "_behind", BROKEN[broken])
    with pytest.raises(AssertionError, match="is seen from"):
        assert_nothing_seen(tiny_jrt(seed=3), *masked_inputs("no", "holes"))
