"""Routing figures against hand counts and against slow loops over real outputs."""

import math
from types import SimpleNamespace

import pytest
import torch
from generation_reference import VOCABULARY, build, padded, prompts
from tiny_families import tiny_mod

from varidepth import MoDConfig, MoRConfig
from varidepth.analysis.routing_statistics import RoutingMeter, causal_decisions, measured_routing, top_k_members


NAN = float("nan")
STUB_SIZES = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def stub(
    depths: list[list[int]], logits: list[list[list[float]]], **fields
) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A model of one block and its output, written out by hand."""
    config = MoRConfig(num_hidden_layers=4, num_recursions=2, **STUB_SIZES, **fields)
    mask = torch.arange(2) < torch.tensor(depths).unsqueeze(-1)
    return SimpleNamespace(config=config, base_model=SimpleNamespace()), written(mask, logits)


def written(mask: torch.Tensor, logits: list | None) -> SimpleNamespace:
    scores = None if logits is None else torch.tensor(logits)
    return SimpleNamespace(routing_mask=mask.bool(), router_logits=scores, decision_logits=scores)


def test_expert_choice_by_hand():
    """Four tokens, all enter the first recursion, top-2 by logit are 0 and 2; the threshold picked 0, 1 and 2."""
    seconds = [logit(0.9), logit(0.6), logit(0.8), logit(0.1)]
    model, output = stub([[2, 2, 2, 1]], [[[0.0, one] for one in seconds]], capacities=[1.0, 0.5])
    meter = RoutingMeter(model)
    meter.update(output)
    figures = meter.result()
    assert (figures.tokens, figures.mean_depth, figures.depth_histogram) == (4, 1.75, [0, 1, 3])
    assert figures.shares == [1.0, 0.75]
    assert (figures.accuracy[1], figures.precision[1], figures.recall[1]) == pytest.approx((0.75, 2 / 3, 1.0))
    assert figures.f1[1] == pytest.approx(0.8)
    assert figures.dead_ratio == [0.0, 0.25]
    entropy = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (0.9, 0.6, 0.8, 0.1)]
    assert figures.entropy == pytest.approx([math.log(2), sum(entropy) / 4])
    assert figures.max_violation == []


def test_tokens_that_left_are_no_candidates():
    first = [logit(0.9), logit(0.2), logit(0.9), logit(0.2)]
    second = [logit(0.9), NAN, logit(0.2), NAN]
    pairs = [list(pair) for pair in zip(first, second, strict=True)]
    model, output = stub([[2, 0, 1, 0]], [pairs], capacities=[0.5, 0.25])
    meter = RoutingMeter(model)
    meter.update(output)
    figures = meter.result()
    # top-2 of 4 in the first recursion and top-1 of the 2 that are left are just what the threshold chose
    assert figures.accuracy == figures.precision == figures.recall == figures.f1 == [1.0, 1.0]
    assert figures.shares == [0.5, 0.25]
    assert figures.dead_ratio == [0.5, 0.75]


def test_a_position_is_dead_only_if_every_row_skips_it():
    model, output = stub([[2, 1, 1], [1, 2, 1]], [[[0.0, 0.0]] * 3] * 2, capacities=[1.0, 0.5])
    meter = RoutingMeter(model)
    meter.update(output)
    assert meter.result().dead_ratio == pytest.approx([0.0, 1 / 3])
    # a later batch revives the third position and brings a fourth that is dead
    _, output = stub([[1, 1, 2, 1]], [[[0.0, 0.0]] * 4], capacities=[1.0, 0.5])
    meter.update(output)
    assert meter.result().dead_ratio == [0.0, 0.25]


def test_positions_count_from_the_first_token_of_a_padded_row():
    model, output = stub([[0, 0, 2, 1], [1, 2, 1, 1]], [[[0.0, 0.0]] * 4] * 2, capacities=[1.0, 0.5])
    meter = RoutingMeter(model)
    meter.update(output, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    figures = meter.result()
    assert figures.tokens == 6 and figures.depth_histogram == [0, 4, 2]
    assert figures.dead_ratio == [0.0, 0.5]


def test_token_choice_by_hand():
    """MaxVio of loads 3 and 1 is (3 - 2) / 2; the entropy is that of the mean probabilities."""
    probabilities = [0.9, 0.8, 0.7, 0.2]
    logits = [[math.log(p), math.log(1 - p)] for p in probabilities]
    model, output = stub([[1, 1, 1, 2]], [logits], routing="token_choice")
    meter = RoutingMeter(model)
    meter.update(output)
    figures = meter.result()
    mean = sum(probabilities) / 4
    assert figures.max_violation == [0.5]
    assert figures.entropy == pytest.approx([-mean * math.log(mean) - (1 - mean) * math.log(1 - mean)])
    assert (figures.shares, figures.accuracy) == ([1.0, 0.25], [])


def test_routed_layers_by_hand():
    """Two layers, each for itself: top-1 and top-2 of four tokens; the thresholds let in other ones."""
    config = MoDConfig(num_hidden_layers=4, capacity=[0.25, 0.5], router_thresholds=[0.5, 0.7], **STUB_SIZES)
    first = [logit(p) for p in (0.9, 0.6, 0.2, 0.1)]
    second = [logit(p) for p in (0.1, 0.8, 0.6, 0.2)]
    logits = [[list(pair) for pair in zip(first, second, strict=True)]]
    mask = torch.tensor([[[1, 0], [1, 1], [0, 0], [0, 0]]])
    meter = RoutingMeter(SimpleNamespace(config=config, base_model=SimpleNamespace()))
    meter.update(written(mask, logits))
    figures = meter.result()
    assert (figures.mean_depth, figures.depth_histogram) == (0.75, [2, 1, 1])
    assert figures.shares == [0.5, 0.25]
    assert figures.accuracy == [0.75, 0.75]
    assert (figures.precision, figures.recall) == ([0.5, 1.0], [1.0, 0.5])
    assert figures.f1 == pytest.approx([2 / 3, 2 / 3])
    assert figures.dead_ratio == [0.5, 0.75]
    assert figures.max_violation == []


EXPERT_CASES = ["expert", "expert-predictor", "expert-sequence"]
MOD_CASES: dict[str, dict] = {
    "threshold": {},
    "predictor": {"inference_rule": "predictor", "routing_unit": "attention"},
    "running mean": {"inference_rule": "ema_threshold", "routing_unit": "mlp"},
    "first tokens": {"always_route_first": 2, "capacity": [0.2, 1.0, 0.6], "routed_layers": [1, 2, 3]},
    "whole multiples": {"capacity_multiple": 4},
    "stochastic": {"routing": "stochastic"},
}


def make(case: str):
    if case not in MOD_CASES:
        return build(case)
    model = tiny_mod(**MOD_CASES[case])
    if case == "running mean":
        model.model.threshold_ema.fill_(0.3)
    return model


@pytest.mark.parametrize("case", [*EXPERT_CASES, "token", "token-loss_free", *MOD_CASES])
@torch.no_grad()
def test_real_outputs(case):
    model = make(case)
    ids, mask = padded(prompts())
    output = model(ids, attention_mask=mask, output_routing=True)
    meter = RoutingMeter(model)
    meter.update(output, mask)
    figures = meter.result()
    assert figures.tokens == int(mask.sum()) == sum(figures.depth_histogram)
    assert sum(figures.shares) == pytest.approx(figures.mean_depth)
    assert sum(d * n for d, n in enumerate(figures.depth_histogram)) == int(output.token_depth.sum())
    rows = measured_routing(output)
    entered = torch.tensor([row.entered for row in rows]).sum(0) / figures.tokens
    assert entered.tolist() == pytest.approx(figures.shares)
    # rows alone give the same figures
    alone = RoutingMeter(model)
    for row in prompts():
        alone.update(model(row, output_routing=True))
    assert alone.result().shares == figures.shares
    assert alone.result().accuracy == pytest.approx(figures.accuracy, nan_ok=True)
    assert bool(figures.accuracy) == (case not in ("token", "token-loss_free", "stochastic"))


@pytest.mark.parametrize("case", [*EXPERT_CASES, *(case for case in MOD_CASES if case != "stochastic")])
@torch.no_grad()
def test_the_rule_lets_in_who_entered_and_topk_who_is_a_member(case):
    """What the statistics take for the rule, and for top-k, is what the model does in eval mode and in training."""
    model = make(case)
    ids, mask = padded(prompts())
    output = model(ids, attention_mask=mask, output_routing=True)
    assert torch.equal(causal_decisions(model, output, mask.bool()), output.routing_mask)
    assert 0 < int(output.routing_mask.sum()) < int(mask.sum()) * output.routing_mask.shape[-1]
    try:
        output = model.train()(ids, attention_mask=mask, output_routing=True, use_cache=False)
        members = top_k_members(model.config, output.router_logits, mask.bool())
    finally:
        model.eval()
    assert torch.equal(members, output.routing_mask)


@torch.no_grad()
def test_agreement_is_that_of_the_rule_that_decided():
    """Predictors that contradict the routers: what entered counts, not what the thresholds would have said."""
    model = build("expert-predictor")
    bank = model.model.predictors
    bank.weight.copy_(-model.model.routers.weight)
    if bank.expand_weight is not None:
        bank.expand_weight.copy_(model.model.routers.expand_weight)
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    output = model(ids, output_routing=True, use_cache=False)
    meter = RoutingMeter(model)
    meter.update(output)
    figures = meter.result()
    entered = output.token_depth >= 1
    k = int(model.config.capacities[0] * 20)
    members = torch.zeros_like(entered).scatter_(1, output.router_logits[..., 0].topk(k).indices, True)
    assert figures.accuracy[0] == pytest.approx((entered == members).double().mean().item())
    assert 0 < int(entered.sum()) < entered.numel()
    assert figures.accuracy[0] != pytest.approx(
        ((output.router_logits[..., 0] >= 0) == members).double().mean().item()
    )


@torch.no_grad()
def test_agreement_in_training_is_that_of_the_rule_and_not_of_topk():
    model = build("expert-predictor").train()
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    try:
        output = model(ids, output_routing=True, use_cache=False)
        meter = RoutingMeter(model)
        meter.update(output)
    finally:
        model.eval()
    members = output.routing_mask[..., 0]
    said = output.decision_logits[..., 0] >= 0
    agreement = (said == members).double().mean().item()
    assert meter.result().accuracy[0] == pytest.approx(agreement)
    assert agreement < 1


@torch.no_grad()
def test_no_agreement_under_the_measuring_rule():
    model = build("expert")
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    model.config.inference_rule = "topk"
    try:
        meter = RoutingMeter(model)
        meter.update(model(ids, output_routing=True, use_cache=False))
    finally:
        model.config.inference_rule = "threshold"
    figures = meter.result()
    assert figures.accuracy == figures.precision == figures.recall == figures.f1 == []
    assert figures.entropy and figures.shares == [0.8, 0.5]


def test_a_router_that_is_not_asked_agrees():
    """At capacity 1 every token enters, whatever the score."""
    model, output = stub([[2, 1]], [[[-9.0, 1.0], [-9.0, -1.0]]], capacities=[1.0, 0.5])
    meter = RoutingMeter(model)
    meter.update(output)
    assert meter.result().accuracy == [1.0, 1.0]


def test_refusals():
    model, output = stub([[1]], [[[0.0, 0.0]]], capacities=[1.0, 0.5])
    with pytest.raises(ValueError, match="No token was seen"):
        RoutingMeter(model).result()
    output.routing_mask = None
    with pytest.raises(ValueError, match="no `routing_mask`; call the model with output_routing=True"):
        RoutingMeter(model).update(output)
    with pytest.raises(ValueError, match="routes nothing: every token runs all of its layers; give one with"):
        RoutingMeter(build("none"))
