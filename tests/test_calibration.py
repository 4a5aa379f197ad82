"""Calibration: thresholds that spend the wanted compute by the causal rule, and the curve that `compute` follows."""

import json

import pytest
import torch
from real_text import save_source, source_config, text_blocks
from transformers import AutoModelForCausalLM

from varidepth import MoDConfig, MoDForCausalLM, MoRConfig, MoRForCausalLM
from varidepth.analysis.cost import RowRouting, forward_flops, full_routing
from varidepth.cli.main import main
from varidepth.training.calibration import calibrate, shares_at


MOD = {"capacity": 0.4, "always_route_first": 1}
MOR = {"num_recursions": 3, "capacities": [1.0, 0.6, 0.3]}
CASES = {
    "mod-block": (MoDConfig, MoDForCausalLM, MOD),
    "mod-attention": (MoDConfig, MoDForCausalLM, {**MOD, "routing_unit": "attention"}),
    "mod-mlp": (MoDConfig, MoDForCausalLM, {**MOD, "routing_unit": "mlp"}),
    "mod-layers": (MoDConfig, MoDForCausalLM, {"capacity": [0.2, 1.0, 0.7, 0.5]}),
    "mod-predictor": (MoDConfig, MoDForCausalLM, {**MOD, "inference_rule": "predictor"}),
    "mod-running-mean": (MoDConfig, MoDForCausalLM, {**MOD, "inference_rule": "ema_threshold"}),
    "mor": (MoRConfig, MoRForCausalLM, MOR),
    "mor-sequence": (MoRConfig, MoRForCausalLM, {**MOR, "sharing": "middle_sequence"}),
}


def build(case: str):
    """Routers that were never at their capacities."""
    config_class, model_class, fields = CASES[case]
    torch.manual_seed(0)
    model = model_class(config_class.from_backbone(source_config(num_hidden_layers=8), **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.5 if "router" in name or "predictor" in name else 0.1) * torch.randn_like(parameter))
    return model


def rows(count: int = 64) -> torch.Tensor:
    return text_blocks().blocks[:count]


@torch.no_grad()
def shares(model, ids: torch.Tensor) -> list[float]:
    return model(ids, output_routing=True, use_cache=False).routing_mask.double().mean(dim=(0, 1)).tolist()


def spent(model, ids: torch.Tensor) -> float:
    """FLOPs of the decoder layers as a share of those of all tokens in all layers, row by row."""
    config, length = model.config, ids.shape[1]
    with torch.no_grad():
        entered = model(ids, output_routing=True, use_cache=False).routing_mask.sum(dim=1).tolist()
    whole = forward_flops(config, full_routing(config, length), logits=0).total
    rows = [RowRouting(length, tuple(row), 0, (0,) * len(row)) for row in entered]
    return sum(forward_flops(config, row, logits=0).total for row in rows) / (whole * len(rows))


@pytest.mark.parametrize("case", CASES)
def test_the_causal_rule_meets_the_capacities(case):
    model, ids = build(case), rows()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    wanted = [p.share for p in model.config.routed_passes]
    result = calibrate(model, ids.split(16))
    assert shares(model, ids) == pytest.approx(wanted, abs=0.011)
    assert [p.share for p in result.passes] == pytest.approx([w for w in wanted if w < 1], abs=0.011)
    assert result.compute == pytest.approx(spent(model, ids), abs=0.01)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not model.training and model.config.inference_rule == CASES[case][2].get("inference_rule", "threshold")


@pytest.mark.parametrize("case", ["mod-attention", "mod-predictor", "mor"])
def test_compute_moves_along_the_curve(case):
    model, ids = build(case), rows()
    calibrate(model, ids.split(16))
    points = [point["compute"] for point in model.config.compute_curve]
    assert points == sorted(points) and points[-1] == 1.0 and len(points) == 6
    found = []
    for compute in (points[0], (points[0] + points[1]) / 2, points[2], 0.97, 1.0):
        model.config.compute = compute
        found.append(spent(model, ids))
        assert found[-1] == pytest.approx(compute, abs=0.03)
    assert found == sorted(found)
    assert shares(model, ids) == [1.0] * len(model.config.routed_passes)


def test_scores_far_below_zero_are_told_apart():
    """As a membership loss leaves them that pushes most tokens out."""
    torch.manual_seed(0)
    config = MoDConfig.from_backbone(source_config(num_hidden_layers=4), capacity=0.4, router_bias=True)
    model = MoDForCausalLM(config).eval()
    with torch.no_grad():
        model.model.routers.weight.normal_()
        model.model.routers.bias.fill_(-60.0)
    calibrate(model, [rows(32)])
    assert shares(model, rows(32)) == pytest.approx([0.4, 0.4], abs=0.011)


def test_another_compute_than_that_of_the_capacities():
    model, ids = build("mod-block"), rows()
    result = calibrate(model, ids.split(16), compute=0.9)
    assert result.compute == pytest.approx(0.9, abs=0.01) and spent(model, ids) == pytest.approx(0.9, abs=0.01)
    assert model.config.capacity == 0.4


def test_agreement_with_top_k_is_that_of_the_report():
    """Recomputed by hand from the outputs."""
    model, ids = build("mod-block"), rows(8)
    result = calibrate(model, [ids])
    config = model.config
    config.inference_rule = "topk"
    with torch.no_grad():
        output = model(ids, output_routing=True, use_cache=False)
    members, scores = output.routing_mask.flatten(0, 1), output.decision_logits.flatten(0, 1)
    predicted = scores.sigmoid() >= torch.tensor(config.router_thresholds)
    predicted |= (torch.arange(len(scores)) % ids.shape[1] == 0).unsqueeze(1)
    for i, one in enumerate(result.passes):
        hits = (members & predicted)[:, i].sum()
        assert one.accuracy == pytest.approx(float((members == predicted)[:, i].float().mean()), abs=1e-6)
        assert one.precision == pytest.approx(float(hits / predicted[:, i].sum()), abs=1e-6)
        assert one.recall == pytest.approx(float(hits / members[:, i].sum()), abs=1e-6)


@torch.no_grad()
def test_generate_takes_an_operating_point_for_one_call():
    model, ids = build("mod-attention"), rows()
    calibrate(model, ids.split(16))
    prompt = ids[:2, :12]
    own = model.generate(prompt, max_new_tokens=8, do_sample=False)
    model.config.compute = 1.0
    everyone = model.generate(
        prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    model.config.compute = None
    dialled = model.generate(
        prompt, max_new_tokens=8, do_sample=False, compute=1.0, return_dict_in_generate=True, output_logits=True
    )
    assert all(torch.equal(a, b) for a, b in zip(everyone.logits, dialled.logits, strict=True))
    assert model.config.compute is None
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), own)


def test_the_curve_travels_with_the_checkpoint(tmp_path):
    model, ids = build("mod-attention"), rows()
    calibrate(model, ids.split(16))
    model.save_pretrained(tmp_path / "calibrated")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "calibrated", compute=0.95)
    assert loaded.config.compute == 0.95 and loaded.config.compute_curve == model.config.compute_curve
    assert spent(loaded, ids) == pytest.approx(0.95, abs=0.03)
    assert shares(AutoModelForCausalLM.from_pretrained(tmp_path / "calibrated"), ids) == shares(model, ids)


def test_shares_fall_from_one_through_the_capacities_to_none():
    assert shares_at([0.5, 1.0], 0) == [1, 1]
    assert shares_at([0.5, 1.0], 1) == [0.5, 1]
    assert shares_at([0.5, 1.0], 1.5) == [0.25, 1]


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("mod-block", {"compute": 0.2}, "`compute` is 0.2, but the routed layers of this model allow 0.5"),
        ("mod-block", {"compute": 1.0}, "`compute` is 1.0, .* to 1 \\(not included"),
    ],
)
def test_a_compute_out_of_reach_is_refused_and_changes_nothing(case, change, message):
    model = build(case)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        calibrate(model, [rows(4)], **change)
    assert model.config.to_dict() == before


def test_routers_that_cannot_be_calibrated_are_refused():
    torch.manual_seed(0)
    source = source_config(num_hidden_layers=4)
    stochastic = MoDForCausalLM(MoDConfig.from_backbone(source, routing="stochastic"))
    with pytest.raises(ValueError, match="routing is 'stochastic', but only routers with routing='expert_choice'"):
        calibrate(stochastic, [rows(2)])
    with pytest.raises(ValueError, match="All capacities are 1"):
        calibrate(MoDForCausalLM(MoDConfig.from_backbone(source, capacity=1.0)), [rows(2)])
    with pytest.raises(ValueError, match="no token"):
        calibrate(build("mor"), [])
    tied = build("mod-block")
    before = tied.config.to_dict()
    with torch.no_grad():
        tied.model.routers.weight[2] = 0
    with pytest.raises(ValueError, match="scores of router 2 are tied"):
        calibrate(tied, [rows(2)])
    assert tied.config.to_dict() == before
    with torch.no_grad():
        tied.model.routers.weight[2] = 1e4 * torch.randn_like(tied.model.routers.weight[2])
        tied.model.routers.weight[2] *= 1e3
    with pytest.raises(ValueError, match="above 30 a sigmoid cannot tell them apart"):
        calibrate(tied, [rows(8)])


@pytest.mark.parametrize("compute", [0.1, 1.5])
def test_an_operating_point_off_the_curve_is_refused(compute):
    model, ids = build("mod-block"), rows(8)
    with pytest.raises(ValueError, match="has no calibrated `compute_curve`; run `varidepth calibrate`"):
        model.generate(ids[:1], max_new_tokens=1, compute=compute)
    calibrate(model, [ids])
    with pytest.raises(ValueError, match=f"`compute` is {compute}, but the calibrated curve .* goes from 0.* to 1"):
        model.generate(ids[:1], max_new_tokens=1, compute=compute)
    assert model.config.compute is None


def test_the_command_writes_a_calibrated_checkpoint(tmp_path, capsys):
    save_source(tmp_path / "source")
    model = build("mod-attention")
    model.save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).write_bytes((tmp_path / "source" / file).read_bytes())
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("The quick brown fox jumps over the lazy dog. " * 40 for _ in range(4)))
    command = ["calibrate", str(tmp_path / "model"), str(text), "--window", "32", "--max-tokens", "512"]
    assert main([*command, "-o", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["compute_curve"] == printed["curve"] and len(config["router_thresholds"]) == 4
    before = json.loads((tmp_path / "model" / "config.json").read_text())
    assert {key for key in config if config.get(key) != before.get(key)} <= {"router_thresholds", "compute_curve"}
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()
    # without an output nothing is written, and a taken output is refused before the work
    assert main(command) == 0 and "loss " in capsys.readouterr().out
    assert main([*command, "-o", str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err
    for flags, message in (
        (["--compute", "0.1"], "`compute` is 0.1"),
        (["--window", "1"], "`window` is 1"),
    ):
        assert main([*command, *flags]) == 2
        assert message in capsys.readouterr().err
