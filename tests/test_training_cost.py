"""FLOPs of training against counted products of forward and backward passes, memory against measured peaks."""

import gc
import weakref

import pytest
import torch
from matrix_products import MatrixProducts
from transformers import LlamaConfig, LlamaForCausalLM

from varidepth import JRTConfig, JRTForCausalLM, MoDConfig, MoDForCausalLM, MoRConfig, MoRForCausalLM
from varidepth.analysis.training_cost import row_flops, run_flops, training_memory
from varidepth.modeling import prefix_linear_attention


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
LLAMA = SIZES | {"num_key_value_heads": 2, "num_hidden_layers": 6}
JRT = SIZES | {"num_hidden_layers": 6, "prefix_length": 20, "mask_token_id": 95, "feature_dim": 4, "sliding_window": 9}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "mor": (MoRForCausalLM, MoRConfig, LLAMA | {"num_recursions": 2, "capacities": [1.0, 0.5]}),
    "mod": (MoDForCausalLM, MoDConfig, LLAMA | {"capacity": 0.25}),
    "jrt": (JRTForCausalLM, JRTConfig, JRT),
}


def make(name: str, attention: str = "eager", **changes):
    architecture, config, fields = MODELS[name]
    torch.manual_seed(0)
    return architecture._from_config(config(**fields | changes), attn_implementation=attention).train()


def batch(model, rows: int, seq_len: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, model.config.vocab_size - 1, (rows, seq_len))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_flops_of_a_step(name, checkpointing):
    model = make(name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with MatrixProducts() as counted:
        model(**batch(model, 2, 40)).loss.backward()
    expected = 2 * row_flops(model.config, 40, gradient_checkpointing=checkpointing)
    # gradients of convolutions are one operation that is not counted, and first states have none
    assert counted.flops == pytest.approx(expected, rel=0.04 if name == "jrt" else 0.002)


def test_long_rows_of_jrt_compute_attention_again(monkeypatch):
    monkeypatch.setattr(prefix_linear_attention, "BLOCK_TOKENS", 64)
    model = make("jrt")
    with MatrixProducts() as counted:
        model(**batch(model, 1, 200)).loss.backward()
    assert counted.flops == pytest.approx(row_flops(model.config, 200), rel=0.04)


def test_warmup_is_counted_step_by_step():
    config = make("mor", capacity_warmup_steps=10).config
    warmed = [
        row_flops(config, 64, warmth=0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 10)).item()))
        for step in range(10)
    ]
    whole = sum(warmed) + 30 * row_flops(config, 64)
    assert run_flops(config, 64, 40, 40) == pytest.approx(whole, rel=0.01)
    assert run_flops(config, 64, 4, 4) == pytest.approx(sum(warmed[:4]), rel=0.02)
    config.capacity_warmup_steps = 0
    assert run_flops(config, 64, 40, 40) == 40 * row_flops(config, 64) < whole


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Highest number of bytes in tensors that were made within it, those of `known` apart."""

    def __init__(self, known):
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return
        self.live[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key) -> None:
        self.now -= self.live.pop(key, 0)


def measured(model, rows: int, seq_len: int, precision: str) -> int:
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    data = batch(model, rows, seq_len)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(**data).loss.backward()
    optimizer.step()
    gc.collect()
    # gradients stay, as in the second of two accumulated batches
    state = [value for values in optimizer.state.values() for value in values.values() if value.ndim]
    kept = [*model.parameters(), *(p.grad for p in model.parameters()), *state]
    with LiveBytes(kept) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**data).loss
        loss.backward()
    return live.peak + sum(tensor.numel() * tensor.element_size() for tensor in kept)


MIDDLE = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "vocab_size": 2000}


@pytest.mark.parametrize("size", ["tiny", "middle"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_memory_of_a_step(name, precision, size):
    changes = {} if size == "tiny" else dict(MIDDLE)
    if size == "middle" and name == "jrt":
        changes |= {"feature_dim": 16, "mask_token_id": 1999}
    model = make(name, "sdpa", **changes)
    expected = training_memory(model.config, 2, 128, precision=precision).total
    assert 0.8 < measured(model, 2, 128, precision) / expected < 1.15


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_with_gradient_checkpointing(precision):
    model = make("mor", "sdpa", **MIDDLE | {"vocab_size": 96, "num_hidden_layers": 12})
    free = training_memory(model.config, 2, 256, precision=precision)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = training_memory(model.config, 2, 256, precision=precision, gradient_checkpointing=True)
    assert kept.activations < 0.35 * free.activations
    assert 0.8 < measured(model, 2, 256, precision) / kept.total < 1.15


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_of_long_rows_of_jrt(precision, monkeypatch):
    monkeypatch.setattr(prefix_linear_attention, "BLOCK_TOKENS", 64)
    model = make("jrt", "sdpa", **MIDDLE | {"feature_dim": 16, "mask_token_id": 1999})
    expected = training_memory(model.config, 2, 512, precision=precision).total
    assert 0.8 < measured(model, 2, 512, precision) / expected < 1.15
