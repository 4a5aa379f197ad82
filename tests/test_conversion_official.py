"""Checkpoints in the layouts of the official MoR code."""

import pytest
import torch
from pico_checkpoints import pico_config, some_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from varidepth.conversion.convert import convert
from varidepth.conversion.errors import ConversionError


PARTS = {
    "self_attn.q_proj.weight": (32, 32),
    "self_attn.k_proj.weight": (16, 32),
    "self_attn.v_proj.weight": (16, 32),
    "self_attn.o_proj.weight": (32, 32),
    "mlp.gate_proj.weight": (48, 32),
    "mlp.up_proj.weight": (48, 32),
    "mlp.down_proj.weight": (32, 48),
    "input_layernorm.weight": (32,),
    "post_attention_layernorm.weight": (32,),
}
RECURSIONS, SHARED = 3, 2


def official(folder, *, kind="expert", middle=True, router="linear", predictor=False, loss_free=False, binary=False):
    """Writes an official checkpoint of 3 recursions of 2 layers; returns its tensors."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.1

    shared = [{part: draw(*shape) for part, shape in PARTS.items()} for _ in range(SHARED)]
    tensors = {"model.embed_tokens.weight": draw(96, 32), "model.norm.weight": draw(32) + 1}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    offset = 1 if middle else 0
    for r in range(RECURSIONS):
        for j, layer in enumerate(shared):
            prefix = (
                f"model.layers.{r + offset}.block.{j}."
                if kind == "expert"
                else f"model.layers.{offset}.block_list.{r}.{j}."
            )
            tensors |= {prefix + part: value.clone() for part, value in layer.items()}
    outputs = 1 if kind == "expert" else RECURSIONS
    for i in range(RECURSIONS if kind == "expert" else 1):
        for group in ["mor_router"] + (["mlp_router"] if predictor else []):
            name = f"model.layers.{i + offset}.{group}.router"
            if router == "linear":
                tensors[f"{name}.weight"] = draw(outputs, 32)
            else:
                tensors |= {f"{name}.0.weight": draw(64, 32), f"{name}.2.weight": draw(outputs, 64)}
    if loss_free:
        tensors[f"model.layers.{offset}.router_bias"] = draw(RECURSIONS)
    if middle:
        last = RECURSIONS + 1 if kind == "expert" else 2
        for layer in (0, last):
            tensors |= {f"model.layers.{layer}.{part}": draw(*shape) for part, shape in PARTS.items()}
    folder.mkdir()
    pico_config("llama", 8 if middle else 6).save_pretrained(folder)
    if binary:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize("middle", [True, False], ids=["middle_cycle", "cycle"])
def test_expert_choice(middle, router, binary, tmp_path):
    tensors = official(tmp_path / "source", middle=middle, router=router, predictor=True, binary=binary)
    result = convert(tmp_path / "source", tmp_path / "mor", quiet=True)
    config = result.config
    assert (config.routing, config.sharing) == ("expert_choice", "middle_cycle" if middle else "cycle")
    assert (config.num_recursions, config.num_shared_layers, config.router_type) == (RECURSIONS, SHARED, router)
    assert (config.gating, config.router_alpha, config.inference_rule) == ("weighted", 0.1, "predictor")
    weights = load_file(tmp_path / "mor" / "model.safetensors")
    first = 1 if middle else 0
    assert torch.equal(
        weights[f"model.layers.{first}.mlp.up_proj.weight"],
        tensors[f"model.layers.{first}.block.0.mlp.up_proj.weight"],
    )
    for group, official_group in (("routers", "mor_router"), ("predictors", "mlp_router")):
        for r in range(RECURSIONS):
            name = f"model.layers.{r + first}.{official_group}.router"
            last = f"{name}.weight" if router == "linear" else f"{name}.2.weight"
            assert torch.equal(weights[f"model.{group}.weight"][r], tensors[last])
            if router == "mlp":
                assert torch.equal(weights[f"model.{group}.expand_weight"][r], tensors[f"{name}.0.weight"])
    assert "lm_head.weight" not in weights and config.tie_word_embeddings
    check_loads(tmp_path / "mor")


@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize("middle", [True, False], ids=["middle_cycle", "cycle"])
def test_token_choice(middle, router, tmp_path):
    tensors = official(tmp_path / "source", kind="token", middle=middle, router=router, loss_free=True)
    result = convert(tmp_path / "source", tmp_path / "mor", quiet=True)
    assert (result.config.routing, result.config.balancing) == ("token_choice", "loss_free")
    weights = load_file(tmp_path / "mor" / "model.safetensors")
    offset = 1 if middle else 0
    last = "weight" if router == "linear" else "2.weight"
    assert torch.equal(weights["model.routers.weight"][0], tensors[f"model.layers.{offset}.mor_router.router.{last}"])
    assert torch.equal(weights["model.balancing_bias"][0], tensors[f"model.layers.{offset}.router_bias"])
    if middle:
        assert torch.equal(weights["model.layers.3.mlp.up_proj.weight"], tensors["model.layers.2.mlp.up_proj.weight"])
    check_loads(tmp_path / "mor")


def check_loads(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.isfinite(model.eval()(some_ids()).logits).all()


def test_what_an_official_source_does_not_use_is_not_recorded(tmp_path):
    official(tmp_path / "source")
    result = convert(tmp_path / "source", tmp_path / "mor", quiet=True)
    assert not {"init", "router_init", "drop_layers", "seed"} & result.plan.recipe.keys()
    assert "init" not in (tmp_path / "mor" / "varidepth_recipe.yaml").read_text()
    assert "init" not in result.plan.table().splitlines()[0]
    convert(tmp_path / "source", tmp_path / "again", tmp_path / "mor" / "varidepth_recipe.yaml", quiet=True)


def test_copies_that_safetensors_dropped_are_not_needed(tmp_path):
    tensors = official(tmp_path / "source")
    kept = {
        name: value for name, value in tensors.items() if ".block." not in name or name.startswith("model.layers.1.")
    }
    convert(tmp_path / "source", tmp_path / "a", quiet=True)
    save_file(kept, tmp_path / "source" / "model.safetensors")
    convert(tmp_path / "source", tmp_path / "b", quiet=True)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "change, fields, words",
    [
        ({"model.layers.2.block.1.self_attn.q_proj.weight": 1.0}, {}, "untied-attention"),
        ({"model.layers.1.mor_router.router.lora_A": 1.0}, {}, "no known official"),
        ({"model.layers.9.mlp.up_proj.weight": 1.0}, {}, "3 plain layers"),
        ({"model.layers.1.block.0.self_attn.q_proj.weight": None}, {}, "first copy"),
        ({"model.layers.3.mor_router.router.weight": None}, {}, "model.routers.weight"),
        ({"model.embed_tokens.weight": None}, {}, "lacks model.embed_tokens.weight"),
        ({"model.norm.weight": None}, {}, "lacks model.norm.weight"),
        ({}, {"to": "mod"}, "`to`"),
        ({}, {"init": "stepwise"}, "`init`"),
        ({}, {"router_init": "on"}, "`router_init`"),
        ({}, {"drop_layers": True}, "`drop_layers`"),
        ({}, {"seed": 0}, "`seed`"),
        ({}, {"num_recursions": 2}, "`num_recursions`"),
        ({}, {"routing": "token_choice"}, "`routing`"),
    ],
)
def test_refusals(change, fields, words, tmp_path):
    tensors = official(tmp_path / "source")
    for name, value in change.items():
        if value is None:
            tensors.pop(name)
        else:
            tensors[name] = torch.full_like(tensors.get(name, torch.ones(2, 2)), value)
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(ConversionError, match=words) as caught:
        convert(tmp_path / "source", tmp_path / "mor", quiet=True, **fields)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
