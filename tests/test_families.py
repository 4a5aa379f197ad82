"""Law 3 per family: where every token goes all the way, a MoR is the vanilla model with its layers repeated.

A MoD is the vanilla model itself.
"""

import pytest
import torch
from tiny_families import MOD_BACKBONES, NO_SDPA, OPEN_MOD, VOCABULARY, switch_on, tiny_mod, tiny_mor, vanilla_of

from varidepth.configuration.backbone_config import BACKBONES


FULLY_ON = {"router_bias": True, "gating": "interpolate", "capacities": [1.0, 1.0, 1.0]}
PLAIN = {"routing": "none"}


def _prompts() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("fields", [PLAIN, FULLY_ON], ids=["none", "fully_on"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_is_bit_equal_to_the_vanilla_model_repeated(backbone, attention, fields):
    if attention == "sdpa" and backbone in NO_SDPA:
        pytest.skip(reason="the family caps its attention scores, which sdpa cannot do; refused, see below")
    model = tiny_mor(backbone, attention=attention, **fields)
    if fields is FULLY_ON:
        switch_on(model)
    vanilla = vanilla_of(model)
    prompts = _prompts()
    assert torch.equal(model(prompts).logits, vanilla(prompts).logits)
    padded = torch.nn.functional.pad(prompts, (3, 0))
    mask = (padded != 0).long()
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits, vanilla(padded, attention_mask=mask).logits, rtol=0, atol=1e-6
    )
    generate = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(prompts, **generate), vanilla.generate(prompts, **generate))


@pytest.mark.parametrize("capacity", [1.0, 0.5], ids=["full_capacity", "open_routers"])
@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("backbone", MOD_BACKBONES)
@torch.no_grad()
def test_a_mod_that_skips_nothing_is_bit_equal_to_the_vanilla_model(backbone, attention, unit, capacity):
    if attention == "sdpa" and backbone in NO_SDPA:
        pytest.skip(reason="the family caps its attention scores, which sdpa cannot do; refused, see below")
    model = tiny_mod(backbone, attention=attention, routing_unit=unit, **{**OPEN_MOD, "capacity": capacity})
    switch_on(model)
    vanilla, prompts = vanilla_of(model), _prompts()
    assert torch.equal(model(prompts).logits, vanilla(prompts).logits)
    padded = torch.nn.functional.pad(prompts, (3, 0))
    mask = (padded != 0).long()
    given, expected = (m(padded, attention_mask=mask).logits[:, 3:] for m in (model, vanilla))
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6 if capacity == 1 else 4e-6)
    generate = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(prompts, **generate), vanilla.generate(prompts, **generate))


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_mod_that_skips_nothing_is_bit_equal_in_half_precision_too(dtype, unit):
    model = tiny_mod("qwen3", routing_unit=unit, **OPEN_MOD).to(dtype)
    switch_on(model)
    vanilla = vanilla_of(model).to(dtype)
    assert torch.equal(model(_prompts()).logits, vanilla(_prompts()).logits)


@pytest.mark.parametrize("kv_mode", ["recursion", "shared"])
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_gathering_every_token_changes_nothing(backbone, kv_mode):
    """Windows, rotary types and masks of the routed path, against the vanilla model and the dense path."""
    if kv_mode == "shared" and backbone == "phi3":
        pytest.skip(reason="phi3 computes keys and values in one product with the queries; refused, see below")
    gathered = {"router_bias": True, "gating": "interpolate", "capacities": [1.0, 0.5, 0.3], "kv_mode": kv_mode}
    model = tiny_mor(backbone, **gathered)
    switch_on(model)
    if kv_mode == "recursion":
        expected = vanilla_of(model)
    else:
        expected = tiny_mor(backbone, **{**gathered, "capacities": [1.0, 1.0, 1.0]})
        switch_on(expected)
    prompts = _prompts()
    assert int(model(prompts, output_routing=True).token_depth.min()) == 3
    for inputs in (
        {"input_ids": prompts},
        {"input_ids": prompts, "attention_mask": torch.ones_like(prompts).index_fill(1, torch.tensor([0, 1]), 0)},
    ):
        given = model(**inputs).logits[:, 2:]
        torch.testing.assert_close(given, expected(**inputs).logits[:, 2:], rtol=1e-5, atol=2e-6)
    generate = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(prompts, **generate), expected.generate(prompts, **generate))


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_sequence"])
@torch.no_grad()
def test_every_sharing_strategy_is_a_repetition(sharing):
    depth = 8 if sharing.startswith("middle") else 9
    model = tiny_mor("smollm3", sharing=sharing, num_hidden_layers=depth, routing="none")
    prompts = _prompts()
    assert torch.equal(model(prompts).logits, vanilla_of(model)(prompts).logits)


@torch.no_grad()
def test_one_recursion_is_the_vanilla_model():
    model = tiny_mor("llama", num_recursions=1, num_hidden_layers=4, capacities=[1.0], **{
        "router_bias": True, "gating": "interpolate"})  # fmt: skip
    switch_on(model)
    prompts = _prompts()
    assert model.config.num_physical_layers == 4
    assert torch.equal(model(prompts).logits, vanilla_of(model)(prompts).logits)


def test_softcapped_attention_under_sdpa_is_refused():
    with pytest.raises(ValueError, match="caps its attention scores, which sdpa cannot do; use"):
        tiny_mor("gemma2", attention="sdpa")
    with pytest.raises(ValueError, match="caps its attention scores, which sdpa cannot do; use"):
        tiny_mod("gemma2", attention="sdpa")


def test_fused_qkv_under_shared_keys_is_refused():
    with pytest.raises(ValueError, match="`kv_mode` is 'shared', but phi3 computes queries, keys and values in one"):
        tiny_mor("phi3", kv_mode="shared")


@pytest.mark.parametrize("tiny", [tiny_mor, tiny_mod])
def test_flex_attention_on_routed_layers_is_refused(tiny):
    model = tiny()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation is 'flex_attention', but routed layers"):
        model(_prompts())


@torch.no_grad()
def test_shared_keys_skip_the_projections():
    model = tiny_mor(kv_mode="shared", routing="none")
    projection = model.model.layers[1].self_attn.k_proj
    computed = []
    projection.register_forward_hook(lambda module, args, output: computed.append(output))
    model(_prompts())
    # by the first of three recursions alone
    assert len(computed) == 1


@pytest.mark.parametrize("tiny", [tiny_mor, tiny_mod])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(tiny):
    model = tiny(attention="sdpa")
    first, second = _prompts()[:1, :6], _prompts()[1:, :7]
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    alone = torch.cat([model(first, use_cache=False).logits, model(second, use_cache=False).logits], dim=1)
    together = model(packed, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_mask_of_the_wrong_width_is_refused():
    prompts = _prompts()
    with pytest.raises(ValueError, match="`attention_mask` has 4 columns, but the cache has seen 0 tokens and 13 are"):
        tiny_mor()(prompts, attention_mask=torch.ones(2, 4, dtype=torch.long))
