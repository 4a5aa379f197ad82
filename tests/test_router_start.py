"""Routers started from measured gains."""

import pytest
import torch
from real_text import source_config, text_blocks

from varidepth import MoRConfig, MoRForCausalLM
from varidepth.training.router_start import start_routers


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_bias": False}, "with a bias"),
        ({"router_type": "mlp"}, "linear"),
        ({"inference_rule": "predictor"}, "inference_rule is 'predictor'"),
        ({"inference_rule": "topk"}, "inference_rule is 'topk'"),
    ],
)
def test_what_cannot_be_started_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        start_routers(build(**fields), [text_blocks().blocks[:2]])


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="no token"):
        start_routers(build(), [])
