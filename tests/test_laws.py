"""Laws 1 and 2 over random small models: whatever way the same tokens are fed, the logits are the same."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from tiny_families import MOD_BACKBONES, NO_SDPA, VOCABULARY, run_with_margin, tiny_mod, tiny_mor
from tiny_jrt import tiny_jrt

from varidepth.configuration.backbone_config import BACKBONES, MOE_BACKBONES


MOR_CASES, MOD_CASES, JRT_CASES = 340, 300, 300
TOLERANCE = 1e-5
MARGIN = 1e-4  # DESIGN: hard decisions can flip below


@st.composite
def mor_models(draw) -> tuple:
    """A hashable description of a MoR, so that built ones are reused."""
    routing = draw(st.sampled_from(["expert_choice", "expert_choice", "token_choice", "none"]))
    sharing = draw(st.sampled_from(["cycle", "sequence", "middle_cycle", "middle_sequence"]))
    recursions = draw(st.integers(2, 3))
    shared_layers = draw(st.integers(1, 2))
    middle = sharing.startswith("middle")
    prelude, coda = draw(st.sampled_from([(1, 1), (2, 1), (0, 1), (1, 0)])) if middle else (0, 0)
    kv_mode = draw(st.sampled_from(["recursion", "shared"]))
    backbone = draw(st.sampled_from([b for b in BACKBONES if kv_mode == "recursion" or b != "phi3"]))
    fields = {
        "routing": routing,
        "sharing": sharing,
        "num_recursions": recursions,
        "prelude_layers": prelude,
        "coda_layers": coda,
        "num_hidden_layers": prelude + coda + recursions * shared_layers,
        "kv_mode": kv_mode,
        "recursion_rank": draw(st.sampled_from([0, 0, 3])),
        "recursion_norms": draw(st.booleans()),
    }
    if routing != "none":
        fields["gating"] = draw(st.sampled_from(["weighted", "additive", "interpolate"]))
    if routing == "expert_choice":
        full_first = kv_mode == "shared" or draw(st.booleans())
        fields["capacities"] = tuple([1.0 if full_first else 0.7, 0.5, 0.3][:recursions])
        fields["inference_rule"] = draw(st.sampled_from(["threshold", "predictor"]))
        fields["router_activation"] = draw(st.sampled_from(["sigmoid", "tanh"]))
    if routing == "token_choice":
        fields["balancing"] = draw(st.sampled_from(["loss", "loss_free"]))
        fields["router_activation"] = draw(st.sampled_from(["softmax", "sigmoid"]))
    if routing != "none":
        fields["router_type"] = draw(st.sampled_from(["linear", "mlp", "wide_mlp"]))
    return describe(draw, tiny_mor, backbone, fields)


@st.composite
def mod_models(draw) -> tuple:
    """A hashable description of a MoD."""
    depth = draw(st.integers(2, 4))
    layers = draw(st.lists(st.integers(0, depth - 1), min_size=1, max_size=depth, unique=True).map(sorted))
    backbone = draw(st.sampled_from(MOD_BACKBONES))
    share = st.sampled_from([0.3, 0.5, 0.7, 1.0])
    fields = {
        "num_hidden_layers": depth,
        "routed_layers": tuple(layers),
        "capacity": draw(st.one_of(st.just(0.5), st.tuples(*[share] * len(layers)))),
        "routing_unit": draw(st.sampled_from(["block", "attention", "mlp"])),
        "always_route_first": draw(st.integers(0, 2)),
        "routing": draw(st.sampled_from(["expert_choice"] * 5 + ["stochastic"])),
    }
    if fields["routing"] == "expert_choice":
        fields["gate"] = draw(st.sampled_from(["raw", "sigmoid", "one_plus_tanh", "straight_through"]))
        fields["inference_rule"] = draw(st.sampled_from(["threshold", "predictor", "ema_threshold"]))
        fields["router_bias"] = draw(st.booleans())
    if backbone in MOE_BACKBONES:
        fields["num_noop_experts"] = draw(st.integers(0, 2))
    return describe(draw, tiny_mod, backbone, fields)


@st.composite
def jrt_models(draw) -> tuple:
    """A hashable description of a JRT-RNN, with a linear attention layer somewhere."""
    kinds = draw(st.lists(st.sampled_from(["linear_attention", "sliding_attention", "conv"]), min_size=1, max_size=4))
    kinds.insert(draw(st.integers(0, len(kinds))), "linear_attention")
    fields = {
        "layer_types": tuple(kinds),
        "num_hidden_layers": len(kinds),
        "feature_map": draw(st.sampled_from(["taylor", "elu", "softmax"])),
        "feature_dim": draw(st.sampled_from([1, 4])),
        "sliding_window": draw(st.sampled_from([2, 5, 40])),
        "conv_kernel_size": draw(st.integers(2, 4)),
    }
    return describe(draw, tiny_jrt, None, fields)


def describe(draw, tiny, backbone: str, fields: dict) -> tuple:
    attention = "eager" if backbone in NO_SDPA else draw(st.sampled_from(["eager", "sdpa"]))
    return tiny, backbone, attention, draw(st.integers(0, 1)), tuple(sorted(fields.items()))


@functools.lru_cache(maxsize=64)
def build(description):
    tiny, backbone, attention, seed, fields = description
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields}
    backbones = () if backbone is None else (backbone,)
    return tiny(*backbones, attention=attention, seed=seed, **fields)


def relative_error(given_logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((given_logits - expected).abs().max() / expected.abs().max())


@st.composite
def batches(draw) -> tuple[list[list[int]], str, list[int]]:
    """Rows of unequal length, a padding side, and the points at which the prompt is cut into chunks."""
    token = st.integers(3, VOCABULARY - 1)
    rows = draw(st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=3))
    width = max(map(len, rows))
    cuts = draw(st.lists(st.integers(1, max(width - 1, 1)), max_size=3, unique=True))
    return rows, draw(st.sampled_from(["left", "right"])), sorted(cut for cut in cuts if cut < width)


def many(cases: int, **strategies):
    """Runs a test on this many random cases, the same ones each time."""

    def decorate(test):
        quiet = settings(max_examples=cases, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        return given(**strategies)(quiet(test))

    return decorate


@many(MOR_CASES, description=mor_models(), batch=batches())
def test_one_truth_of_mor(description, batch):
    config = build(description).config
    event(f"routing {config.routing}, kv {config.kv_mode}")
    check_one_truth(build(description), *batch)


@many(MOD_CASES, description=mod_models(), batch=batches())
def test_one_truth_of_mod(description, batch):
    config = build(description).config
    event(f"routing {config.routing} by {config.inference_rule}, unit {config.routing_unit}")
    check_one_truth(build(description), *batch)


@many(JRT_CASES, description=jrt_models(), batch=batches(), data=st.data())
def test_one_truth_of_jrt(description, batch, data):
    prefixes = [data.draw(st.integers(0, len(row)), label="prefix") for row in batch[0]]
    check_one_truth(build(description), *batch, prefixes)


@torch.no_grad()
def check_one_truth(model, rows, side, cuts, prefixes=None):
    """Alone, in a padded batch, in chunks and token by token: the same logits. A prefix lies within one call."""
    width = max(map(len, rows))
    alone = []
    for i, row in enumerate(rows):
        prefix = {} if prefixes is None else {"prefix_length": prefixes[i]}
        output, margin = run_with_margin(model, torch.tensor([row]), use_cache=False, **prefix)
        assume(margin > MARGIN)
        alone.append(output.logits[0])
    event(f"{side} padding, {len(cuts) + 1} chunks")

    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    places = [slice(width - len(row), width) if side == "left" else slice(0, len(row)) for row in rows]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def check(logits: torch.Tensor, way: str) -> None:
        for i, place in enumerate(places):
            error = relative_error(logits[i, place], alone[i])
            assert error <= TOLERANCE, f"{way}: row {i} differs by {error:.1e}"

    prefix = {} if prefixes is None else {"prefix_length": torch.tensor(prefixes)}
    first = max([1] + [place.start + length for place, length in zip(places, prefixes or [], strict=False)])
    check(model(ids, attention_mask=mask, position_ids=positions, use_cache=False, **prefix).logits, "batch")
    for way, inner in (("chunks", cuts), ("steps", list(range(1, width)))):
        cache, logits = None, []
        bounds = sorted({0, width, *(max(cut, first) for cut in inner)})
        for start, stop in zip(bounds, bounds[1:], strict=False):
            output = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                cache=cache,
                use_cache=True,
                **(prefix if start == 0 else {}),
            )
            cache = output.cache
            logits.append(output.logits)
        check(torch.cat(logits, dim=1), way)


@many(60, description=mor_models(), data=st.data())
def test_the_future_changes_nothing_in_mor(description, data):
    check_future(build(description), data)


@many(60, description=mod_models(), data=st.data())
def test_the_future_changes_nothing_in_mod(description, data):
    check_future(build(description), data)


@many(60, description=jrt_models(), data=st.data())
@torch.no_grad()
def test_behind_its_prefix_the_future_changes_nothing_in_jrt(description, data):
    model = build(description)
    ids = torch.tensor([data.draw(st.lists(st.integers(3, VOCABULARY - 1), min_size=2, max_size=12))])
    prefix = data.draw(st.integers(0, ids.shape[1] - 1))
    at = data.draw(st.integers(max(prefix, 1), ids.shape[1] - 1))
    edited = ids.clone()
    edited[0, at:] = data.draw(st.integers(3, VOCABULARY - 1))
    before, after = (model(x, use_cache=False, prefix_length=prefix).logits for x in (ids, edited))
    assert relative_error(after[:, :at], before[:, :at]) <= TOLERANCE


@torch.no_grad()
def check_future(model, data):
    ids = torch.tensor([data.draw(st.lists(st.integers(3, VOCABULARY - 1), min_size=2, max_size=12))])
    at = data.draw(st.integers(1, ids.shape[1] - 1))
    edited = ids.clone()
    edited[0, at:] = data.draw(st.integers(3, VOCABULARY - 1))
    before, margin = run_with_margin(model, ids, use_cache=False, output_routing=True)
    assume(margin > MARGIN)
    after = model(edited, use_cache=False, output_routing=True)
    assert torch.equal(before.routing_mask[:, :at], after.routing_mask[:, :at])
    assert relative_error(after.logits[:, :at], before.logits[:, :at]) <= TOLERANCE


TOP_K = [
    lambda: tiny_mor(inference_rule="topk", gating="interpolate"),
    *(lambda unit=unit: tiny_mod(inference_rule="topk", routing_unit=unit) for unit in ("block", "attention", "mlp")),
]


@pytest.mark.parametrize("make", TOP_K, ids=["mor", "mod-block", "mod-attention", "mod-mlp"])
@torch.no_grad()
def test_top_k_looks_at_the_future(make):
    """Why `topk` is for measuring only: the official code of MoR, and most of MoD, evaluate with it."""
    model = make()
    ids = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(3))
    edited = ids.clone()
    edited[0, 20:] = torch.randint(3, VOCABULARY, (4,), generator=torch.Generator().manual_seed(4))
    before, after = (model(x, use_cache=False, output_routing=True) for x in (ids, edited))
    assert not torch.equal(before.token_depth[:, :20], after.token_depth[:, :20])
    assert float((before.logits - after.logits)[:, :20].abs().max()) > 1e-3
    with pytest.raises(ValueError, match="inference_rule is 'topk', which looks at future tokens"):
        model.generate(ids, max_new_tokens=2)


CACHED = {
    "mor": lambda: tiny_mor("gemma3_text"),
    "mor-shared": lambda: tiny_mor("gemma3_text", kv_mode="shared"),
    "mor-token_choice": lambda: tiny_mor("gemma3_text", routing="token_choice"),
    "mod": lambda: tiny_mod("gemma3_text"),
    "mod-all-layers": lambda: tiny_mod("gemma3_text", routed_layers=[0, 1, 2, 3]),
    "mod-attention": lambda: tiny_mod("gemma3_text", routing_unit="attention", always_route_first=1),
    "mod-mlp": lambda: tiny_mod("gemma3_text", routing_unit="mlp", inference_rule="predictor"),
    "mod-stochastic": lambda: tiny_mod("gemma3_text", routing="stochastic"),
    "mod-noop": lambda: tiny_mod("qwen3_moe", num_noop_experts=2),
}


@pytest.mark.parametrize("case", CACHED)
@torch.no_grad()
def test_rewinding_the_cache_leaves_no_trace(case):
    """What assisted decoding does: crop, and go on with other tokens."""
    model = CACHED[case]()
    ids = torch.randint(3, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(5))
    whole = model(ids, use_cache=False, output_routing=True)
    assert len(whole.token_depth.unique()) > 1
    first = model(ids[:, :8], use_cache=True)
    first.cache.activate_past_recording()
    model(torch.flip(ids[:, 8:12], (1,)), cache=first.cache, use_cache=True)
    first.cache.crop(-4)
    rest = model(ids[:, 8:], cache=first.cache, use_cache=True).logits
    assert relative_error(rest, whole.logits[:, 8:]) <= TOLERANCE


@pytest.mark.parametrize("tiny", [tiny_mor, tiny_mod])
def test_generate_routes_causally_between_training_steps(tiny):
    model = tiny()
    ids = torch.randint(3, VOCABULARY, (1, 15), generator=torch.Generator().manual_seed(6))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.train()
    model.model.norm.eval()
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert model.training and not model.model.norm.training
