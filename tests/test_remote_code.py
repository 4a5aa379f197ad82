"""Checkpoints carry their own code: they load, save and load again where varidepth cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_families import VOCABULARY, tiny_mod, tiny_mor
from tiny_jrt import tiny_jrt
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from varidepth import JRTForCausalLM, MoDForCausalLM, MoRForCausalLM
from varidepth.modeling.remote_code import _flatten, export_remote_code


AUTO_CLASSES = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, *args, **kwargs):
        if name.split(".")[0] == "varidepth":
            raise ImportError("varidepth is blocked")
sys.meta_path.insert(0, Blocked())
"""
RELOAD = """
import torch
from pathlib import Path
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
folder, again = Path(sys.argv[1]), Path(sys.argv[2])
expected = torch.load(folder / "expected.pt")
for source, target in ((folder, again), (again, again / "third")):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
    assert torch.equal(model.generate(expected["ids"], max_new_tokens=4, do_sample=False), expected["tokens"])
    model.save_pretrained(target)
AutoModel.from_pretrained(again, trust_remote_code=True)
AutoModelForSequenceClassification.from_pretrained(again, trust_remote_code=True)
"""


def assert_complete(folder: Path) -> None:
    """Every reference of the auto_map has its file, and every relative import of a file lies beside it."""
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == AUTO_CLASSES
    for reference in auto_map.values():
        assert (folder / f"{reference.split('.')[0]}.py").is_file()
    for file in folder.glob("*.py"):
        for line in file.read_text().splitlines():
            if line.strip().startswith("from ."):
                assert (folder / f"{line.split()[1][1:]}.py").is_file(), line


MODELS = {
    "mor": lambda: tiny_mor(),
    "mor-shared": lambda: tiny_mor(
        kv_mode="shared", inference_rule="predictor", recursion_rank=8, recursion_norms=True
    ),
    "mod": lambda: tiny_mod("olmo2", routing_unit="attention", inference_rule="ema_threshold"),
    "mod-experts": lambda: tiny_mod("qwen3_moe", num_noop_experts=1, inference_rule="predictor"),
    "jrt": lambda: tiny_jrt(),
    "jrt-left_pad": lambda: tiny_jrt(short_prompt="left_pad", short_prompt_token_id=3, prefix_length=12),
}


@pytest.mark.parametrize("case", MODELS)
def test_round_trips_without_the_plugin(tmp_path, case):
    model = MODELS[case]()
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    folder, again = tmp_path / "saved", tmp_path / "again"
    model.save_pretrained(folder)
    assert_complete(folder)
    # read from the same file: products round differently where weights lie at other addresses modulo 16
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = {
            "ids": ids,
            "logits": model(ids).logits,
            "tokens": model.generate(ids, max_new_tokens=4, do_sample=False),
        }
    torch.save(expected, folder / "expected.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + RELOAD, folder, again], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_complete(again)
    assert_complete(again / "third")
    with_plugin = AutoModelForCausalLM.from_pretrained(again)
    assert type(with_plugin) is type(model)
    with_plugin.save_pretrained(tmp_path / "plugin")
    assert_complete(tmp_path / "plugin")


@pytest.mark.parametrize(("tiny", "kind"), [(tiny_mor, "mor"), (tiny_mod, "mod"), (tiny_jrt, "jrt")])
def test_every_auto_class_loads_with_the_plugin(tmp_path, tiny, kind):
    model = tiny()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        assert type(auto.from_pretrained(tmp_path)).__module__ == f"varidepth.modeling.modeling_{kind}"


FULL_OF_WEIGHTS = {
    "mor": lambda: tiny_mor(inference_rule="predictor", router_type="mlp", router_bias=True, recursion_rank=3),
    "mod": lambda: tiny_mod(inference_rule="predictor", router_bias=True),
    "mod-ema": lambda: tiny_mod(inference_rule="ema_threshold", capacity_warmup_steps=3),
}


@pytest.mark.parametrize("case", FULL_OF_WEIGHTS)
def test_all_weights_survive_also_in_bfloat16(tmp_path, case):
    model = FULL_OF_WEIGHTS[case]()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert half.model.routers.weight.dtype == torch.float32
    if hasattr(half.model, "threshold_ema"):
        assert half.model.threshold_ema.dtype == torch.float32
        assert torch.equal(half.model.threshold_ema, model.model.threshold_ema)
    half.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


def test_a_config_saved_alone_has_no_dangling_auto_map(tmp_path):
    tiny_mor().save_pretrained(tmp_path / "model")
    AutoConfig.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "config")
    assert not json.loads((tmp_path / "config" / "config.json").read_text()).get("auto_map")


@pytest.mark.parametrize("model_class", [MoRForCausalLM, MoDForCausalLM, JRTForCausalLM])
def test_exported_code_needs_nothing_but_torch_and_transformers(tmp_path, model_class):
    export_remote_code(tmp_path, model_class.remote_classes)
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers", "huggingface_hub"}
    for file in tmp_path.glob("*.py"):
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and not words[1].startswith("."):
                assert words[1].split(".")[0] in allowed, (file.name, line)


def test_imports_from_a_package_are_refused():
    with pytest.raises(ValueError, match="imports from the package varidepth, but remote code is flat"):
        _flatten("varidepth.modeling.modeling_mor", "from .. import MoRConfig\n")


def test_a_file_as_save_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file; give a folder"):
        tiny_mor().save_pretrained(tmp_path / "file")
