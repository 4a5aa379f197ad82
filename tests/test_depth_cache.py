"""The cache: what is stored for whom, and the operations that generate asks of it."""

import pytest
import torch
from tiny_families import VOCABULARY, tiny_mod, tiny_mor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from varidepth.modeling.cache_naming import CACHE
from varidepth.modeling.depth_cache import DepthLayer, cache_bytes


FIELDS = {"capacities": [0.9, 0.6, 0.3], "gating": "interpolate"}
LENGTHS = (11, 4, 8)
MODELS = {
    "mor": lambda: tiny_mor(**FIELDS),
    "mod": lambda: tiny_mod(routed_layers=[0, 1, 3], gate="sigmoid"),
    "mod-attention": lambda: tiny_mod(routing_unit="attention", always_route_first=1),
}
each_model = pytest.mark.parametrize("case", MODELS)


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCABULARY, (1, length), generator=generator) for length in LENGTHS]


def left_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(prompt.shape[1] for prompt in prompts)
    ids = torch.cat([torch.nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts])
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def stored_tokens(cache) -> list[list[int]]:
    """Tokens per row of every routed slot."""
    return [layer.index.lengths for layer in cache.layers if isinstance(layer, DepthLayer)]


@each_model
@torch.no_grad()
def test_a_padded_batch_stores_what_its_rows_store_alone(case):
    model = MODELS[case]()
    batch = model(**left_padded(rows()), use_cache=True, output_routing=True)
    alone = [model(row, use_cache=True, output_routing=True) for row in rows()]
    assert [int(d) for d in batch.token_depth.sum(1)] == [int(a.token_depth.sum()) for a in alone]
    assert batch.token_depth[1, :7].tolist() == [0] * 7
    for slot, lengths in enumerate(stored_tokens(batch.cache)):
        assert lengths == [sum(stored_tokens(a.cache)[slot]) for a in alone]


@torch.no_grad()
def test_bytes_are_those_of_the_tokens_that_got_there():
    model = tiny_mor(**FIELDS)
    output = model(rows()[0], use_cache=True, output_routing=True)
    config = model.config
    per_token = 2 * config.num_key_value_heads * config.head_dim * 4
    entered = int(output.token_depth.sum()) * config.num_shared_layers
    dense = LENGTHS[0] * (config.prelude_layers + config.coda_layers)
    assert cache_bytes(output.cache)["stored"] == per_token * (entered + dense)


@each_model
@torch.no_grad()
def test_buffers_grow_at_most_twofold(case):
    model = MODELS[case]()
    cache = model(rows()[0], use_cache=True).cache
    for token in rows()[2][0]:
        model(token.view(1, 1), cache=cache, use_cache=True)
        for layer in cache.layers:
            if isinstance(layer, DepthLayer) and layer.is_initialized:
                assert layer.keys.shape[2] < 2 * max(layer.index.lengths)


@each_model
@torch.no_grad()
def test_rows_can_be_reordered_repeated_and_selected(case):
    model = MODELS[case]()
    batch = left_padded(rows())
    next_token = torch.tensor([[7], [9], [13]])
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    positions = batch["position_ids"][:, -1:] + 1

    def step(cache, order):
        cache = model(next_token[order], attention_mask=mask[order], position_ids=positions[order],
                      cache=cache, use_cache=True)  # fmt: skip
        return cache.logits

    expected = step(model(**batch, use_cache=True).cache, [0, 1, 2])
    for operation, order in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = model(**batch, use_cache=True).cache
        operation(cache)
        torch.testing.assert_close(step(cache, order), expected[order], rtol=1e-5, atol=1e-6)


@each_model
@torch.no_grad()
def test_a_reset_cache_is_as_new(case):
    model = MODELS[case]()
    cache = model(rows()[0], use_cache=True).cache
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(rows()[2], cache=cache, use_cache=True).logits
    torch.testing.assert_close(again, model(rows()[2], use_cache=False).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tiny", [tiny_mor, tiny_mod])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_token_that_is_masked_later_is_no_longer_seen(attention, tiny):
    """generate takes a generated pad token for padding in the next turn; a 4D mask says the same without a cache."""
    model = tiny(attention=attention, **(FIELDS if tiny is tiny_mor else {"gate": "sigmoid"}))
    prompt, mask = rows()[0], torch.ones(1, 12, dtype=torch.long)
    mask[0, 1:9] = 0
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    visible[-1, 1:9] = False
    mask_4d = visible if attention == "sdpa" else torch.zeros(12, 12).masked_fill(~visible, torch.finfo().min)
    # what is masked lies in routed slots, and some of the new tokens look there
    assert int(model(prompt, output_routing=True).token_depth[0, 1:9].max()) > 0
    entered = differs = False
    for token in range(3, 15):
        token = torch.tensor([[token]])
        whole = torch.cat([prompt, token], dim=1)
        cache = model(prompt, use_cache=True).cache
        given = model(token, attention_mask=mask, cache=cache, use_cache=True).logits
        entered |= bool(model(whole, output_routing=True).token_depth[0, -1] > 0)
        expected = model(whole, attention_mask=mask_4d[None, None], use_cache=False).logits[:, -1:]
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)
        differs |= bool((given - model(whole, use_cache=False).logits[:, -1:]).abs().max() > 1e-3)
    assert entered and differs


@torch.no_grad()
def test_shared_keys_store_one_recursion():
    model = tiny_mor(kv_mode="shared")
    cache = model(rows()[0], use_cache=True).cache
    config = model.config
    layers = config.num_physical_layers
    assert cache_bytes(cache) == {
        "stored": 2 * 4 * config.num_key_value_heads * config.head_dim * LENGTHS[0] * layers,
        "padding": 0,
    }


@torch.no_grad()
def test_foreign_caches_are_refused():
    model = tiny_mor(**FIELDS)
    vanilla = LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, vocab_size=61, hidden_size=32, intermediate_size=40,
                                           num_attention_heads=4, num_key_value_heads=2)).eval()  # fmt: skip
    filled = vanilla(rows()[0], use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="has already seen 11 tokens, but was not filled by this model"):
        model(rows()[0], cache=filled)
    wrong = StaticCache(config=LlamaConfig(num_hidden_layers=3), max_cache_len=16)
    with pytest.raises(ValueError, match="has 3 layers, but the model needs one for each of its 8 unrolled layers"):
        model(rows()[0], cache=wrong)


@each_model
@torch.no_grad()
def test_a_plain_dynamic_cache_is_adopted(case):
    model = MODELS[case]()
    cache = DynamicCache()
    first = model(rows()[0][:, :6], cache=cache, use_cache=True)
    assert first.cache is cache
    rest = model(rows()[0][:, 6:], cache=cache, use_cache=True).logits
    whole = model(rows()[0], use_cache=False).logits
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-5, atol=1e-6)
