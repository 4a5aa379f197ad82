"""The accountant against real models (parameters), counted matrix products (FLOPs) and the paper's tables."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from varidepth.analysis.cost import (
    FAMILY_SHAPES,
    RowRouting,
    cost_summary,
    count_parameters,
    forward_flops,
    full_routing,
    kv_bytes,
    slot_loads,
    training_routing,
    window_of,
)
from varidepth.analysis.paper_flops import paper_flops_per_token, paper_training_flops, paper_training_steps
from varidepth.configuration.configuration_mor import MoRConfig


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
    return CONFIG_MAPPING[family](**{**fields, **changes})


WINDOWED = ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "exaone4", "cohere2")


class MatrixProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the FLOPs of every matrix product that is dispatched."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        operands = {
            aten.mm.default: (0, 1),
            aten.bmm.default: (0, 1),
            aten.addmm.default: (1, 2),
            aten.baddbmm.default: (1, 2),
        }
        if func in operands:
            a, b = (args[i] for i in operands[func])
            # rotary angles are the one product of a column with a row: (batch, head_dim / 2, 1) x (batch, 1, seq)
            if a.shape[-1] > 1 or a.shape[-2] == 1:
                self.flops += 2 * a.numel() * b.shape[-1]
        elif "scaled_dot_product" in func.__name__ or "convolution" in func.__name__:
            raise AssertionError(f"{func} is not counted; use eager attention")
        return func(*args, **(kwargs or {}))


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
    changes = {"sliding_window": 4} if window_of(tiny(family, sliding_window=4), 0) or family in WINDOWED else {}
    if family in WINDOWED:
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
        changes |= {"use_sliding_window": True} if family.startswith("qwen") else {}
    config = tiny(family, **changes)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = torch.randint(3, 96, (1, 11))
    cache, routing = None, None
    for start, stop in ((0, 7), (7, 8), (8, 11)):
        with torch.no_grad(), MatrixProducts() as counted:
            output = model(tokens[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
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
