"""Law 4: what runs and what is stored is what the accountant says, for single rows and for every decode step."""

import pytest
import torch
from generation_reference import CASES, SIZES, VOCABULARY, build
from test_cost import FAMILY_SHAPES, WINDOWED, MatrixProducts

from varidepth import MoRConfig, MoRForCausalLM
from varidepth.analysis.cost import RowRouting, count_parameters, forward_flops, full_routing, kv_bytes, slot_loads
from varidepth.analysis.routing_statistics import entered_passes, measured_routing
from varidepth.modeling.depth_cache import cache_bytes


WIDE_ROUTER = {"routing": "expert_choice", "capacities": [0.9, 0.6], "router_type": "wide_mlp", "router_bias": True}
DEEPER = {
    "expert-three": {"num_hidden_layers": 7, "num_recursions": 3, "capacities": [1.0, 0.7, 0.3], "coda_layers": 0},
    "expert-wide-router": {"num_hidden_layers": 6} | WIDE_ROUTER,
    "predictor-dense-first": {"num_hidden_layers": 6, "capacities": [1.0, 0.5], "inference_rule": "predictor"},
    "token-sequence": {"num_hidden_layers": 6, "sharing": "middle_sequence", "routing": "token_choice"},
    "plain-sequence": {"num_hidden_layers": 6, "sharing": "sequence", "routing": "none"},
}


# a prompt, a chunk behind it, and tokens one by one
STEPS = ((0, 9), (9, 12), *((column, column + 1) for column in range(12, 26)))


def make(fields: dict) -> MoRForCausalLM:
    torch.manual_seed(0)
    config = MoRConfig(**SIZES | fields)
    config._attn_implementation = "eager"
    model = MoRForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name in ("routers", "predictors"):
            if hasattr(model.model, name):
                getattr(model.model, name).weight.normal_()
    return model


def family_fields(family: str) -> dict:
    fields = {"backbone": family, "num_hidden_layers": 6, "capacities": [1.0, 0.5]}
    if family in ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "glm4"):
        fields["head_dim"] = 12
    if FAMILY_SHAPES[family].uniform_window or family in WINDOWED:
        fields["sliding_window"] = 4
    if family in WINDOWED:
        fields["layer_types"] = ["full_attention", "sliding_attention", "full_attention"] * 2
        fields |= {"use_sliding_window": True} if family.startswith("qwen") else {}
    return fields


@torch.no_grad()
def check(model, steps=STEPS) -> set[tuple[int, ...]]:
    """Prefill, decode and chunks with a cache, and the whole row without; returns the routings that occurred."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (1, steps[-1][1]), generator=generator)
    cache, routing, seen = None, None, set()
    for start, stop in steps:
        with MatrixProducts() as counted:
            output = model(
                ids[:, start:stop], past_key_values=cache, use_cache=True, output_routing=True, logits_to_keep=1
            )
        cache = output.past_key_values
        routing = measured_routing(model, output, previous=routing)
        assert forward_flops(model.config, routing[0], logits=1).total == counted.flops
        assert kv_bytes(model.config, routing[0]) == cache_bytes(cache)["stored"]
        seen.add(routing[0].entered)
    with MatrixProducts() as counted:
        output = model(ids, use_cache=False, output_routing=True)
    (whole,) = measured_routing(model, output)
    assert forward_flops(model.config, whole).total == counted.flops
    stored = [load.stored for load in slot_loads(model.config, whole)]
    assert stored == [load.stored for load in slot_loads(model.config, routing[0])]
    return seen


@pytest.mark.parametrize("case", CASES)
def test_flops_and_bytes_in_every_mode(case):
    model = build(case, "eager")
    seen = check(model)
    if model.config.routing != "none":
        # the cases mean something: some step skips what another does not
        assert len({tuple(bool(n) for n in entered) for entered in seen}) > 1


@pytest.mark.parametrize("case", DEEPER)
def test_flops_and_bytes_of_other_shapes(case):
    model = make(DEEPER[case])
    check(model)
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", sorted(FAMILY_SHAPES))
def test_flops_and_bytes_of_every_family(family):
    model = make(family_fields(family))
    check(model)
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_rows_of_a_batch_store_what_each_alone_would():
    model = build("expert", "eager")
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    output = model(ids, use_cache=True, output_routing=True)
    rows = measured_routing(model, output)
    assert sum(kv_bytes(model.config, row) for row in rows) == cache_bytes(output.past_key_values)["stored"]
    alone = [measured_routing(model, model(row[None], output_routing=True))[0] for row in ids]
    assert rows == alone


@torch.no_grad()
def test_room_to_grow_is_at_most_as_large_as_what_is_stored():
    model = build("expert", "eager")
    cache, ids = None, torch.randint(3, VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(1))
    for column in range(60):
        cache = model(ids[:, column : column + 1], past_key_values=cache, use_cache=True).past_key_values
        sizes = cache_bytes(cache)
        assert sizes["padding"] <= sizes["stored"]


@torch.no_grad()
def test_a_token_that_skips_everything_costs_prelude_coda_and_head():
    config = MoRConfig(**SIZES, num_hidden_layers=6, capacities=[0.9, 0.5], router_bias=True)
    model = MoRForCausalLM._from_config(config, attn_implementation="eager").eval()
    model.model.routers.bias.fill_(-20.0)
    with MatrixProducts() as counted:
        output = model(torch.tensor([[5]]), use_cache=True, output_routing=True)
    assert output.token_depth.tolist() == [[0]]
    none = RowRouting(1, (0, 0))
    assert counted.flops == forward_flops(config, none).total < forward_flops(config, full_routing(config, 1)).total
    assert kv_bytes(config, none) == cache_bytes(output.past_key_values)["stored"] == 2 * 2 * 16 * 4


@torch.no_grad()
def test_passes_of_several_blocks_are_told_apart_or_refused():
    model = build("expert-sequence", "eager")
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    output = model(ids, output_routing=True)
    entered = entered_passes(model, output)
    assert entered.shape == (2, 12, 4) and torch.equal(entered.sum(-1), output.token_depth)
    output.token_depth = output.token_depth.roll(1, dims=1)
    with pytest.raises(ValueError, match="follow neither the thresholds nor the capacities"):
        entered_passes(model, output)
