"""PEFT on the three architectures: defaults, shared layers, routers, merging, remote code."""

import copy
import os
import subprocess
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_remote_code import BLOCKED
from tiny_families import MOD_BACKBONES, VOCABULARY, switch_on, tiny_mod, tiny_mor, vanilla_of
from tiny_jrt import tiny_jrt
from transformers import AutoModelForCausalLM

from varidepth.configuration.backbone_config import BACKBONES, MOE_BACKBONES


MODELS = {
    "mor": tiny_mor,
    "mor-relaxed": lambda: tiny_mor(recursion_rank=4, recursion_norms=True),
    "mod": tiny_mod,
    "jrt": tiny_jrt,
}
METHODS = {
    "lora": LoraConfig(r=2),
    "dora": LoraConfig(r=2, use_dora=True),
    "ia3": peft.IA3Config(),
    "norms": peft.LNTuningConfig(),
    "adalora": peft.AdaLoraConfig(r=2, total_step=10),
    "loha": peft.LoHaConfig(r=2),
    "lokr": peft.LoKrConfig(r=2),
    "oft": peft.OFTConfig(oft_block_size=4),
    "vera": peft.VeraConfig(r=2),
    "hra": peft.HRAConfig(r=2),
}

FREQUENT = ("lora", "dora", "ia3", "norms")


def some_ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def step(model, ids: torch.Tensor, rate: float = 0.5) -> None:
    """One large step of everything that trains."""
    model.train()
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                parameter.sub_(rate * parameter.grad)
                parameter.grad = None
    model.eval()


def differs(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


# the most used ones on all models, the others where two things could go wrong
MATRIX = [(kind, method) for kind in MODELS for method in METHODS if kind == "mor-relaxed" or method in FREQUENT]


@pytest.mark.parametrize(("kind", "method"), MATRIX)
def test_defaults_train_merge_and_come_back(kind, method, tmp_path):
    base, ids = MODELS[kind](), some_ids()
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(METHODS[method]))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    for _ in range(2):  # what starts with a zero factor moves its other factor in the second step
        step(model, ids)
    with torch.no_grad():
        trained = model(ids).logits
        assert differs(trained, base(ids).logits) > 1e-5
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(again(ids).logits, trained, rtol=1e-4, atol=1e-5)
        merged = again.merge_and_unload()
        assert type(merged) is type(base) and merged.state_dict().keys() == before.keys()
        torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", MOD_BACKBONES)
def test_defaults_find_attention_and_mlp_of_every_family(backbone):
    tiny = tiny_mor if backbone in BACKBONES else tiny_mod
    for method in ("lora", "ia3"):
        model = get_peft_model(tiny(backbone), copy.deepcopy(METHODS[method]))
        found = {tuple(name.split(".")[2:4]) for name in model.targeted_module_names}
        layers = [str(i) for i in range(len(model.base_model.model.model.layers))]
        assert {layer for layer, part in found if part == "self_attn"} == set(layers)
        if method == "ia3" and backbone not in MOE_BACKBONES:
            assert {layer for layer, part in found if part == "mlp"} == set(layers)
            blocks = [model.get_submodule(f"base_model.model.{name}") for name in model.targeted_module_names]
            assert any(block.is_feedforward for block in blocks)


CHECK = """
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mor", num_hidden_layers=4, hidden_size=16, vocab_size=9,
    intermediate_size=16, num_attention_heads=2, num_key_value_heads=2))
assert peft.get_peft_model(model, peft.LoraConfig()).get_nb_trainable_parameters()[0]
assert not any("varidepth" in type(finder).__module__ for finder in sys.meta_path)
"""


@pytest.mark.parametrize(
    "imports", ["import varidepth\nassert 'peft' not in sys.modules\nimport peft", "import peft\nimport varidepth"]
)
def test_defaults_are_there_in_any_order_of_imports(imports):
    done = subprocess.run([sys.executable, "-c", f"import sys\n{imports}\n{CHECK}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_default_of_the_user_stays(monkeypatch):
    from varidepth.training.peft_defaults import register_peft_defaults

    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.setitem(table, "mor", ["o_proj"])
    register_peft_defaults()
    assert get_peft_model(tiny_mor(), LoraConfig()).peft_config["default"].target_modules == {"o_proj"}


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_gradient_of_a_shared_adapter_is_the_sum_over_its_recursions(use_dora):
    ids = some_ids()
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=use_dora, init_lora_weights=False)
    base = tiny_mor(gating="interpolate", router_bias=True, capacities=[1.0, 1.0, 1.0])
    switch_on(base)
    unrolled = get_peft_model(vanilla_of(base), copy.deepcopy(lora))
    model = get_peft_model(base, lora)
    physical = base.config.physical_layers
    shared = dict(model.named_parameters())

    def of_shared(name: str) -> str:
        before, behind = name.split("model.layers.")
        layer, rest = behind.split(".", 1)
        return f"{before}model.layers.{physical[int(layer)]}.{rest}"

    own = {name: parameter for name, parameter in unrolled.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(shared[of_shared(name)])
    for each in (model, unrolled):
        each(ids, labels=ids).loss.backward()
    sums = {}
    for name, parameter in own.items():
        sums[of_shared(name)] = sums.get(of_shared(name), 0) + parameter.grad
    assert sums.keys() == {name for name in shared if "lora_" in name}
    for name, expected in sums.items():
        torch.testing.assert_close(shared[name].grad, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_several_adapters_merge_unmerge_and_switch(tmp_path):
    ids, base = some_ids(), tiny_mor()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, init_lora_weights=False), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["o_proj", "up_proj"], init_lora_weights=False))
    model.eval()
    outputs = {}
    with torch.no_grad():
        for name in ("first", "second"):
            model.set_adapter(name)
            outputs[name] = model(ids).logits
            model.merge_adapter()
            torch.testing.assert_close(model(ids).logits, outputs[name], rtol=1e-4, atol=1e-5)
            tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
            model.unmerge_adapter()
            torch.testing.assert_close(model(ids).logits, outputs[name], rtol=1e-4, atol=1e-5)
            assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), tokens)
        assert differs(outputs["first"], outputs["second"]) > 1e-3
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "second", adapter_name="second").eval()
        torch.testing.assert_close(again(ids).logits, outputs["second"])
        again.load_adapter(tmp_path / "first", "first")
        again.set_adapter("first")
        torch.testing.assert_close(again(ids).logits, outputs["first"])


ROUTED = {
    "mor": lambda: tiny_mor(inference_rule="predictor", router_type="mlp"),
    "mor-tokens": lambda: tiny_mor(routing="token_choice"),
    "mod": lambda: tiny_mod(inference_rule="predictor", predictor_hidden_size=8, routing_unit="attention"),
}


@pytest.mark.parametrize("kind", ROUTED)
def test_routers_train_beside_adapters_in_fp32(kind, tmp_path):
    ids, base = some_ids(), ROUTED[kind]()
    base.save_pretrained(tmp_path / "base")
    banks = ["routers"] + (["predictors"] if hasattr(base.model, "predictors") else [])
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = get_peft_model(half, LoraConfig(r=2, modules_to_save=banks))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, ids)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    for bank in banks:
        assert getattr(half.model, bank).weight.dtype == torch.float32
        assert any(f"{bank}.modules_to_save" in name for name in moved)
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for bank in banks:
        trained = model.get_submodule(f"base_model.model.model.{bank}").modules_to_save.default.weight
        stored = getattr(merged.model, bank).weight
        assert stored.dtype == torch.float32 and torch.equal(stored, trained)


def test_deeper_recursions_compute_no_keys_that_they_only_read():
    model = get_peft_model(
        tiny_mor(kv_mode="shared", routing="none"), LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"])
    )
    calls = {"q_proj": 0, "k_proj": 0, "v_proj": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    attention = model.base_model.model.model.layers[1].self_attn
    for name in calls:
        adapted = attention.get_submodule(name)
        adapted.lora_A["default"].register_forward_hook(count(name))
        adapted.base_layer.register_forward_hook(count(name))
    model(some_ids())
    assert calls == {"q_proj": 6, "k_proj": 2, "v_proj": 2}


@pytest.mark.parametrize("module", ["recursion_adapter", "up_proj", "input_layernorm"])
def test_saved_copies_of_what_varies_by_recursion_know_theirs(module, tmp_path):
    ids, base = some_ids(), tiny_mor(recursion_rank=4, recursion_norms=True)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, modules_to_save=[module])).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits)
    step(model, ids)  # asserts that every copy has a gradient
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        assert differs(model(ids).logits, base(ids).logits) > 1e-4
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
        torch.testing.assert_close(again.merge_and_unload()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


ELSEWHERE = """
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
base, adapter = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
try:
    get_peft_model(model, LoraConfig())
except ValueError as error:
    assert "Please specify `target_modules`" in str(error)
else:
    raise AssertionError("remote code brings no defaults")
model = PeftModel.from_pretrained(model, adapter).eval()
expected = torch.load(adapter + "/expected.pt")
with torch.no_grad():
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"])
model.merge_and_unload().save_pretrained(adapter + "/merged")
"""


def test_adapters_load_where_only_remote_code_is(tmp_path):
    ids, base = some_ids(), tiny_mor(recursion_rank=4)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, modules_to_save=["routers"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = {"ids": ids, "logits": model(ids).logits}
    torch.save(expected, tmp_path / "adapter" / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + ELSEWHERE, tmp_path / "base", str(tmp_path / "adapter")],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected["logits"], rtol=1e-4, atol=1e-4)
