"""Routing figures against hand counts and against slow loops over real outputs."""

import math
from types import SimpleNamespace

import pytest
import torch
from generation_reference import VOCABULARY, build, padded, prompts

from varidepth import MoRConfig
from varidepth.analysis.routing_statistics import RoutingMeter, entered_passes


NAN = float("nan")


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def stub(
    depths: list[list[int]], logits: list[list[list[float]]], **fields
) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A model of one block and its output, written out by hand."""
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    config = MoRConfig(num_hidden_layers=4, num_recursions=2, **sizes, **fields)
    output = SimpleNamespace(token_depth=torch.tensor(depths), router_logits=torch.tensor(logits))
    return SimpleNamespace(config=config, base_model=SimpleNamespace()), output


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
    assert figures.accuracy == figures.precision == figures.recall == [1.0, 1.0]
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


@pytest.mark.parametrize("case", ["expert", "expert-predictor", "expert-sequence", "token", "token-loss_free"])
@torch.no_grad()
def test_real_outputs(case):
    model = build(case)
    ids, mask = padded(prompts())
    output = model(ids, attention_mask=mask, output_routing=True)
    entered = entered_passes(model, output, mask)
    assert torch.equal(entered.sum(-1), output.token_depth) and not entered[mask == 0].any()
    meter = RoutingMeter(model)
    meter.update(output, mask)
    figures = meter.result()
    assert figures.tokens == int(mask.sum()) == sum(figures.depth_histogram)
    assert sum(figures.shares) == pytest.approx(figures.mean_depth)
    assert sum(d * n for d, n in enumerate(figures.depth_histogram)) == int(output.token_depth.sum())
    # rows alone give the same figures
    alone = RoutingMeter(model)
    for row in prompts():
        alone.update(model(row, output_routing=True))
    assert alone.result().shares == figures.shares
    assert alone.result().accuracy == pytest.approx(figures.accuracy, nan_ok=True)


@torch.no_grad()
def test_topk_routing_agrees_with_itself():
    """With the measuring rule, membership is what entered, and the last recursion is told apart in every block."""
    model = build("expert-sequence")
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    try:
        model.config.inference_rule = "topk"
        output = model(ids, output_routing=True, use_cache=False)
    finally:
        model.config.inference_rule = "threshold"
    entered = entered_passes(model, output)
    assert entered.sum(1).tolist() == [[16, 10, 16, 10]] * 2


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
def test_no_agreement_where_no_causal_rule_decided():
    model = build("expert")
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    model.config.inference_rule = "topk"
    meter = RoutingMeter(model)
    meter.update(model(ids, output_routing=True, use_cache=False))
    figures = meter.result()
    assert figures.accuracy == figures.precision == figures.recall == []
    assert figures.entropy and figures.shares == [0.8, 0.5]
    model = build("expert-predictor").train()
    meter = RoutingMeter(model)
    meter.update(model(ids, output_routing=True, use_cache=False))
    assert meter.result().accuracy == []


def test_a_router_that_is_not_asked_agrees():
    """At capacity 1 every token enters, whatever the score."""
    model, output = stub([[2, 1]], [[[-9.0, 1.0], [-9.0, -1.0]]], capacities=[1.0, 0.5])
    meter = RoutingMeter(model)
    meter.update(output)
    assert meter.result().accuracy == [1.0, 1.0]


@pytest.mark.parametrize("depths", [[4, 2], [3, 2]])
def test_passes_of_predictors_in_several_blocks(depths):
    """Where all or none of a token's candidates entered the last recursion its depth tells; else nothing does."""
    logits = [[[0.0] * 4] * 2]
    fields = {"capacities": [1.0, 0.5], "inference_rule": "predictor", "sharing": "sequence"}
    model, output = stub([depths], logits, **fields)
    if 3 in depths:
        with pytest.raises(ValueError, match="cannot be told apart"):
            entered_passes(model, output)
    else:
        assert entered_passes(model, output).tolist() == [[[True] * 4, [True, False, True, False]]]


def test_refusals():
    model, output = stub([[1]], [[[0.0, 0.0]]], capacities=[1.0, 0.5])
    with pytest.raises(ValueError, match="No token was seen"):
        RoutingMeter(model).result()
    output.router_logits = None
    with pytest.raises(ValueError, match="no `router_logits`; call the model with output_routing=True"):
        RoutingMeter(model).update(output)
    with pytest.raises(ValueError, match="routes nothing; give one with"):
        RoutingMeter(build("none"))
