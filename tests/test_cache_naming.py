"""The cache by both of its names: the same results, and no warning."""

import inspect
import warnings

import pytest
import torch
from generation_reference import build, config_of, prompts
from transformers import AutoModelForSequenceClassification, DynamicCache

from varidepth.modeling.cache_naming import CACHE


NAMES = ("cache", "past_key_values")
CASES = ("expert", "expert-shared", "mod")


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def models(case):
    """Base model, causal language model, sequence classifier."""
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(config_of(case)).eval()
    return build(case).model, build(case), classifier


@pytest.mark.parametrize("case", CASES)
def test_a_forward_takes_both_names(case):
    ids = prompts()[0]
    for model in models(case):
        whole = model(ids, use_cache=False)[0]
        for name in NAMES:
            cache = DynamicCache(config=model.config)
            first = model(ids[:, :-1], use_cache=True, **{name: cache})
            assert first.cache is first[CACHE] is cache
            last = model(ids[:, -1:], use_cache=True, **{name: first.cache})[0]
            torch.testing.assert_close(last[:, -1], whole[:, -1], rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="two names of one argument"):
            model(ids, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("case", CASES)
def test_generate_takes_both_names(case):
    model, ids = build(case), prompts()[0]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    for name in NAMES:
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], use_cache=True, cache=cache)
        assert model.generate(ids, max_new_tokens=6, do_sample=False, **{name: cache}).equal(expected)
    with pytest.raises(ValueError, match="two names of one argument"):
        model.generate(ids, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("name", NAMES)
def test_both_names_compile_without_a_graph_break(name):
    model = build("none").model
    ids, cache = prompts()[0], DynamicCache(config=model.config)

    @torch.compile(fullgraph=True, backend="eager")
    def step(ids):
        output = model(ids, use_cache=True, **{name: cache})
        return output.last_hidden_state, output.cache

    states, returned = step(ids)
    torch.testing.assert_close(states, model(ids, use_cache=False).last_hidden_state)
    assert returned is cache


@pytest.mark.parametrize("case", CASES)
def test_the_signature_names_the_cache_once(case):
    for model in models(case):
        names = list(inspect.signature(model.forward).parameters)
        assert names[names.index("position_ids") + 1] == "cache" and "past_key_values" not in names
