"""Routers started from measured gains, and biases that meet the capacities."""

import pytest
import torch
from real_text import source_config, text_blocks

from varidepth import MoRConfig, MoRForCausalLM
from varidepth.training.router_calibration import calibrate_routers, start_routers


def build(**fields):
    torch.manual_seed(0)
    settings = {"num_recursions": 3, "capacities": [1.0, 0.6, 0.3], "gating": "interpolate", "router_bias": True}
    model = MoRForCausalLM(
        MoRConfig.from_backbone(source_config(num_hidden_layers=8), **{**settings, **fields})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def shares(model, ids):
    """Share of tokens in each recursion, over all blocks."""
    config = model.config
    logits = model(ids, output_routing=True, use_cache=False).router_logits
    thresholds = torch.tensor(config.router_thresholds).logit()
    entered = logits.view(*ids.shape, -1, config.num_recursions) >= thresholds
    return entered.float().mean(dim=(0, 1, 2)).tolist()


@pytest.mark.parametrize("sharing", ["middle_cycle", "middle_sequence"])
def test_routers_start_at_their_capacities_on_what_is_gained(sharing):
    model, ids = build(sharing=sharing), text_blocks().blocks[:16]
    body = {name: p.clone() for name, p in model.named_parameters() if "router" not in name}
    correlations = start_routers(model, ids.split(8))
    routers = [router for router in range(model.config.num_routers) if router % 3]
    assert list(correlations) == routers and all(0.05 < c <= 1 for c in correlations.values())
    assert all(torch.equal(p, body[name]) for name, p in model.named_parameters() if name in body)
    # the first recursion is open for everyone
    assert not model.model.routers.weight[0::3].any() and (model.model.routers.bias[0::3] == 20).all()
    assert len(set(model(ids, output_routing=True).token_depth.flatten().tolist())) > 1


@pytest.mark.parametrize("sharing", ["middle_cycle", "middle_sequence"])
@pytest.mark.parametrize("drift", [3.0, 60.0])
def test_biases_meet_the_capacities(sharing, drift):
    """Also where training has moved the scores so far that their sigmoid is 1 for all."""
    model, ids = build(sharing=sharing), text_blocks().blocks[:16]
    start_routers(model, [ids])
    with torch.no_grad():
        model.model.routers.bias += drift
    assert abs(shares(model, ids)[1] - 0.6) > 0.05
    calibrate_routers(model, ids.split(4))
    found = shares(model, ids)
    assert found[1:] == pytest.approx([0.6, 0.3], abs=0.005)


@pytest.mark.parametrize(
    ("call", "fields", "message"),
    [
        (start_routers, {"router_bias": False}, "with a bias"),
        (start_routers, {"router_type": "mlp"}, "linear"),
        (start_routers, {"inference_rule": "predictor"}, "inference_rule is 'predictor'"),
        (start_routers, {"inference_rule": "topk"}, "inference_rule is 'topk'"),
        (calibrate_routers, {"inference_rule": "predictor"}, "'predictor'"),
        (calibrate_routers, {"router_bias": False}, "router_bias False"),
        (calibrate_routers, {"routing": "token_choice", "capacities": None}, "expert-choice"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(call, fields, message):
    with pytest.raises(ValueError, match=message):
        call(build(**fields), [text_blocks().blocks[:2]])


@pytest.mark.parametrize("tied", [1, 2])
def test_tied_scores_are_refused_and_no_bias_moves(tied):
    model, ids = build(), text_blocks().blocks[:4]
    start_routers(model, [ids])
    with torch.no_grad():
        model.model.routers.bias[1] += 3.0
        model.model.routers.weight[tied] = 0.0
        model.model.routers.bias[tied] = 20.0
    before = model.model.routers.bias.clone()
    with pytest.raises(ValueError, match=f"scores of router {tied} are tied; train it or call `start_routers` first"):
        calibrate_routers(model, [ids])
    assert torch.equal(model.model.routers.bias, before)


@pytest.mark.parametrize("call", [start_routers, calibrate_routers])
def test_no_text_is_refused(call):
    with pytest.raises(ValueError, match="no token"):
        call(build(), [])
