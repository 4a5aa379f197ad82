"""8- and 4-bit weights: only linear layers are rounded, generation keeps its laws, adapters train on them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny_families import VOCABULARY, run_with_margin, tiny_mod, tiny_mor
from tiny_jrt import tiny_jrt
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig


reason = "an optional library, named in the extra `quantized`"
torchao = pytest.importorskip("torchao.quantization", reason=reason)
bitsandbytes = pytest.importorskip("bitsandbytes", reason=reason)


def torchao_int8() -> TorchAoConfig:
    return TorchAoConfig(torchao.Int8WeightOnlyConfig())


def torchao_int4() -> TorchAoConfig:
    """In groups of 8, since the tiny MLPs are 40 wide."""
    return TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(8)))


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


# largest relative error (Frobenius) of a weight, and change of the loss in nats
BOUNDS: dict[Callable[[], Any], tuple[float, float]] = {
    torchao_int8: (0.01, 0.02),
    torchao_int4: (0.15, 0.4),
    nf4: (0.12, 0.4),
}
MODELS = {
    "mor": lambda: tiny_mor(inference_rule="predictor", router_type="mlp"),
    "mor-relaxed-shared": lambda: tiny_mor("qwen2", kv_mode="shared", recursion_rank=4, recursion_norms=True),
    "mod": lambda: tiny_mod(routing_unit="attention", inference_rule="predictor"),
    "jrt": tiny_jrt,
}
CASES = [(kind, method) for kind in MODELS for method in BOUNDS if kind == "mor-relaxed-shared" or method is nf4]


def some_ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def load(folder, method, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=method(), **kwargs).eval()


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    if hasattr(weight, "quant_state"):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize()


def values(model) -> dict[str, torch.Tensor]:
    """What does not train."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return {name: p if type(p) is torch.Tensor else dequantized(p) for name, p in frozen.items()}


@pytest.mark.parametrize(("kind", "method"), CASES)
@torch.no_grad()
def test_only_linear_layers_are_rounded(kind, method, tmp_path):
    MODELS[kind]().save_pretrained(tmp_path)
    exact, model = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), load(tmp_path, method)
    worst_weight, worst_loss = BOUNDS[method]
    before, found, parts = dict(exact.named_parameters()), dict(model.named_parameters()), dict(exact.named_modules())
    assert before.keys() == found.keys()
    rounded = 0
    for name, parameter in before.items():
        part, _, kind_of = name.rpartition(".")
        if isinstance(parts[part], torch.nn.Linear) and kind_of == "weight" and part != "lm_head":
            assert type(found[name].data) is not torch.Tensor or found[name].dtype == torch.uint8, name
            error = dequantized(found[name]) - parameter
            assert 0 < error.norm() < worst_weight * parameter.norm(), name
            parameter.copy_(dequantized(found[name]))
            rounded += 1
        else:
            assert found[name].dtype == torch.float32 and torch.equal(found[name], parameter), name
    assert rounded
    ids = some_ids()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids, labels=ids).loss
    expected, margin = run_with_margin(exact, ids, labels=ids) if kind != "jrt" else (exact(ids, labels=ids), 1)
    output = model(ids, labels=ids)
    assert margin > 1e-4  # else a rounded product may route a token otherwise
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-3, atol=1e-4)
    assert abs(output.loss - plain) < worst_loss


@pytest.mark.parametrize(("kind", "method"), CASES)
@torch.no_grad()
def test_generation_saving_and_loading(kind, method, tmp_path):
    MODELS[kind]().save_pretrained(tmp_path / "source")
    model, ids = load(tmp_path / "source", method), some_ids()
    prefix = {"prefix_length": torch.tensor([9, 9])} if kind == "jrt" else {}
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False, **prefix)
    for column in range(9, 13):
        step = model(tokens[:, :column], use_cache=False, **prefix).logits[:, -1].argmax(-1)
        assert torch.equal(step, tokens[:, column])
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("quantized", "source")
    ]
    assert sizes[0] < 0.9 * sizes[1]  # embeddings, and in these tiny models the routers, are a large part


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_adapters_and_routers_train_on_quantized_weights(kind, method, tmp_path):
    MODELS[kind]().save_pretrained(tmp_path / "source")
    base, ids = load(tmp_path / "source", method), some_ids()
    trained = [
        name
        for name in ("routers", "predictors", "recursion_adapter")
        if any(n.endswith(name) for n, _ in base.named_modules())
    ]
    prepared = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(prepared, LoraConfig(r=4, modules_to_save=trained or None))
    frozen = {name: value.clone() for name, value in values(model).items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(6):
        model.eval()  # the causal rule, so that losses compare
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
        model.train()
        model(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    for name, value in values(model).items():
        assert name not in frozen or torch.equal(value, frozen[name]), name
    for part in ("routers", "predictors"):
        if part in trained:
            saved = model.get_submodule(f"base_model.model.model.{part}").modules_to_save.default
            assert saved.weight.dtype == torch.float32
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "source", method), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
