"""Converted checkpoints compute what the vanilla model with its layers repeated computes, and carry all files."""

import json
import os
import subprocess
import sys

import pico_checkpoints
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from pico_checkpoints import pico_tokenizer, repeated_vanilla, save_pico, some_ids, unrolled_sources
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from varidepth import MoRForCausalLM
from varidepth.configuration.backbone_config import BACKBONES
from varidepth.conversion import convert as convert_module
from varidepth.conversion.convert import convert
from varidepth.conversion.errors import ConversionError
from varidepth.conversion.recipe import Recipe, shipped_recipes
from varidepth.conversion.unroll import unroll


FAMILIES = ["llama", "qwen3", "gemma2"]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits_of(model, ids=None):
    with torch.no_grad():
        return model(some_ids() if ids is None else ids).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", ["stepwise", "average", "random"])
def test_a_converted_model_is_its_source_with_layers_repeated(family, init, tmp_path):
    source = save_pico(tmp_path / "source", family)
    result = convert(source, tmp_path / "mor", num_recursions=2, init=init, quiet=True)
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = load(tmp_path / "mor", **options)
    assert isinstance(model, MoRForCausalLM)
    vanilla = repeated_vanilla(source, unrolled_sources(result.plan), **options)
    # averaged weights are summed in another order than in the reference
    torch.testing.assert_close(logits_of(model), logits_of(vanilla), rtol=0, atol=1e-5 if init == "average" else 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"sharing": "cycle", "num_recursions": 3},
        {"sharing": "sequence", "num_recursions": 2},
        {"sharing": "middle_sequence", "num_recursions": 2, "init": "upper"},
        {"sharing": "middle_cycle", "num_recursions": 3},  # 4 layers by 3: one more coda layer
        {"sharing": "middle_cycle", "num_recursions": 3, "drop_layers": True},
        {"sharing": "middle_cycle", "num_recursions": 1},
        {"prelude_layers": 2, "coda_layers": 2, "num_recursions": 2, "init": "lower"},
        {"num_recursions": 2, "routing": "token_choice"},
        {"num_recursions": 2, "routing": "token_choice", "router_activation": "sigmoid", "balancing": "loss_free"},
        {"num_recursions": 2, "routing": "none"},
        {"num_recursions": 2, "router_type": "mlp"},
        {"num_recursions": 2, "inference_rule": "predictor", "router_type": "wide_mlp"},
        {"num_recursions": 2, "router_activation": "tanh"},
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values()),
)
def test_every_kind_starts_exactly_at_its_source(fields, tmp_path):
    source = save_pico(tmp_path / "source")
    result = convert(source, tmp_path / "mor", quiet=True, **fields)
    vanilla = repeated_vanilla(source, unrolled_sources(result.plan))
    assert torch.equal(logits_of(load(tmp_path / "mor")), logits_of(vanilla))


@pytest.mark.parametrize("family", BACKBONES)
def test_every_family_converts_and_unrolls(family, tmp_path):
    source = save_pico(tmp_path / "source", family, layers=7, tokenizer=False)
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    result = convert(source, tmp_path / "mor", num_recursions=2, init="upper", quiet=True)
    logits = logits_of(load(tmp_path / "mor", **options))
    assert torch.equal(logits, logits_of(repeated_vanilla(source, unrolled_sources(result.plan), **options)))
    unroll(tmp_path / "mor", tmp_path / "vanilla", quiet=True)
    assert torch.equal(logits, logits_of(load(tmp_path / "vanilla", **options)))
    assert result.plan.full.parameters == sum(p.numel() for p in load(tmp_path / "mor").parameters())


@pytest.mark.parametrize("fields", [{"num_recursions": 2, "init": "lower"}, {"to": "mod"}], ids=["mor", "mod"])
def test_the_checkpoint_loads_where_varidepth_is_not_installed(fields, tmp_path):
    source = save_pico(tmp_path / "source", "qwen3")
    convert(source, tmp_path / "mor", quiet=True, **fields)
    torch.save(logits_of(load(tmp_path / "mor")), tmp_path / "expected.pt")
    program = """
import sys
sys.modules["varidepth"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from pico_checkpoints import some_ids
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder + "/mor", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(model(some_ids()).logits, torch.load(folder + "/expected.pt"))
AutoTokenizer.from_pretrained(folder + "/mor", trust_remote_code=True)
"""
    tests = os.path.dirname(pico_checkpoints.__file__)
    environment = {**os.environ, "PYTHONPATH": tests, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_hub_id(tmp_path, monkeypatch):
    snapshot = save_pico(tmp_path / "snapshot")
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, "model*.safetensors" in allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("varidepth.conversion.source_checkpoint.snapshot_download", download)
    result = convert("someone/something", tmp_path / "mor", num_recursions=2, revision="v1", quiet=True)
    assert asked == [("someone/something", "v1", True)]
    assert result.plan.source == "someone/something"
    recipe = yaml.safe_load((tmp_path / "mor" / "varidepth_recipe.yaml").read_text())
    assert (recipe["source"], recipe["revision"]) == ("someone/something", "v1")
    convert(None, tmp_path / "again", tmp_path / "mor" / "varidepth_recipe.yaml", quiet=True)
    assert asked[1] == asked[0]
    convert(snapshot, tmp_path / "local", tmp_path / "mor" / "varidepth_recipe.yaml", quiet=True)
    assert ModelCard.load(tmp_path / "mor" / "README.md").data.base_model == "someone/something"


def test_the_commit_of_a_hub_source_is_recorded(tmp_path, monkeypatch):
    snapshot = save_pico(tmp_path / "snapshots" / ("0a" * 20))
    monkeypatch.setattr("varidepth.conversion.source_checkpoint.snapshot_download", lambda *a, **k: str(snapshot))
    result = convert("someone/something", None, {"recursions": 2, "router-init": "random"}, dry_run=True, quiet=True)
    assert result.plan.recipe["revision"] == "0a" * 20
    assert (result.config.num_recursions, result.plan.recipe["router_init"]) == (2, "random")


def test_generation_equals_the_repeated_vanilla_model(tmp_path):
    source = save_pico(tmp_path / "source")
    result = convert(source, tmp_path / "mor", num_recursions=2, quiet=True)
    vanilla = repeated_vanilla(source, unrolled_sources(result.plan))
    options = {"max_new_tokens": 8, "do_sample": False}
    ids = some_ids(1)
    assert torch.equal(load(tmp_path / "mor").generate(ids, **options), vanilla.generate(ids, **options))


def test_no_weight_is_left_random(tmp_path):
    source = save_pico(tmp_path / "source")
    convert(source, tmp_path / "mor", num_recursions=2, capacity_warmup_steps=5, quiet=True)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "mor", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("routing", ["none", "expert_choice", "token_choice"])
def test_unrolling_gives_the_same_function(family, routing, tmp_path):
    source = save_pico(tmp_path / "source", family, layers=8)
    convert(source, tmp_path / "mor", num_recursions=3, routing=routing, quiet=True)
    config = unroll(tmp_path / "mor", tmp_path / "vanilla", quiet=True)
    assert (config.model_type, config.num_hidden_layers) == (family, 8)
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    vanilla = load(tmp_path / "vanilla", **options)
    assert type(vanilla).__module__.startswith("transformers.")
    assert torch.equal(logits_of(vanilla), logits_of(load(tmp_path / "mor", **options)))
    assert not list((tmp_path / "vanilla").glob("*.py"))
    assert ModelCard.load(tmp_path / "vanilla" / "README.md").data.library_name == "transformers"
    AutoTokenizer.from_pretrained(tmp_path / "vanilla")


def test_one_recursion_unrolls_to_the_source(tmp_path):
    source = save_pico(tmp_path / "source", "qwen3", tie_word_embeddings=False)
    convert(source, tmp_path / "mor", num_recursions=1, routing="none", quiet=True)
    unroll(tmp_path / "mor", tmp_path / "vanilla", quiet=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "vanilla"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_source_and_output(tied, tmp_path):
    source = save_pico(tmp_path / "source", tie_word_embeddings=tied, shard="20KB")
    assert (source / "model.safetensors.index.json").is_file()
    result = convert(source, tmp_path / "mor", num_recursions=2, max_shard_size="30KB", quiet=True)
    index = json.loads((tmp_path / "mor" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and all((tmp_path / "mor" / shard).stat().st_size < 32_000 for shard in shards)
    assert ("lm_head.weight" in index["weight_map"]) is not tied
    model = load(tmp_path / "mor")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    vanilla = repeated_vanilla(source, unrolled_sources(result.plan))
    assert torch.equal(logits_of(model), logits_of(vanilla))
    for shard in shards:  # readable by the library, and aligned
        with safe_open(tmp_path / "mor" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_pytorch_shards_are_read(tmp_path):
    source = save_pico(tmp_path / "source")
    convert(source, tmp_path / "a", num_recursions=2, quiet=True)
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    files = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in files.items():
        torch.save({name: weights[name] for name in part}, source / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (source / "model.safetensors").unlink()
    convert(source, tmp_path / "b", num_recursions=2, quiet=True)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_the_bare_model_without_head_prefix_is_read(tmp_path):
    source = save_pico(tmp_path / "source")
    convert(source, tmp_path / "a", num_recursions=2, quiet=True)
    weights = load_file(source / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in weights.items()}, source / "model.safetensors")
    convert(source, tmp_path / "b", num_recursions=2, quiet=True)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("asked, expected", [(None, torch.bfloat16), ("float32", torch.float32)])
def test_the_type_of_the_weights(asked, expected, tmp_path):
    source = save_pico(tmp_path / "source", dtype=torch.bfloat16)
    convert(source, tmp_path / "mor", num_recursions=2, init="average", dtype=asked, quiet=True)
    weights = load_file(tmp_path / "mor" / "model.safetensors")
    assert {value.dtype for name, value in weights.items() if ".routers." not in name} == {expected}
    model = load(tmp_path / "mor")
    assert model.model.embed_tokens.weight.dtype == expected
    assert model.model.routers.weight.dtype == torch.float32


def test_the_output_is_complete(tmp_path):
    source = save_pico(tmp_path / "source")
    terms = {"license": "other", "license_name": "pico", "license_link": "LICENSE.txt"}
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(terms)}---\nA model.\n")
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "additional_chat_templates/tools.jinja"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true, "eos_token_id": [2, 7]}')
    convert(source, tmp_path / "mor", num_recursions=2, base_model="someone/something", quiet=True)
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "additional_chat_templates/tools.jinja"):
        assert (tmp_path / "mor" / name).read_text() == name
    names = {path.name for path in (tmp_path / "mor").iterdir()}
    assert {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_mor.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "varidepth_plan.json",
        "varidepth_recipe.yaml",
    } <= names
    config = json.loads((tmp_path / "mor" / "config.json").read_text())
    assert set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
    }
    assert all(f"{reference.split('.')[0]}.py" in names for reference in config["auto_map"].values())
    model = load(tmp_path / "mor")
    assert model.generation_config.eos_token_id == [2, 7] and model.generation_config.temperature == 0.5
    text = "w1 w5 w9"
    assert AutoTokenizer.from_pretrained(tmp_path / "mor")(text).input_ids == pico_tokenizer()(text).input_ids

    card = ModelCard.load(tmp_path / "mor" / "README.md")
    assert "AutoTokenizer.from_pretrained(name, trust_remote_code=True)" in card.text
    assert {key: getattr(card.data, key) for key in terms} == terms
    assert card.data.base_model == "someone/something"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert "custom_code" in card.data.tags and "${" not in card.content
    assert str(tmp_path) not in card.content
    plan = json.loads((tmp_path / "mor" / "varidepth_plan.json").read_text())
    assert plan["layers"][1]["positions"] == [1, 3] and plan["before"]["parameters"] > plan["full"]["parameters"]
    assert plan["full"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_tokenizer_that_does_not_name_its_class_still_loads(tmp_path):
    source = save_pico(tmp_path / "source")
    (source / "tokenizer_config.json").unlink()
    convert(source, tmp_path / "mor", num_recursions=2, quiet=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "mor")("w1 w5").input_ids == pico_tokenizer()("w1 w5").input_ids


def test_the_recipe_reproduces_the_checkpoint(tmp_path):
    source = save_pico(tmp_path / "source")
    fields = {"num_recursions": 2, "init": "random", "seed": 5, "router_init": "random", "capacities": [1.0, 0.25]}
    convert(source, tmp_path / "a", quiet=True, **fields)
    recipe = tmp_path / "a" / "varidepth_recipe.yaml"
    convert(source, tmp_path / "b", recipe, quiet=True)
    for name in ("model.safetensors", "config.json", "varidepth_plan.json", "README.md", "varidepth_recipe.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    convert(source, tmp_path / "c", recipe, seed=6, quiet=True)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (tmp_path / "c" / "model.safetensors").read_bytes()


def test_random_routers_take_the_gating_of_the_paper(tmp_path):
    source = save_pico(tmp_path / "source")
    result = convert(source, tmp_path / "mor", num_recursions=2, router_init="random", quiet=True)
    assert (result.config.gating, result.config.router_alpha, result.config.router_bias) == ("weighted", 0.1, False)
    weight = load_file(tmp_path / "mor" / "model.safetensors")["model.routers.weight"]
    assert 0.01 < weight.std() < 0.03
    with pytest.raises(ConversionError, match="gate"):
        unroll(tmp_path / "mor", tmp_path / "vanilla", quiet=True)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes(name, tmp_path):
    source = save_pico(tmp_path / "source", layers=9)
    result = convert(source, tmp_path / "mor", name, quiet=True)
    asked = Recipe.load(name).to_dict()
    assert {key: result.plan.recipe[key] for key in asked} == asked
    assert torch.isfinite(logits_of(load(tmp_path / "mor"))).all()
    assert yaml.safe_load((tmp_path / "mor" / "varidepth_recipe.yaml").read_text())["to"] == asked["to"]


def test_gemma_repeats_carry_the_attention_type_of_their_layer(tmp_path):
    source = save_pico(tmp_path / "source", "gemma2", layers=8)
    result = convert(source, None, num_recursions=2, init="average", dry_run=True, quiet=True)
    types = result.config.layer_types
    assert types[1:4] == types[4:7] and result.output is None
    assert [layer.attention for layer in result.plan.layers] == [
        types[layer.positions[0]] for layer in result.plan.layers
    ]
    assert any("different attention types" in note for note in result.plan.notes)


def test_the_cards_of_one_recursion_claim_no_repetition(tmp_path):
    source = save_pico(tmp_path / "source")
    convert(source, tmp_path / "mor", num_recursions=1, quiet=True)
    unroll(tmp_path / "mor", tmp_path / "vanilla", quiet=True)
    for folder in ("mor", "vanilla"):
        text = (tmp_path / folder / "README.md").read_text()
        assert not any(words in text for words in ("shared ones", "repeated", "not trained for", "all 1 rec"))


def test_overwriting_replaces_a_checkpoint(tmp_path):
    source = save_pico(tmp_path / "source")
    convert(source, tmp_path / "mor", num_recursions=2, max_shard_size="30KB", quiet=True)
    (tmp_path / "mor" / "__pycache__").mkdir()
    (tmp_path / "mor" / "__pycache__" / "modeling_mor.cpython-311.pyc").write_bytes(b"")
    (tmp_path / "mor" / "LICENSE.txt").write_text("terms")
    convert(source, tmp_path / "mor", num_recursions=1, overwrite=True, quiet=True)
    names = {path.name for path in (tmp_path / "mor").iterdir()}
    assert "model.safetensors" in names and "model.safetensors.index.json" not in names
    assert {path.name for path in tmp_path.iterdir()} == {"source", "mor"}


def test_an_output_that_appeared_meanwhile_is_kept(tmp_path, monkeypatch):
    source = save_pico(tmp_path / "source")
    write_card = convert_module.write_card

    def slow_card(*arguments):
        (tmp_path / "mor").mkdir()
        (tmp_path / "mor" / "notes.txt").write_text("mine")
        write_card(*arguments)

    monkeypatch.setattr(convert_module, "write_card", slow_card)
    with pytest.raises(ConversionError, match="not empty"):
        convert(source, tmp_path / "mor", num_recursions=2, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "mor"}
    assert [path.name for path in (tmp_path / "mor").iterdir()] == ["notes.txt"]
