"""Text that a model writes by itself: its own distribution, the same each time."""

import pytest
import torch
from tiny_families import tiny_mor, vanilla_of
from transformers import LlamaConfig, LlamaForCausalLM

from varidepth.training.sampled_rows import sample_rows


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, num_key_value_heads=2, **sizes))
    model.lm_head.weight.data *= 30
    return model


def test_rows_follow_the_models_distribution(model):
    rows = sample_rows(model, 6000, 3, batch_size=2000)
    assert rows.shape == (6000, 3) and rows.dtype == torch.long
    first = torch.bincount(rows[:, 0], minlength=11) / 6000
    assert (first - 1 / 11).abs().max() < 0.02
    with torch.no_grad():
        expected = model(torch.arange(11)[:, None]).logits[:, -1].softmax(-1)
    assert expected.max() > 0.3
    for token in range(11):
        behind = rows[rows[:, 0] == token, 1]
        found = torch.bincount(behind, minlength=11) / len(behind)
        assert (found - expected[token]).abs().max() < 4 * (0.25 / len(behind)) ** 0.5


def test_the_cache_is_only_a_faster_way(model):
    rows = sample_rows(model, 4, 12, seed=5)
    assert torch.equal(rows, sample_rows(model, 4, 12, seed=5)) and not torch.equal(rows, sample_rows(model, 4, 12))
    greedy = LlamaForCausalLM(model.config)
    greedy.load_state_dict(model.state_dict())
    greedy.lm_head.weight.data *= 1e4
    rows = sample_rows(greedy, 4, 12)
    with torch.no_grad():
        assert torch.equal(greedy(rows, use_cache=False).logits[:, :-1].argmax(-1), rows[:, 1:])


def test_first_tokens_are_of_the_given_vocabulary(model):
    model.train()
    assert sample_rows(model, 40, 2, vocab_size=3)[:, 0].max() < 3 and model.training
    assert sample_rows(model, 0, 5).shape == (0, 5)


def test_a_routed_model_writes_too():
    model = tiny_mor("llama", num_recursions=2, num_hidden_layers=6)
    assert sample_rows(model, 3, 6).shape == sample_rows(vanilla_of(model), 3, 6).shape == (3, 6)
