"""Two gloo processes against one: DDP and FSDP2 by the configuration files of examples/, tensor parallelism.

Each test starts its processes once and runs all checks of a suite in them (`distributed_worker.py`), since starting
takes longer than they do. Bounds: the processes add the same numbers in another order, which fp32 rounds at 6e-8;
what is compared has gone through a few steps of a few layers.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_worker as worker
import pytest
import torch
import yaml
from real_text import save_source
from tiny_families import tiny_mod, tiny_mor
from transformers import AutoModelForCausalLM
from two_processes import EXAMPLES, run_two

from varidepth import JRTConfig, JRTForCausalLM, MoRConfig
from varidepth.conversion.convert import convert
from varidepth.modeling.parallel_checks import check_tensor_parallel


OF_LOSSES, OF_MOVEMENT, OF_GRADIENTS = 1e-6, 1e-4, 2e-5
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch is built without gloo, over which CPU processes talk",
)


def start(suite: str, folder: Path, only: str = "") -> None:
    """Runs a suite in two processes; raises with their output if they do not end by themselves."""
    program = [str(Path(worker.__file__)), suite, str(folder), *([only] if only else [])]
    configs = {"ddp": "ddp.yaml", "fsdp": "fsdp2.yaml", "native": None}
    run_two(folder / "log.txt", *program, config=configs[suite])


def results(suite: str, folder: Path) -> Iterator[tuple[str, list[Any]]]:
    for name in worker.SUITES[suite]:
        found = [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in (0, 1)]
        if any(isinstance(result, str) for result in found):
            pytest.fail(f"{name}: {next(result for result in found if isinstance(result, str))}")
        yield name, found


def checkpoint_for_the_script(folder: Path) -> None:
    folder.mkdir()
    convert(save_source(folder / "source"), folder / "mor-distributed", num_recursions=2, init="upper", quiet=True)


def run_suite(suite: str, folder: Path) -> None:
    checkpoint_for_the_script(folder / "script")
    start(suite, folder)
    started = {name: {n: t.clone() for n, t in build().state_dict().items()} for name, build in worker.MODELS.items()}
    for name, found in results(suite, folder):
        if "state" in found[0]:
            assert_equal(found[1]["state"], found[0]["state"], f"{name}: the ranks differ in")
        alone = worker.SUITES[suite][name](folder / f"{name}-alone") if name in ALONE else {}
        before = started.get({"distil": "mor", "accumulate": "mor"}.get(name, name), started["mor-shared"])
        CHECKS.get(name, check_training)(name, found, alone, before, folder)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, f"{what} {different}"


def check_training(name: str, found: list, alone: dict, before: dict, folder: Path) -> None:
    """Losses, the distance that every weight went, buffers of the routing, and the loss of an evaluation."""
    torch.testing.assert_close(
        found[0]["losses"], alone["losses"], rtol=OF_LOSSES, atol=0, msg=lambda text: f"{name}: {text}"
    )
    assert found[0]["eval_loss"] == pytest.approx(alone["eval_loss"], rel=OF_LOSSES), name
    assert found[0]["parts"].keys() == alone["parts"].keys()
    for part, values in alone["parts"].items():
        assert found[0]["parts"][part] == pytest.approx(values, rel=1e-5), f"{name}: {part}"
    moved = 0
    for tensor, end in alone["state"].items():
        way = (end.float() - before[tensor].float()).norm() if tensor in before else torch.zeros(())
        error = (found[0]["state"][tensor].float() - end.float()).norm()
        moved += bool(way)
        assert error <= OF_MOVEMENT * way + 1e-7 * end.float().norm(), f"{name}: {tensor} {error:.1e} of {way:.1e}"
    assert moved >= len(alone["state"]) // 2


def check_no_tokens(name: str, found: list, alone: dict, before: dict, folder: Path) -> None:
    assert [result["depth"].unique().tolist() for result in found] == [[3], [1]]
    assert torch.equal(torch.cat([result["generated"] for result in found]), alone["generated"])
    torch.testing.assert_close(torch.cat([result["logits"] for result in found]), alone["logits"])
    torch.testing.assert_close(found[0]["losses"], alone["losses"], rtol=OF_LOSSES, atol=0)
    torch.testing.assert_close(found[0]["state"], alone["state"], rtol=1e-4, atol=1e-6)


def check_resume(name: str, found: list, alone: dict, before: dict, folder: Path) -> None:
    assert_equal(found[0]["resumed"], found[0]["state"], "resumed training differs in")
    assert {"config.json", "model.safetensors", "modeling_mor.py"} <= set(found[0]["files"])
    assert not found[1]["files"], "only rank 0 writes"
    loaded = AutoModelForCausalLM.from_pretrained(folder / "resume" / "saved-by-0")
    assert type(loaded).__name__ == loaded.config.architectures[0] == "MoRForCausalLM"
    assert_equal(worker.whole_state(loaded), found[0]["state"], "the saved model differs in")


def check_mixed(name: str, found: list, alone: dict, before: dict, folder: Path) -> None:
    expected = {"router": torch.float32, "logits": torch.float32, "layer": torch.bfloat16}
    assert found[0]["seen"] == expected
    assert "model.routers.weight" in found[0]["moved"]
    assert all(tensor.dtype == torch.float32 for tensor in found[0]["state"].values())


def check_script(name: str, found: list, alone: dict, before: dict, folder: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(folder / "script" / "mor-trained").config.num_recursions == 2


def check_ragged(name: str, found: list, alone: dict, before: dict, folder: Path) -> None:
    assert [result["steps"] for result in found] == [4, 4]


def check_ranks_only(name: str, found: list, alone: dict, before: dict, folder: Path) -> None:
    """The two means of JRT-RNN's loss do not add up over rows with a prefix and rows without."""


CHECKS: dict[str, Callable] = {
    "no-tokens": check_no_tokens,
    "no-prefix": check_ranks_only,
    "resume": check_resume,
    "mixed": check_mixed,
    "script": check_script,
    "ragged": check_ragged,
}
ALONE = {*worker.MODELS, "distil", "accumulate", "checkpointed", "wrapped", "no-tokens"}


def test_ddp(tmp_path):
    run_suite("ddp", tmp_path)


def test_fsdp2(tmp_path):
    run_suite("fsdp", tmp_path)


def test_divided_by_transformers(tmp_path):
    """Tensor parallelism, and FSDP2 without accelerate."""
    for name in worker.DIVIDED:
        worker.MODELS[name]().save_pretrained(tmp_path / "checkpoints" / name)
    start("native", tmp_path)
    for check, found in results("native", tmp_path):
        kind, name = check.split("-", 1)
        alone = worker.sharded_by_transformers(name, tmp_path / "checkpoints")
        for result in found:
            torch.testing.assert_close(result["logits"], alone["logits"], rtol=1e-4, atol=1e-5)
            assert result["loss"] == pytest.approx(alone["loss"], rel=OF_LOSSES), check
            assert torch.equal(result["generated"], alone["generated"]), check
            assert name == "jrt" or torch.equal(result["routing"], alone["routing"]), check
            assert result["gradients"].keys() == alone["gradients"].keys()
            for parameter, gradient in alone["gradients"].items():
                error = (result["gradients"][parameter] - gradient).norm()
                assert error <= OF_GRADIENTS * gradient.norm() + 1e-7, f"{check}: {parameter} {error:.1e}"
            layers = [parameter for parameter in result["divided"] if "layers.1." in parameter]
            assert any("down_proj" in n for n in layers) and any("o_proj" in n for n in layers), check
        saved = tmp_path / "checkpoints" / f"{name}-saved-{kind}_size"
        loaded = dict(AutoModelForCausalLM.from_pretrained(saved).named_parameters())
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / name)
        assert_equal(loaded, dict(expected.named_parameters()), f"{check}: the saved model differs in")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MoRConfig(hidden_size=72, num_attention_heads=9, num_key_value_heads=3), "`num_attention_heads` is 9"),
        (MoRConfig(num_attention_heads=8, num_key_value_heads=1), "`num_key_value_heads` is 1"),
        (MoRConfig(num_recursions=2, recursion_rank=4), "`recursion_rank` is 4"),
        (MoRConfig(backbone="qwen3", num_recursions=2, recursion_norms=True), "each learn from a part of the heads"),
        (JRTConfig(hidden_size=96, num_attention_heads=3), "`num_attention_heads` is 3"),
    ],
)
def test_tensor_parallelism_refuses(config, message):
    """By the call that all supported versions of transformers make before they divide a model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    asked = SimpleNamespace(tp_size=2, tp_plan=None)
    with pytest.raises(ValueError, match=message):
        type(model).maybe_distribute_model(model, asked, None)
    check_tensor_parallel(config, 1)
    with pytest.raises(ValueError, match=message):
        check_tensor_parallel(config, 2)


def test_a_plan_of_the_users_own_is_checked_as_it_is():
    config = MoRConfig(hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    whole = {f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"}
    asked = SimpleNamespace(tp_size=2, tp_plan=whole)
    # without a mesh nothing is divided
    assert type(model).maybe_distribute_model(model, asked, None) is model


def test_convolutions_are_whole_in_every_process():
    model = JRTForCausalLM(JRTConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=4, vocab_size=64))
    assert not [rule for rule in model.tp_plan if "conv" in rule]


def test_layers_that_engines_wrap_are_those_of_the_family():
    for name, layer in (
        ("mor", "LlamaDecoderLayer"),
        ("mod-experts", "MixtralDecoderLayer"),
        ("jrt", "JRTDecoderLayer"),
    ):
        model = worker.MODELS[name]()
        assert set(model._no_split_modules) == {layer}
        assert any(type(module).__name__ == layer for module in model.modules())


def test_example_files_are_complete():
    """The files that cannot run here name what they need; DeepSpeed's come with a configuration of accelerate."""
    for stage in (2, 3):
        settings = json.loads((EXAMPLES / f"zero{stage}.json").read_text())
        assert settings["zero_optimization"]["stage"] == stage
        launch = yaml.safe_load((EXAMPLES / f"deepspeed_zero{stage}.yaml").read_text())
        assert (Path(__file__).parents[1] / launch["deepspeed_config"]["deepspeed_config_file"]).is_file()


CLOSED = {
    "mor": lambda **f: tiny_mor(capacities=[1.0, 0.5, 0.5], router_thresholds=[0.0, 1.0, 1.0], **f),
    "mor-shared": lambda **f: tiny_mor(
        capacities=[1.0, 0.5, 0.5], router_thresholds=[0.0, 1.0, 1.0], kv_mode="shared", **f
    ),
    "mod": lambda **f: tiny_mod(capacity=0.5, router_thresholds=[1.0, 1.0], **f),
    "mod-attention": lambda **f: tiny_mod(capacity=0.5, router_thresholds=[1.0, 1.0], routing_unit="attention", **f),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", CLOSED)
def test_a_token_that_stands_in_changes_nothing(kind, attention, monkeypatch):
    """Nobody enters a routed layer; with other ranks to wait for, it runs nevertheless."""
    model = CLOSED[kind](attention=attention)
    batch = worker.pad_rows(worker.rows(3))
    mask = batch["attention_mask"].flip(1)
    inputs = {"input_ids": batch["input_ids"].flip(1) * mask, "attention_mask": mask}
    calls = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))

    def run() -> tuple[torch.Tensor, torch.Tensor, int]:
        calls.clear()
        with torch.no_grad():
            logits = model(**inputs).logits
            found = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        return logits, found.sequences, len(calls)

    logits, sequences, before = run()
    monkeypatch.setattr("varidepth.modeling.routed_model.ranks_keep_step", lambda layers, training: True)
    again, same, after = run()
    assert torch.equal(again, logits) and torch.equal(same, sequences)
    assert kind == "mod-attention" or after > before


def test_a_token_that_stands_in_has_gradients_of_zero(monkeypatch):
    model = tiny_mor(**worker.TOKEN, recursion_rank=2)
    with torch.no_grad():
        model.model.routers.weight.zero_()  # all choose depth 1
    batch = worker.pad_rows(worker.rows(2))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    monkeypatch.setattr("varidepth.modeling.routed_model.ranks_keep_step", lambda layers, training: True)
    found = gradients()
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in found.items():
        assert torch.equal(gradient, expected.get(name, torch.zeros_like(gradient))), name
