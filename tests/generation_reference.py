"""Tiny models in every routing and KV mode, and a slow generation loop that shares nothing with `generate`.

The loop runs one unpadded row at a time and recomputes the whole sequence for every token, without a cache. It is what
the generation cases compare with.
"""

import functools
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from varidepth import JRTConfig, MoDConfig, MoRConfig


VOCABULARY = 61
PROMPT_LENGTHS = (9, 4, 7)

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# 6 unrolled layers: prelude, two recursions of two shared layers, coda.
DEEP = {"num_hidden_layers": 6, "num_recursions": 2, "sharing": "middle_cycle"}
BLENDED = {"gating": "interpolate"}
EXPERT = {"routing": "expert_choice", "capacities": [0.8, 0.5], "router_alpha": 1.0}

CASES: dict[str, dict[str, Any]] = {
    "none": DEEP | {"routing": "none"},
    "none-shared": DEEP | {"routing": "none", "kv_mode": "shared"},
    "expert": DEEP | EXPERT,
    "expert-predictor": DEEP | EXPERT | {"inference_rule": "predictor"},
    "expert-shared": DEEP | EXPERT | {"kv_mode": "shared", "capacities": [1.0, 0.5]},
    "expert-cycle": EXPERT | BLENDED | {"num_hidden_layers": 4, "num_recursions": 2, "sharing": "cycle"},
    "expert-sequence": EXPERT | {"num_hidden_layers": 6, "num_recursions": 2, "sharing": "middle_sequence"},
    "expert-relaxed": DEEP | EXPERT | {"recursion_rank": 4, "recursion_norms": True},
    "token": DEEP | {"routing": "token_choice"},
    "token-shared": DEEP | {"routing": "token_choice", "kv_mode": "shared"},
    "token-loss_free": DEEP | {"routing": "token_choice", "balancing": "loss_free"} | BLENDED,
    "gemma2-expert": DEEP | EXPERT | {"backbone": "gemma2", "sliding_window": 5, "head_dim": 8},
    "gemma2-token": DEEP | {"routing": "token_choice", "backbone": "gemma2", "sliding_window": 5, "head_dim": 8},
    "qwen3-expert": DEEP
    | EXPERT
    | {
        "backbone": "qwen3",
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"] * 2,
    },
}
# 4 layers, of which the last one or more are routed.
MOD_CASES: dict[str, dict[str, Any]] = {
    "mod": {"gate": "sigmoid"},
    "mod-attention": {"routing_unit": "attention", "inference_rule": "predictor"},
    "mod-mlp": {"routing_unit": "mlp", "gate": "one_plus_tanh"},
    "mod-everywhere": {
        "routed_layers": [0, 1, 2, 3],
        "gate": "sigmoid",
        "inference_rule": "ema_threshold",
        "always_route_first": 1,
    },
    "gemma2-mod": {"backbone": "gemma2", "sliding_window": 5, "head_dim": 8, "routing_unit": "attention"},
    "mod-noop": {
        "backbone": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_noop_experts": 2,
    },
}
for _fields in MOD_CASES.values():
    _fields.update({"num_hidden_layers": 4, "capacity": 0.5})
CASES |= MOD_CASES
# The prefix ends within, at and behind the prompts; layouts with and without what counts columns for transformers.
_LINEAR_FIRST = ["linear_attention", "conv", "linear_attention", "sliding_attention"]
JRT_CASES: dict[str, dict[str, Any]] = {
    "jrt": {"prefix_length": 7, "num_hidden_layers": 5},
    "jrt-long_prefix": {"prefix_length": 20, "layer_types": _LINEAR_FIRST, "feature_map": "softmax"},
    "jrt-recurrent": {"prefix_length": 5, "layer_types": ["linear_attention", "conv"] * 2},
    "jrt-causal": {"prefix_length": 0, "num_hidden_layers": 5},
    "jrt-iterate": {"prefix_length": 12, "num_hidden_layers": 5, "short_prompt": "iterate"},
}
for _fields in JRT_CASES.values():
    _fields.setdefault("num_hidden_layers", 4)
    _fields.update({"feature_dim": 4, "sliding_window": 5, "mask_token_id": 1})

# As small as routing and a cache allow, for what takes seconds per layer.
SMALLEST: dict[str, dict[str, Any]] = {
    "smallest": EXPERT | {"num_hidden_layers": 2, "num_recursions": 2, "sharing": "cycle"},
    "smallest-mod": {"num_hidden_layers": 2, "capacity": 0.5, "gate": "sigmoid"},
}


def config_of(case: str, **fields: Any) -> MoRConfig | MoDConfig | JRTConfig:
    if case in JRT_CASES:
        return JRTConfig(**SIZES | JRT_CASES[case] | fields)
    config_class = MoDConfig if "mod" in case else MoRConfig
    return config_class(**SIZES | (CASES | SMALLEST)[case] | fields)


def attention_of(case: str) -> str:
    """Gemma 2 caps its attention scores, which sdpa cannot."""
    return "eager" if case.startswith("gemma2") else "sdpa"


@functools.cache
def build(case: str, attention: str | None = None) -> Any:
    """The case's model in eval mode, with routers strong enough to spread the tokens over the depths."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_of(case), attn_implementation=attention or attention_of(case)
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for bank in (getattr(model.model, "routers", None), getattr(model.model, "predictors", None)):
            if bank is not None:
                bank.weight.copy_(torch.randn(bank.weight.shape, generator=generator))
        for name, parameter in model.named_parameters():
            if "recursion_adapter" in name or "deeper" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if hasattr(model.model, "threshold_ema"):
            model.model.threshold_ema.zero_()
        bias = getattr(model.model, "balancing_bias", None)
        if bias is not None:
            bias.copy_(torch.tensor([[0.1, -0.1]]))
    return model


@functools.cache
def vanilla() -> LlamaForCausalLM:
    """A vanilla model over the same vocabulary: the other side of assisted decoding."""
    set_seed(2)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES)).eval()


def prompts() -> list[torch.Tensor]:
    """Rows of different lengths, each of shape `(1, length)`."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (1, length), generator=generator) for length in PROMPT_LENGTHS]


def padded(rows: list[torch.Tensor], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """`(batch, longest)` ids and mask of the rows, padded with 0 on one side."""
    longest = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        where = slice(longest - row.shape[1], None) if side == "left" else slice(row.shape[1])
        ids[place, where], mask[place, where] = row[0], 1
    return ids, mask


def prefix_of(model: Any, prompt_length: int) -> dict[str, int]:
    """The argument that keeps the prefix of a JRT-RNN that of the prompt; none for other models."""
    config = model.config
    if config.model_type != "jrt" or config.short_prompt == "iterate":
        return {}
    return {"prefix_length": min(config.prefix_length, prompt_length)}


@torch.no_grad()
def full_logits(model: Any, ids: torch.Tensor, prompt_length: int | None = None) -> torch.Tensor:
    """fp32 logits of shape `(1, length, vocabulary)` of one row, without a cache; the whole row is the prompt if not
    told otherwise."""
    prefix = prefix_of(model, ids.shape[1] if prompt_length is None else prompt_length)
    return model(input_ids=ids, use_cache=False, **prefix).logits.float()


def slow_greedy(
    model: Any, ids: torch.Tensor, steps: int, prompt_length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuation of one row: the whole row `(1, length + steps)` and the logits `(steps, vocabulary)`."""
    seen = []
    prompt_length = ids.shape[1] if prompt_length is None else prompt_length
    for _ in range(steps):
        seen.append(full_logits(model, ids, prompt_length)[0, -1])
        ids = torch.cat([ids, seen[-1].argmax()[None, None]], dim=1)
    return ids, torch.stack(seen)


def slow_sample(model: Any, ids: torch.Tensor, steps: int, temperature: float) -> torch.Tensor:
    """Sampled continuation of one row; draws from torch's global generator, one draw per token."""
    prompt_length = ids.shape[1]
    for _ in range(steps):
        probabilities = (full_logits(model, ids, prompt_length)[:, -1] / temperature).softmax(dim=-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
    return ids


def slow_score(model: Any, ids: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """Mean log-probability of the tokens after the prompt, the score of a beam with length penalty 1."""
    log_probabilities = full_logits(model, ids, prompt_length)[0, prompt_length - 1 : -1].log_softmax(dim=-1)
    return log_probabilities.gather(1, ids[0, prompt_length:, None]).sum() / (ids.shape[1] - prompt_length)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest reference value."""
    assert value.shape == reference.shape, f"shapes {tuple(value.shape)} and {tuple(reference.shape)} differ"
    return ((value.float() - reference).abs().max() / reference.abs().max()).item()
