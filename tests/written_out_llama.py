"""The Llama layer from its formulas, token by token and head by head: nothing of torch's or transformers' modules."""

import math
from typing import Any

import torch


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """`x` of shape (tokens, heads, dim), at the tokens' original positions."""
    half = x.shape[-1] // 2
    angles = positions[:, None].to(x.dtype) * theta ** (-torch.arange(half).to(x.dtype) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention_update(layer: Any, x: torch.Tensor, positions: torch.Tensor, config: Any) -> torch.Tensor:
    """What attention adds to the tokens `x` of shape (tokens, hidden), causal among themselves."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    attention = layer.self_attn
    h = norm(x, layer.input_layernorm.weight, config.rms_norm_eps)
    q = rotate((h @ attention.q_proj.weight.T).view(-1, heads, dim), positions, theta)
    k = rotate((h @ attention.k_proj.weight.T).view(-1, kv_heads, dim), positions, theta)
    v = (h @ attention.v_proj.weight.T).view(-1, kv_heads, dim)
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    out = []
    for t in range(x.shape[0]):
        scores = [k[: t + 1, head] @ q[t, head] / math.sqrt(dim) for head in range(heads)]
        out.append(torch.cat([scores[head].softmax(0) @ v[: t + 1, head] for head in range(heads)]))
    return torch.stack(out) @ attention.o_proj.weight.T


def mlp_update(layer: Any, x: torch.Tensor, config: Any) -> torch.Tensor:
    h = norm(x, layer.post_attention_layernorm.weight, config.rms_norm_eps)
    gate = h @ layer.mlp.gate_proj.weight.T
    return (gate * gate.sigmoid() * (h @ layer.mlp.up_proj.weight.T)) @ layer.mlp.down_proj.weight.T


def llama_layer(layer: Any, x: torch.Tensor, positions: torch.Tensor, config: Any) -> torch.Tensor:
    x = x + attention_update(layer, x, positions, config)
    return x + mlp_update(layer, x, config)


def logits_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    return norm(x, model.model.norm.weight, model.config.rms_norm_eps) @ model.lm_head.weight.T
