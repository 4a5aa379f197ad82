"""The accountant against real models (parameters), counted matrix products (FLOPs) and the paper's tables."""

import pytest
import torch
from matrix_products import MatrixProducts
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from varidepth.analysis.cost import (
    RowRouting,
    cost_summary,
    count_parameters,
    expected_flops,
    forward_flops,
    full_routing,
    kv_bytes,
    slot_loads,
    training_routing,
)
from varidepth.analysis.family_shapes import FAMILY_SHAPES, window_of
from varidepth.analysis.paper_flops import paper_flops_per_token, paper_training_flops, paper_training_steps
from varidepth.configuration.configuration_mod import ROUTING_UNITS, MoDConfig
from varidepth.configuration.configuration_mor import MoRConfig
from varidepth.modeling.cache_naming import CACHE


logging.set_verbosity_error()

SMOLLM = {
    "135M": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "360M": {"hidden_size": 960, "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5},
    "730M": {"hidden_size": 1536, "num_hidden_layers": 26, "num_attention_heads": 24, "num_key_value_heads": 8},
    "1.7B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32},
}
INNER = {"135M": 1536, "360M": 2560, "730M": 4096, "1.7B": 8192}


def smollm(size: str, **changes) -> LlamaConfig:
    fields = {**SMOLLM[size], "intermediate_size": INNER[size], **changes}
    return LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **fields)


def mor(size: str, recursions: int, layers: int, **fields) -> MoRConfig:
    return MoRConfig.from_backbone(smollm(size), num_recursions=recursions, num_hidden_layers=layers, **fields)


def tiny(family: str, **changes):
    fields = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family in ("qwen2", "smollm3", "olmo2", "phi3", "granite", "exaone4", "starcoder2"):
        del fields["head_dim"]
    return CONFIG_MAPPING[family](**{**fields, **EXPERTS.get(family, {}), **changes})


# one layer of the second has no experts
EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "mlp_only_layers": [1],
        "attention_bias": True,
    },
}
WINDOWED = ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "exaone4", "cohere2")


def eager_experts(family: str) -> dict[str, str]:
    """Experts whose matrix products are counted."""
    return {"experts_implementation": "eager"} if family in EXPERTS else {}


@pytest.mark.parametrize("family", sorted(FAMILY_SHAPES))
@pytest.mark.parametrize("variant", ["default", "biased", "untied"])
def test_parameters_equal_those_of_the_model(family, variant):
    changes = {"tie_word_embeddings": variant != "untied"}
    shape, config = FAMILY_SHAPES[family], tiny(family)
    if variant == "biased":
        switches = {shape.qkv_bias, shape.o_bias, shape.mlp_bias}
        changes |= {name: not getattr(config, name) for name in switches if isinstance(name, str)}
    config = tiny(family, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = count_parameters(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.embedding + count.head == count.total - count.non_embedding


@pytest.mark.parametrize("family", sorted(FAMILY_SHAPES))
def test_flops_of_a_vanilla_model_equal_those_counted(family):
    # windows of 4 are shorter than the text; half of the layers of a family with layer types have one
    slides = FAMILY_SHAPES[family].uniform_window or family in WINDOWED
    changes = {"sliding_window": 4} if slides else {}
    if slides and family.startswith("qwen"):
        changes["use_sliding_window"] = True
    if family in WINDOWED:
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config = tiny(family, **changes)
    assert (window_of(config, 0) == 4) == slides
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **eager_experts(family)).eval()
    tokens = torch.randint(3, 96, (1, 11))
    cache, routing = None, None
    for start, stop in ((0, 7), (7, 8), (8, 11)):
        with torch.no_grad(), MatrixProducts() as counted:
            output = model(tokens[:, start:stop], use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        routing = full_routing(config, stop - start) if routing is None else routing.after(stop - start, ())
        assert forward_flops(config, routing).total == counted.flops
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert kv_bytes(config, routing) == held


@pytest.mark.parametrize(
    ("size", "recursions", "layers", "millions"),
    [
        ("135M", 2, 30, 56.6),
        ("135M", 3, 29, 38.9),
        ("135M", 3, 32, 42.5),
        ("360M", 2, 32, 167.15),
        ("360M", 3, 32, 117.99),
        ("360M", 4, 34, 98.3),
        ("730M", 3, 26, 251.7),
        ("1.7B", 2, 24, 872.5),
        ("1.7B", 3, 26, 671.1),
    ],
)
def test_parameter_counts_of_the_paper(size, recursions, layers, millions):
    """Table 6 and the unique non-embedding parameters behind it."""
    count = count_parameters(mor(size, recursions, layers))
    digits = len(str(millions).partition(".")[2])
    assert round(count.layers / 1e6, digits) == millions
    assert round(count.non_embedding / 1e6, digits) == pytest.approx(millions, abs=0.011 if digits == 2 else 0.11)
    assert count.routers == recursions * SMOLLM[size]["hidden_size"]


@pytest.mark.parametrize(
    ("size", "embedding", "millions"), [("135M", 28.3, 106.2), ("360M", 47.2, 314.6), ("730M", 75.5, 654.4)]
)
def test_parameter_counts_of_the_vanilla_models(size, embedding, millions):
    count = count_parameters(smollm(size))
    assert (round(count.embedding / 1e6, 1), round(count.layers / 1e6, 1)) == (embedding, millions)


def test_a_layer_of_the_360m_model_has_the_published_size():
    assert count_parameters(smollm("360M")).layers == 32 * 9_832_320


BUDGET = 16.5e18
RUNS = {
    "vanilla": (smollm("360M"), 8.336e8, 9438),
    "recursive 2": (mor("360M", 2, 32, routing="none"), 8.336e8, 9438),
    "recursive 4": (mor("360M", 4, 34, routing="none"), None, 8883),
    "expert 2": (mor("360M", 2, 32), 6.235e8, 12619),
    "expert 3": (mor("360M", 3, 32), 5.556e8, 14161),
    "token 3": (mor("360M", 3, 32, routing="token_choice"), 5.556e8, 14161),
    "expert 4": (mor("360M", 4, 34), 5.535e8, 14216),
    "expert 3, shared KV": (mor("360M", 3, 32, kv_mode="shared"), 5.363e8, 14672),
    "135M expert 3": (mor("135M", 3, 32), 2.166e8, 36326),
}


@pytest.mark.parametrize("run", RUNS)
def test_budgets_and_steps_of_the_paper(run):
    config, per_token, steps = RUNS[run]
    if per_token is not None:
        # the reference rounds 5.3625 up
        assert abs(paper_flops_per_token(config) - per_token) <= 0.6e5
    assert paper_training_steps(config, BUDGET) == pytest.approx(steps, rel=1e-4)
    spent = paper_training_flops(config, steps)
    assert spent == pytest.approx(BUDGET, rel=1e-4)
    assert f"{spent / 1e18:.3f}" in ("16.500", "16.501")


@pytest.mark.parametrize(
    ("recursions", "layers", "spent", "published"),
    [(2, 32, 12.34, 12.3), (3, 32, 11.00, 11.0), (4, 34, 10.95, 11.0)],
)
def test_budgets_of_the_rows_with_20_billion_tokens(recursions, layers, spent, published):
    """Table 3, the rows trained on as many tokens as the vanilla model."""
    exa = paper_training_flops(mor("360M", recursions, layers), 9438) / 1e18
    assert round(exa, 2) == spent
    assert round(exa, 1) == pytest.approx(published, abs=0.05)


def test_kv_tokens_follow_table_2_of_the_paper():
    """Recursion-wise caching keeps (N_r + 1) / (2 N_r) of the vanilla cache in the blocks, sharing 1 / N_r."""
    for recursions, layers in ((2, 32), (3, 32), (4, 34)):
        for mode, part in (("recursion", (recursions + 1) / (2 * recursions)), ("shared", 1 / recursions)):
            config = mor("360M", recursions, layers, kv_mode=mode)
            routing = training_routing(config, 1200)
            stored = [load.stored for load in slot_loads(config, routing)]
            assert sum(stored[1:-1]) == pytest.approx(part * 1200 * (layers - 2))
            assert stored[0] == stored[-1] == 1200
            per_token = cost_summary(config, context=1200, bytes_per_value=4).kv_bytes_per_token
            assert kv_bytes(config, routing) == pytest.approx(1200 * per_token)


def test_expected_cost_of_a_token_equals_the_exact_count_when_all_are_active():
    config = mor("360M", 3, 32, capacities=[1.0, 1.0, 1.0])
    summary = cost_summary(config, context=100)
    assert summary.flops_per_token == forward_flops(config, full_routing(config, 1, past=100)).total
    assert summary.mean_layers == 32


def test_skipped_passes_cost_nothing():
    config = mor("360M", 2, 32, capacities=[0.9, 0.5])
    everything = forward_flops(config, RowRouting(1, (1, 1), 10, (10, 4)), logits=1)
    half = forward_flops(config, RowRouting(1, (1, 0), 10, (10, 4)), logits=1)
    none = forward_flops(config, RowRouting(1, (0, 0), 10, (10, 4)), logits=1)
    # 32 layers, 17 of them, 2 of them
    assert half.mlp / everything.mlp == 17 / 32
    assert none.mlp / everything.mlp == 2 / 32
    # who does not enter recursion 0 is not scored for recursion 1
    assert (everything.routers, none.routers) == (2 * 2 * 960, 2 * 960)


def test_a_routing_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="3 numbers in `entered`, but this configuration has 2"):
        slot_loads(mor("360M", 2, 32), RowRouting(5, (5, 3, 1)))


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="'opt' is not known; use one of cohere2"):
        count_parameters(CONFIG_MAPPING["opt"]())


def mod(size: str, **fields) -> MoDConfig:
    return MoDConfig.from_backbone(smollm(size), **fields)


@pytest.mark.parametrize(
    ("layers", "capacity", "linear", "scores"),
    [
        ("every other", 0.5, 75.0, 62.5),
        ("every other", 0.25, 62.5, 53.1),
        ("every other", 0.125, 56.25, 50.8),
        ("every other", 0.0625, 53.1, 50.2),
        ("all", 0.125, 12.5, 1.6),
    ],
)
def test_shares_of_depth_routing(layers, capacity, linear, scores):
    """What is left of the matrices' and of the scores' FLOPs, of the cache, and of the decode cost."""
    vanilla = smollm("360M")
    fields = {} if layers == "every other" else {"routed_layers": list(range(32))}
    config = mod("360M", capacity=capacity, **fields)
    dense, routed = forward_flops(vanilla, full_routing(vanilla, 2048)), training_routing(config, 2048)
    flops = forward_flops(config, routed)
    parts = [
        (flops.projections / dense.projections, linear),
        (flops.mlp / dense.mlp, linear),
        (flops.attention / dense.attention, scores),
        (kv_bytes(config, routed) / kv_bytes(vanilla, full_routing(vanilla, 2048)), linear),
    ]
    for part, percent in parts:
        assert round(100 * part, 2 if percent == 56.25 else 1) == percent
    summary, before = cost_summary(config), cost_summary(vanilla)
    assert summary.kv_bytes_per_token == pytest.approx((linear / 100) * before.kv_bytes_per_token, rel=1e-3)
    assert summary.mean_layers == pytest.approx(linear / 100 * 32, rel=1e-3)


@pytest.mark.parametrize("unit", ROUTING_UNITS)
def test_flops_of_a_routed_layer_follow_the_written_formulas(unit):
    tokens, share, inner, layers = 800, 0.25, 120, 6
    shape = {"num_hidden_layers": layers, "vocab_size": 96}
    predictors = {"inference_rule": "predictor", "predictor_hidden_size": inner}
    config = mod("135M", **shape, routing_unit=unit, capacity=share, **predictors)
    d, ff, heads, kv_heads, size, k = 576, 1536, 9, 3, 64, int(share * tokens)
    projections = {n: n * 2 * d * size * (2 * heads + 2 * kv_heads) for n in (tokens, k)}
    mlp = {n: n * 6 * d * ff for n in (tokens, k)}
    scores = {n: 4 * n * n * heads * size for n in (tokens, k)}
    dense = projections[tokens] + mlp[tokens] + scores[tokens]
    routed = {
        "block": projections[k] + mlp[k] + scores[k],
        "attention": projections[k] + mlp[tokens] + scores[k],
        "mlp": projections[tokens] + mlp[k] + scores[tokens],
    }[unit]
    deciding = 2 * tokens * d + tokens * (2 * d * inner + 2 * inner)
    flops = forward_flops(config, training_routing(config, tokens))
    assert flops.total == 3 * dense + 3 * (routed + deciding) + 2 * tokens * d * 96
    expected = expected_flops(config, context=0)
    assert expected.mlp == 6 * d * ff * (3 + 3 * (1 if unit == "attention" else share))
    assert expected.routers == 3 * deciding / tokens
    stored = [load.stored for load in slot_loads(config, training_routing(config, tokens))]
    assert stored == [tokens, tokens if unit == "mlp" else k] * 3


def test_a_row_in_training_takes_whole_multiples_and_the_first_tokens():
    config = mod("135M", capacity=0.125, capacity_multiple=8, routed_layers=[1, 3])
    assert training_routing(config, 100).entered == (16, 16)
    assert training_routing(config, 5).entered == (5, 5)
    first = mod("135M", capacity=0.125, always_route_first=20, routed_layers=[1, 3])
    assert training_routing(first, 100).entered == (20, 20)


def test_stochastic_routing_has_no_routers():
    config, learned = mod("135M", routing="stochastic"), mod("135M")
    assert count_parameters(config).routers == 0 < count_parameters(learned).routers == 15 * 576
    assert expected_flops(config).routers == 0
    assert expected_flops(config).mlp == expected_flops(learned).mlp


def test_the_wanted_compute_of_decoder_layers():
    """Attention routing in every layer: its part of the cost is what the share scales."""
    config = mod("135M", routing_unit="attention", routed_layers=list(range(30)), capacity=0.5)
    whole = expected_flops(config, 500, [1.0] * 30)
    half, none = expected_flops(config, 500), expected_flops(config, 500, [0.0] * 30)
    assert whole.total == forward_flops(config, full_routing(config, 1, past=500), logits=1).total
    assert (none.projections, none.attention, none.mlp) == (0, 0, whole.mlp)
    assert half.projections == whole.projections / 2
    # a token that enters finds half of the keys, and its own
    assert half.attention / whole.attention == pytest.approx(0.5 * 251 / 501)
    with pytest.raises(ValueError, match="3 numbers in `entered`"):
        expected_flops(config, shares=[1.0] * 3)


def test_the_rule_of_the_paper_counts_whole_layers():
    config = mod("360M", capacity=0.125)
    dense = paper_flops_per_token(smollm("360M"))
    linear = 2 * (4 * 960 * 960 + 3 * 960 * 2560)
    left = 16 * (linear * 0.875 + 2 * 960 * 2048 * (1 - 0.125**2))
    assert paper_flops_per_token(config) == pytest.approx(dense - left)
    with pytest.raises(ValueError, match="`routing_unit` is 'mlp', but the paper's rule only counts whole layers"):
        paper_flops_per_token(mod("360M", routing_unit="mlp"))
