"""JRT-RNN as the official code computes it, from the formulas: nothing of this package, nor of torch's modules.

Everything works on one row, on tensors under their official names, in the type of these tensors; fp64 is exact enough
to compare with. `official_tensors` brings a model of this package under those names.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch


Tensors = Mapping[str, torch.Tensor]


def official_logits(
    tensors: Tensors,
    ids: torch.Tensor,
    heads: int,
    prefix_length: int,
    *,
    window: int = 129,
    eps: float = 1e-5,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of all tokens of a row, of shape (tokens, vocabulary).

    Args:
        tensors: the state dict without the prefix of the training loop; the head is the embedding.
        ids: of shape (tokens,).
        heads: of both kinds of attention.
        prefix_length: the first tokens, which linear attention reads non-causally; at most all of them are.
        window: keys of a sliding-window query, itself included.
        eps: of the norms.
        kept: of shape (prompt tokens,), False at the pads in front of a prompt, see `prefix_attention`.
    """
    x = tensors["transformer.embeddings.word_embeddings.weight"][ids]
    depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("transformer.layers."))
    for layer in range(depth):
        part = parts_of(tensors, f"transformer.layers.{layer}.")
        mixer = parts_of(part, "mixer.")
        h = norm(x, part["norm1.weight"], eps)
        if "Wqkv.weight" in mixer:
            x = x + window_attention(h, mixer, heads, window)
        elif "proj_q.weight" in mixer:
            x = x + prefix_attention(h, mixer, heads, prefix_length, kept)
        else:
            x = x + gated_convolution(h, mixer)
        x = x + gated_mlp(norm(x, part["norm2.weight"], eps), part)
    x = norm(x, tensors["transformer.ln_f.weight"], eps)
    return x @ tensors["transformer.embeddings.word_embeddings.weight"].T


def parts_of(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors below a prefix, named without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def prefix_attention(
    x: torch.Tensor, mixer: Tensors, heads: int, prefix_length: int, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """What prefix linear attention makes of the normed tokens `x` of shape (tokens, hidden).

    A token gives the weight 1 + s + s^2 / 2, with s = q . k / sqrt(feature_dim), to the tokens up to itself by one
    pair of projections and to all of the prefix by another pair, under one sum of weights. Without the other pair it
    is the linear attention of Based.

    Args:
        mixer: `proj_q.weight`, `proj_k.weight`, `proj_v.weight`, `out_proj.weight`, `proj_k_enc.weight` and
            `proj_v_enc.weight`.
        kept: of shape (prompt tokens,), False at pads; tokens of `x` behind the prompt follow it, as in decoding. The
            official mask makes the keys of pads zero but leaves their values, so that a pad keeps the weight 1 in both
            sums; and it does so only where the prefix has room for all of the prompt.
    """
    tokens = x.shape[0]
    q, k, v = (split(x @ mixer[f"proj_{name}.weight"].T, heads) for name in "qkv")
    sides = [(k, v)]
    if "proj_k_enc.weight" in mixer:
        sides.append(tuple(split(x @ mixer[f"proj_{name}_enc.weight"].T, heads)[:prefix_length] for name in "kv"))
    if kept is not None and len(kept) <= prefix_length:
        pads = torch.nonzero(~kept.bool())[:, 0]
        for keys, _ in sides:
            keys[pads] = 0
    out = torch.zeros_like(v)
    for token in range(tokens):
        for head in range(heads):
            values, weights = [], []
            for side, (keys, of_keys) in enumerate(sides):
                seen = slice(token + 1) if side == 0 else slice(None)
                s = keys[seen, head] @ q[token, head] / math.sqrt(q.shape[-1])
                weights.append(1 + s + s * s / 2)
                values.append(of_keys[seen, head])
            w = torch.cat(weights)
            out[token, head] = w @ torch.cat(values) / w.sum()
    return out.flatten(1) @ mixer["out_proj.weight"].T


def window_attention(x: torch.Tensor, mixer: Tensors, heads: int, window: int) -> torch.Tensor:
    """Softmax attention of each token to itself and the `window - 1` tokens before it, rotary over whole heads.

    The rows of `Wqkv.weight` are those of the queries, of the keys and of the values; there may be fewer heads of keys
    and values, each for as many query heads in a row.
    """
    hidden, dim = x.shape[1], x.shape[1] // heads
    kv_heads = (mixer["Wqkv.weight"].shape[0] - hidden) // (2 * dim)
    q, k, v = (x @ mixer["Wqkv.weight"].T).split([hidden, kv_heads * dim, kv_heads * dim], dim=1)
    q, k, v = split(q, heads), split(k, kv_heads), split(v, kv_heads)
    q, k = rotate(q), rotate(k)
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    out = torch.zeros_like(q)
    for token in range(x.shape[0]):
        seen = slice(max(0, token - window + 1), token + 1)
        for head in range(heads):
            scores = k[seen, head] @ q[token, head] / math.sqrt(q.shape[-1])
            out[token, head] = scores.softmax(0) @ v[seen, head]
    return out.flatten(1) @ mixer["out_proj.weight"].T


def rotate(x: torch.Tensor) -> torch.Tensor:
    """`x` of shape (tokens, heads, dim): number i of the first half turns with number i of the second."""
    half = x.shape[-1] // 2
    turns = torch.arange(x.shape[0]).to(x)[:, None] * 10000.0 ** (-torch.arange(half).to(x) / half)
    cos, sin = turns.cos()[:, None], turns.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def gated_convolution(x: torch.Tensor, mixer: Tensors) -> torch.Tensor:
    """The first half of the channels, convolved over the last tokens and bent, times the second half."""
    wide = x @ mixer["in_proj.weight"].T + mixer["in_proj.bias"]
    convolved, gate = wide.chunk(2, dim=1)
    taps = mixer["conv.conv.weight"][:, 0]
    out = torch.zeros_like(convolved)
    for token in range(x.shape[0]):
        for back in range(min(taps.shape[1], token + 1)):
            out[token] += taps[:, -1 - back] * convolved[token - back]
    return (silu(out) * gate) @ mixer["out_proj.weight"].T + mixer["out_proj.bias"]


def gated_mlp(x: torch.Tensor, layer: Tensors) -> torch.Tensor:
    """The first half of the wide numbers is the value, the second its gate."""
    value, gate = (x @ layer["mlp.fc1.weight"].T).chunk(2, dim=1)
    return (value * silu(gate)) @ layer["mlp.fc2.weight"].T


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(tokens, heads * dim) -> (tokens, heads, dim)."""
    return x.reshape(x.shape[0], heads, -1)


def official_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a `JRTForCausalLM` in fp64, under their official names."""
    own = {name: value.detach().double() for name, value in model.state_dict().items()}
    tensors = {
        "transformer.embeddings.word_embeddings.weight": own["model.embed_tokens.weight"],
        "transformer.ln_f.weight": own["model.norm.weight"],
    }
    renamed = {"q": "proj_q", "k": "proj_k", "v": "proj_v", "prefix_k": "proj_k_enc", "prefix_v": "proj_v_enc"}
    for layer in range(model.config.num_hidden_layers):
        of, to = parts_of(own, f"model.layers.{layer}."), f"transformer.layers.{layer}."
        tensors[f"{to}norm1.weight"] = of["input_layernorm.weight"]
        tensors[f"{to}norm2.weight"] = of["post_attention_layernorm.weight"]
        tensors[f"{to}mlp.fc1.weight"] = torch.cat([of["mlp.up_proj.weight"], of["mlp.gate_proj.weight"]])
        tensors[f"{to}mlp.fc2.weight"] = of["mlp.down_proj.weight"]
        linear, attention, conv = (parts_of(of, f"{name}.") for name in ("linear_attn", "self_attn", "conv"))
        for name, value in linear.items():
            part = name.removesuffix("_proj.weight")
            tensors[f"{to}mixer.{renamed.get(part, 'out_proj')}.weight"] = value
        if attention:
            tensors[f"{to}mixer.Wqkv.weight"] = torch.cat([attention[f"{name}_proj.weight"] for name in "qkv"])
            tensors[f"{to}mixer.out_proj.weight"] = attention["o_proj.weight"]
        for name, value in conv.items():
            tensors[f"{to}mixer.{name.replace('conv.weight', 'conv.conv.weight')}"] = value
    return tensors
