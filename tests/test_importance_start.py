"""Routers of a MoD that start from the measured importance of each layer for each token."""

import pytest
import torch
from real_text import source_config, text_blocks

from varidepth import MoDConfig, MoDForCausalLM
from varidepth.training.calibration import calibrate
from varidepth.training.importance_start import start_by_importance


def build(**fields) -> MoDForCausalLM:
    torch.manual_seed(0)
    settings = {
        "capacity": 0.5,
        "routed_layers": [1, 2, 4, 5],
        "routing_unit": "attention",
        "gate": "straight_through",
        "router_bias": True,
        "always_route_first": 1,
    }
    config = MoDConfig.from_backbone(source_config(initializer_range=0.2), **{**settings, **fields})
    return MoDForCausalLM(config).eval()


def rows(count: int = 48) -> torch.Tensor:
    return text_blocks().blocks[:count]


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
def test_layers_get_tokens_by_their_importance(unit):
    """A layer without effect keeps the fewest tokens, one whose update is enlarged gets more of them."""
    model = build(routing_unit=unit)
    start_by_importance(model, rows().split(12), share=0.6)
    as_it_was = model.config.capacity
    with torch.no_grad():
        for projection in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[2].get_submodule(projection).weight.mul_(1e-3)
            model.model.layers[5].get_submodule(projection).weight.mul_(3)
    weights = {name: value.clone() for name, value in model.state_dict().items() if "routers" not in name}
    correlations = start_by_importance(model, rows().split(12), share=0.6)
    assert model.config.capacity[1] == min(model.config.capacity) < min(0.2, as_it_was[1])
    assert model.config.capacity[3] > as_it_was[3]
    assert sum(model.config.capacity) / 4 == pytest.approx(0.6, abs=0.02)
    assert all(0.1 < correlation < 1 for correlation in correlations)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items() if name in weights)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        mask = model(rows(), output_routing=True, use_cache=False).routing_mask
    assert mask.double().mean() == pytest.approx(0.6, abs=0.1)


def test_started_routers_hurt_less_than_random_ones():
    ids = rows(96)

    @torch.no_grad()
    def cost(model) -> float:
        result = calibrate(model, ids[48:].split(16), positions=())
        return result.loss_causal - result.loss_full

    # far from uniform predictions, so that layers matter
    started = build(capacity=0.4)
    with torch.no_grad():
        for name, parameter in started.named_parameters():
            if "proj" in name:
                parameter.mul_(1.5)
    random = build(capacity=0.4)
    random.load_state_dict(started.state_dict())
    start_by_importance(started, ids[:48].split(12))
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        random.model.routers.weight.data.normal_(std=0.1)
        losses.append(abs(cost(random)))
    assert abs(cost(started)) < min(losses)


def test_it_may_be_repeated_and_keeps_the_training_mode():
    model = build().train()
    first = start_by_importance(model, [rows(12)])
    weight = model.model.routers.weight.clone()
    assert model.training
    assert start_by_importance(model, [rows(12)], share=0.5) == pytest.approx(first, abs=1e-4)
    assert torch.allclose(model.model.routers.weight, weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"gate": "sigmoid"}, {}, "`gate` is 'sigmoid', .* gate='straight_through'"),
        ({"router_bias": False}, {}, "`router_bias` is False"),
        ({"inference_rule": "predictor"}, {}, "`inference_rule` is 'predictor'"),
        ({}, {"share": 1.0}, "`share` is 1.0, but must be between 0 and 1"),
        ({"capacity": 1.0}, {}, "`share` is 1.0"),
        ({}, {"batches": []}, "hold no token behind the first 1 of a row"),
    ],
)
def test_what_cannot_be_started_is_refused(fields, arguments, message):
    model = build(**fields)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        start_by_importance(model, **{"batches": [rows(2)], **arguments})
    assert model.config.to_dict() == before
