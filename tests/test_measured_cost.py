"""Law 4: what runs and what is stored is what the accountant says, for single rows and for every decode step."""

import itertools
from typing import Any

import pytest
import torch
from generation_reference import CASES, SIZES, VOCABULARY, build
from matrix_products import MatrixProducts
from test_cost import EXPERTS, WINDOWED, eager_experts

from varidepth import MoDForCausalLM, MoRConfig, MoRForCausalLM
from varidepth.analysis.cost import RowRouting, count_parameters, forward_flops, full_routing, kv_bytes, slot_loads
from varidepth.analysis.family_shapes import FAMILY_SHAPES
from varidepth.analysis.routing_statistics import measured_routing
from varidepth.configuration.backbone_config import BACKBONES, MOE_BACKBONES
from varidepth.configuration.configuration_mod import ROUTING_UNITS
from varidepth.modeling.depth_cache import cache_bytes


WIDE_ROUTER = {"routing": "expert_choice", "capacities": [0.9, 0.6], "router_type": "wide_mlp", "router_bias": True}
DEEPER = {
    "expert-three": {"num_hidden_layers": 7, "num_recursions": 3, "capacities": [1.0, 0.7, 0.3], "coda_layers": 0},
    "expert-wide-router": {"num_hidden_layers": 6} | WIDE_ROUTER,
    "predictor-dense-first": {"num_hidden_layers": 6, "capacities": [1.0, 0.5], "inference_rule": "predictor"},
    "token-sequence": {"num_hidden_layers": 6, "sharing": "middle_sequence", "routing": "token_choice"},
    "relaxed": {"num_hidden_layers": 7, "num_recursions": 3, "coda_layers": 0, "recursion_rank": 3},
    "relaxed-shared": {"num_hidden_layers": 6, "kv_mode": "shared", "recursion_rank": 5, "recursion_norms": True},
    "plain-sequence": {"num_hidden_layers": 6, "sharing": "sequence", "routing": "none"},
}


# a prompt, a chunk behind it, and tokens one by one
STEPS = ((0, 9), (9, 12), *((column, column + 1) for column in range(12, 26)))


def make(fields: dict, architecture: type = MoRForCausalLM) -> Any:
    """In eval mode, with routers that spread the tokens."""
    torch.manual_seed(0)
    config = architecture.config_class(**SIZES | fields)
    backbone = fields.get("backbone", "llama")
    model = architecture._from_config(config, attn_implementation="eager", **eager_experts(backbone)).eval()
    with torch.no_grad():
        for name in ("routers", "predictors"):
            if hasattr(model.model, name):
                getattr(model.model, name).weight.normal_()
        if hasattr(model.model, "threshold_ema"):
            model.model.threshold_ema.fill_(0.5)
    return model


def family_fields(family: str) -> dict:
    fields = {"backbone": family, "num_hidden_layers": 6, **EXPERTS.get(family, {})}
    if family in ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "glm4", "qwen3_moe"):
        fields["head_dim"] = 12
    if FAMILY_SHAPES[family].uniform_window or family in WINDOWED:
        fields["sliding_window"] = 4
        fields |= {"use_sliding_window": True} if family.startswith("qwen") else {}
    if family in WINDOWED:
        fields["layer_types"] = ["full_attention", "sliding_attention", "full_attention"] * 2
    return fields


@torch.no_grad()
def check(model, steps=STEPS) -> set[tuple[int, ...]]:
    """Prefill, decode and chunks with a cache, and the whole row without; returns the routings that occurred."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (1, steps[-1][1]), generator=generator)
    cache, routing, seen = None, None, set()
    for start, stop in steps:
        with MatrixProducts() as counted:
            output = model(ids[:, start:stop], cache=cache, use_cache=True, output_routing=True, logits_to_keep=1)
        cache = output.cache
        routing = measured_routing(output, previous=routing)
        assert forward_flops(model.config, routing[0], logits=1).total == counted.flops
        assert kv_bytes(model.config, routing[0]) == cache_bytes(cache)["stored"]
        seen.add(routing[0].entered)
    with MatrixProducts() as counted:
        output = model(ids, use_cache=False, output_routing=True)
    (whole,) = measured_routing(output)
    assert forward_flops(model.config, whole).total == counted.flops
    stored = [load.stored for load in slot_loads(model.config, whole)]
    assert stored == [load.stored for load in slot_loads(model.config, routing[0])]
    return seen


def spreads(seen: set[tuple[int, ...]]) -> bool:
    """The case means something: some step skips what another does not."""
    return len({tuple(bool(n) for n in entered) for entered in seen}) > 1


# those with experts run grouped products, which are not counted; experts have their own tests below
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].get("backbone") not in MOE_BACKBONES])
def test_flops_and_bytes_in_every_mode(case):
    model = build(case, "eager")
    seen = check(model)
    if model.config.routing != "none":
        assert spreads(seen)


@pytest.mark.parametrize("case", DEEPER)
def test_flops_and_bytes_of_other_shapes(case):
    model = make(DEEPER[case])
    check(model)
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", BACKBONES)
def test_flops_and_bytes_of_every_family(family):
    model = make({**family_fields(family), "capacities": [1.0, 0.5]})
    check(model)
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_rows_of_a_batch_store_what_each_alone_would():
    model = build("expert", "eager")
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    output = model(ids, use_cache=True, output_routing=True)
    rows = measured_routing(output)
    assert sum(kv_bytes(model.config, row) for row in rows) == cache_bytes(output.cache)["stored"]
    alone = [measured_routing(model(row[None], output_routing=True))[0] for row in ids]
    assert rows == alone


@torch.no_grad()
def test_room_to_grow_is_at_most_as_large_as_what_is_stored():
    model = build("expert", "eager")
    cache, ids = None, torch.randint(3, VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(1))
    for column in range(60):
        cache = model(ids[:, column : column + 1], cache=cache, use_cache=True).cache
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
    assert kv_bytes(config, none) == cache_bytes(output.cache)["stored"] == 2 * 2 * 16 * 4


DEPTH_ROUTING = {
    "threshold": {"gate": "sigmoid"},
    "predictor": {"inference_rule": "predictor", "predictor_hidden_size": 10, "router_bias": True},
    "running mean": {"inference_rule": "ema_threshold"},
    "stochastic": {"routing": "stochastic", "capacity": 0.4},
    "first tokens": {"always_route_first": 3},
    "every layer, some at full capacity": {
        "routed_layers": list(range(6)),
        "capacity": [0.3, 1.0, 0.5, 0.5, 1.0, 0.2],
        "inference_rule": "predictor",
    },
}


@pytest.mark.parametrize("unit", ROUTING_UNITS)
@pytest.mark.parametrize("case", DEPTH_ROUTING)
def test_flops_and_bytes_of_routed_layers(case, unit):
    model = make({"num_hidden_layers": 6, "routing_unit": unit, **DEPTH_ROUTING[case]}, MoDForCausalLM)
    assert spreads(check(model))
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "unit"),
    [
        *zip(sorted({*FAMILY_SHAPES} - {*MOE_BACKBONES}), itertools.cycle(ROUTING_UNITS), strict=False),
        *itertools.product(MOE_BACKBONES, ROUTING_UNITS),
    ],
)
def test_flops_and_bytes_of_routed_layers_of_every_family(family, unit):
    model = make({**family_fields(family), "routing_unit": unit}, MoDForCausalLM)
    assert spreads(check(model, STEPS[:8]))
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", MOE_BACKBONES)
@torch.no_grad()
def test_noop_experts_are_expected_to_take_their_share(family):
    model = make({**family_fields(family), "num_noop_experts": 2}, MoDForCausalLM)
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())
    ids = torch.randint(3, VOCABULARY, (1, 400), generator=torch.Generator().manual_seed(5))
    with MatrixProducts() as counted:
        output = model(ids, use_cache=False, output_routing=True)
    (routing,) = measured_routing(output)
    expected = forward_flops(model.config, routing)
    assert counted.flops - expected.total == pytest.approx(0, abs=0.1 * expected.mlp)
    without = forward_flops(make(family_fields(family), MoDForCausalLM).config, routing)
    assert without.mlp > 1.2 * expected.mlp
