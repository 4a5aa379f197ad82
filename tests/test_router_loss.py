"""The router learns the same whoever computes the loss: the head, or a trainer that only runs the backbone."""

import pytest
import torch
from tiny_families import VOCABULARY, tiny_mor
from transformers.modeling_outputs import CausalLMOutputWithPast


LENGTHS = (12, 5, 9, 7)
ITEMS = sum(LENGTHS) - len(LENGTHS)


def ragged_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(3, VOCABULARY, (length,), generator=generator)
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def bypass_the_head(model) -> None:
    """What TRL does: `forward` is replaced by one that runs the backbone and computes the loss itself."""

    def forward(input_ids, attention_mask, labels, num_items_in_batch=None, **kwargs):
        hidden_states = model.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden_states)
        loss = model.loss_function(
            logits=logits, labels=labels, vocab_size=VOCABULARY, num_items_in_batch=num_items_in_batch
        )
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    model.forward = forward


def gradients(model, steps: list[dict], scale: float = 1.0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for step in steps:
        (scale * model(**step, num_items_in_batch=torch.tensor(ITEMS)).loss).backward()
    return {name: p.grad.clone() / scale for name, p in model.named_parameters() if p.grad is not None}


def assert_close(given, expected) -> None:
    assert given.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (given[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-5, f"{name}: {error:.1e}"


MODES = {
    "expert": {"aux_loss_coef": 0.5, "router_z_loss_coef": 0.1},
    "predictor": {"aux_loss_coef": 0.5, "inference_rule": "predictor"},
    "token": {"routing": "token_choice", "router_z_loss_coef": 0.1, "balancing_coef": 0.0},
}


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_a_bypassed_head_trains_the_router_alike(mode, accumulation, scale):
    batch = ragged_batch()
    expected = gradients(tiny_mor(**MODES[mode]).train(), [batch])
    bank = "predictors" if mode == "predictor" else "routers"
    assert expected[f"model.{bank}.weight"].norm() > 1e-4
    model = tiny_mor(**MODES[mode]).train()
    bypass_the_head(model)
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(LENGTHS))]
    assert_close(gradients(model, [batch] if accumulation == 1 else rows, scale), expected)


def test_the_loss_contains_the_router_loss_only_in_training():
    batch, model = ragged_batch(), tiny_mor(aux_loss_coef=0.5)
    with torch.no_grad():
        evaluated = model(**batch)
    assert evaluated.aux_loss is None
    trained = model.train()(**batch)
    plain = torch.nn.functional.cross_entropy(
        trained.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(trained.loss, plain + trained.aux_loss)


def test_a_loss_made_outside_of_the_model_still_reaches_the_router():
    """Preference losses: no labels, so the gradient is injected with the scale 1."""
    batch = ragged_batch()
    batch.pop("labels")
    model = tiny_mor(aux_loss_coef=0.5, gating="additive").train()
    model(**batch).logits.logsumexp(-1).mean().backward()
    assert model.model.routers.weight.grad.norm() > 1e-4


def test_balancing_loss_of_one_batch_is_the_papers():
    batch = ragged_batch()
    model = tiny_mor(routing="token_choice", balancing_coef=1.0).train()
    output = model.model(batch["input_ids"], attention_mask=batch["attention_mask"], output_routing=True)
    valid = batch["attention_mask"].bool()
    probabilities = output.router_logits[valid].softmax(-1)
    load = torch.bincount(output.token_depth[valid] - 1, minlength=3) / valid.sum()
    torch.testing.assert_close(output.aux_loss, 3 * (load * probabilities.mean(0)).sum())
