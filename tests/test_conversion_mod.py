"""A converted MoD computes what its source computes, bit for bit, until its routers are trained."""

import json

import pytest
import torch
from pico_checkpoints import edit_json, pico_tokenizer, save_pico, some_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from varidepth import MoDForCausalLM
from varidepth.cli.main import main
from varidepth.configuration.backbone_config import BACKBONES, MOE_BACKBONES
from varidepth.conversion.convert import convert
from varidepth.conversion.errors import ConversionError
from varidepth.conversion.unroll import unroll


FAMILIES = BACKBONES + MOE_BACKBONES
NO_SDPA = ("gemma2",)


def load(folder, attention="sdpa"):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


def logits_of(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or {"input_ids": some_ids()})).logits


@pytest.fixture(scope="module")
def source_of(tmp_path_factory):
    """A vanilla checkpoint of each family, made once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = save_pico(tmp_path_factory.mktemp(family) / "source", family, layers=4)
        return made[family]

    return get


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_is_its_source(family, unit, source_of, tmp_path):
    source = source_of(family)
    convert(source, tmp_path / "mod", to="mod", routing_unit=unit, capacity=0.25, quiet=True)
    padded = {"input_ids": some_ids(), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    padded["attention_mask"][0, :7] = 0
    real = padded["attention_mask"].bool()
    vanilla, model = load(source, "eager"), load(tmp_path / "mod", "eager")
    assert isinstance(model, MoDForCausalLM)
    for attention in ("eager",) if family in NO_SDPA else ("eager", "sdpa"):
        for either in (vanilla, model):
            either.set_attn_implementation(attention)
        for capacity in (0.25, 1.0):
            model.config.capacity = capacity
            assert torch.equal(logits_of(model), logits_of(vanilla))
            difference = logits_of(model, **padded)[real] - logits_of(vanilla, **padded)[real]
            assert difference.abs().max() <= 1e-6


def test_generation_is_that_of_the_source(source_of, tmp_path):
    source = source_of("llama")
    convert(source, tmp_path / "mod", to="mod", routing_unit="block", quiet=True)
    options = {"max_new_tokens": 8, "do_sample": False}
    ids = some_ids(1)
    assert torch.equal(load(tmp_path / "mod").generate(ids, **options), load(source).generate(ids, **options))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3_moe"])
def test_unrolling_gives_the_source_back(family, source_of, tmp_path):
    source = source_of(family)
    convert(source, tmp_path / "mod", to="mod", quiet=True)
    config = unroll(tmp_path / "mod", tmp_path / "vanilla", quiet=True)
    assert (config.model_type, config.num_hidden_layers) == (family, 4)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "vanilla"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    load(tmp_path / "vanilla", "eager")


@pytest.mark.parametrize(
    "fields",
    [
        {"gate": "one_plus_tanh", "router_bias": True},
        {"router_bias": False, "routing_unit": "mlp"},
        {"inference_rule": "predictor"},
        {"inference_rule": "ema_threshold", "capacity_warmup_steps": 5},
        {"capacity": [1.0, 0.25], "routed_layers": [1, 3], "inference_rule": "threshold"},
        {"gate": "sigmoid", "router_alpha": 2.0},
        {"capacity": 1.0, "gate": "straight_through", "router_init": "random", "inference_rule": "topk"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_every_exact_start(fields, source_of, tmp_path):
    source = source_of("llama")
    convert(source, tmp_path / "mod", to="mod", quiet=True, **fields)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "mod", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits_of(model.eval()), logits_of(load(source)))
    unroll(tmp_path / "mod", tmp_path / "vanilla", quiet=True)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"router_init": "random"}, "gate is 'raw'"),
        ({"router_init": "random", "gate": "straight_through"}, "routers have learned"),
        ({"gate": "sigmoid"}, "gate is 'sigmoid'"),
        ({"inference_rule": "topk"}, "rank"),
        ({"routing": "stochastic"}, "at random"),
    ],
)
def test_unrolling_refuses_what_is_not_exact(fields, words, source_of, tmp_path):
    convert(source_of("llama"), tmp_path / "mod", to="mod", quiet=True, **fields)
    assert not torch.equal(logits_of(load(tmp_path / "mod")), logits_of(load(source_of("llama"))))
    with pytest.raises(ConversionError, match=words):
        unroll(tmp_path / "mod", tmp_path / "vanilla", quiet=True)
    assert not (tmp_path / "vanilla").exists()


def test_unrolling_refuses_thresholds_that_no_token_reaches(source_of, tmp_path):
    convert(source_of("llama"), tmp_path / "mod", to="mod", quiet=True)
    edit_json(tmp_path / "mod" / "config.json", router_thresholds=[0.6])
    with pytest.raises(ConversionError, match="routers have learned"):
        unroll(tmp_path / "mod", tmp_path / "vanilla", quiet=True)


@pytest.mark.parametrize("family", MOE_BACKBONES)
def test_experts_are_read_in_both_layouts(family, source_of, tmp_path):
    source = source_of(family)
    convert(source, tmp_path / "a", to="mod", quiet=True)
    weights = load_file(tmp_path / "a" / "model.safetensors")
    assert weights["model.layers.0.mlp.experts.gate_up_proj"].shape[0] == 4
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    (stacked / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(
        {name: value for name, value in weights.items() if ".routers." not in name}, stacked / "model.safetensors"
    )
    convert(stacked, tmp_path / "b", to="mod", quiet=True)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_new_experts_have_random_gates_beside_the_old_ones(source_of, tmp_path):
    source = source_of("mixtral")
    fields = {"to": "mod", "num_noop_experts": 3, "router_init": "random"}
    result = convert(source, tmp_path / "mod", quiet=True, **fields)
    assert any("compete" in note for note in result.plan.notes)
    gate = load_file(tmp_path / "mod" / "model.safetensors")["model.layers.2.mlp.gate.weight"]
    old = load_file(source / "model.safetensors")["model.layers.2.block_sparse_moe.gate.weight"]
    assert torch.equal(gate[:4], old) and gate[4:].std() > 0
    assert torch.isfinite(logits_of(load(tmp_path / "mod"))).all()
    with pytest.raises(ConversionError, match="without effect"):
        unroll(tmp_path / "mod", tmp_path / "vanilla", quiet=True)


def test_defaults(source_of, tmp_path):
    source = source_of("llama")
    config = convert(source, None, to="mod", dry_run=True, quiet=True).config
    assert (config.routing_unit, config.gate, config.always_route_first) == ("attention", "straight_through", 1)
    assert (config.routed_layers, config.capacities) == ([1], [0.5])
    random = convert(source, tmp_path / "mod", to="mod", router_init="random", quiet=True)
    assert random.config.gate == "raw" and any("train before use" in note for note in random.plan.notes)
    weight = load_file(tmp_path / "mod" / "model.safetensors")["model.routers.weight"]
    assert 0.01 < weight.std() < 0.03 and weight.dtype == torch.float32


def test_the_recipe_reproduces_the_checkpoint(source_of, tmp_path):
    source = source_of("llama")
    text = write_text(tmp_path)
    fields = {"to": "mod", "routed_layers": "auto", "num_routed_layers": 2, "calibration_text": str(text)}
    convert(source, tmp_path / "a", router_init="random", quiet=True, **fields)
    recipe = tmp_path / "a" / "varidepth_recipe.yaml"
    assert str(tmp_path) not in recipe.read_text() + (tmp_path / "a" / "varidepth_plan.json").read_text()
    convert(source, tmp_path / "b", recipe, quiet=True)
    for name in ("model.safetensors", "config.json", "varidepth_recipe.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def write_text(folder):
    generator = torch.Generator().manual_seed(5)
    words = [f"w{i}" for i in torch.randint(0, 93, (950,), generator=generator).tolist()]
    path = folder / "text.txt"
    path.write_text("\n\n".join(" ".join(words[i : i + 50]) for i in range(0, len(words), 50)))
    return path


@pytest.mark.parametrize("unit, written_by", [("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")])
def test_layers_are_chosen_by_what_their_absence_costs(unit, written_by, source_of, tmp_path):
    """A part of a layer whose last matrix is zero adds nothing, like one that is passed by."""
    source, text = source_of("llama"), write_text(tmp_path)
    fields = {"to": "mod", "routed_layers": "auto", "routing_unit": unit, "always_route_first": 0}
    result = convert(source, tmp_path / "mod", num_routed_layers=2, calibration_text=text, quiet=True, **fields)
    measured = result.plan.redundancy
    model = load(source)
    stream = pico_tokenizer()(text.read_text(), add_special_tokens=False).input_ids
    rows = measured.tokens // 128
    assert rows == 7
    ids = torch.tensor(stream[: rows * 128]).view(rows, 128)

    def loss():
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    before = loss()
    assert measured.source_loss == pytest.approx(before, abs=1e-4)
    for layer, increase in enumerate(measured.loss_increases):
        weight = model.get_submodule(f"model.layers.{layer}.{written_by}").weight
        kept = weight.detach().clone()
        weight.data.zero_()
        assert increase == pytest.approx(loss() - before, abs=1e-4)
        weight.data.copy_(kept)
    costs = measured.loss_increases
    assert result.config.routed_layers == sorted(sorted(range(1, 4), key=lambda layer: costs[layer])[:2])
    plan = json.loads((tmp_path / "mod" / "varidepth_plan.json").read_text())
    assert plan["redundancy"]["loss_increases"] == list(costs) and plan["redundancy"]["text"] == "text.txt"
    assert all(f"{cost:+.4f}" in result.plan.table() for cost in costs)
    assert torch.equal(logits_of(load(tmp_path / "mod")), logits_of(model))


def test_tokens_that_always_enter_enter_in_the_measurement(source_of, tmp_path):
    fields = {"routed_layers": "auto", "calibration_text": write_text(tmp_path), "always_route_first": 128}
    measured = convert(source_of("llama"), None, to="mod", dry_run=True, quiet=True, **fields).plan.redundancy
    assert measured.loss_increases == (0.0,) * 4


def test_plan_and_card(source_of, tmp_path):
    result = convert(source_of("qwen3"), tmp_path / "mod", to="mod", routing_unit="block", capacity=0.25, quiet=True)
    plan = result.plan
    assert [(layer.role, layer.unit, layer.capacity) for layer in plan.layers] == [
        ("dense", None, None),
        ("routed", "block", 0.25),
        ("dense", None, None),
        ("dense", None, None),
    ]
    assert plan.full.layers_per_token == 4 and plan.expected.layers_per_token == 3.25
    assert plan.expected.kv_bytes_per_token == plan.before.kv_bytes_per_token * 3.25 / 4
    assert plan.full.parameters == sum(p.numel() for p in load(tmp_path / "mod").parameters())
    assert any("until the routers are trained" in note for note in plan.notes)
    card = (tmp_path / "mod" / "README.md").read_text()
    assert "mixture-of-depths" in card and "2404.02258" in card and "${" not in card
    assert "Mixture-of-Recursions" not in card


def test_inspect(source_of, tmp_path, capsys):
    convert(source_of("mixtral"), tmp_path / "mod", to="mod", capacity=0.25, quiet=True)
    assert main(["inspect", str(tmp_path / "mod")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("model_type mod", "dense 0, 2, 3", "routed 1", "capacities [0.25]", "let every token through"):
        assert words in text
    assert main(["inspect", str(tmp_path / "mod"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["layers"][1] == [1, "routed", [1]]
    assert described["expected"]["kv_bytes_per_token"] == described["full"]["kv_bytes_per_token"] * 3.25 / 4
    assert described["stored_parameters"] == described["full"]["parameters"]
    assert main(["inspect", str(source_of("mixtral"))]) == 0
