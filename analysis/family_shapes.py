"""Widths, biases, norms, windows and experts of the decoder layers of every family, from a configuration. No torch."""

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class FamilyShape:
    """What the fields of a family's configuration do not say about its decoder layer.

    Attributes:
        layer_norms: norms of width `hidden_size` in one layer.
        qk_norm: `none`; `head`: one norm of width head_dim each for queries and keys; `width`: over all heads.
        gated: whether the MLP is gated (three matrices) or plain (two).
        norm_bias: whether norms have a bias.
        qkv_bias, o_bias, mlp_bias: name of the configuration field that switches the bias, or a constant.
        fused_qkv: one matrix for queries, keys and values.
        fused_gate: one matrix for both inputs of a gated MLP.
        uniform_window: `config.sliding_window` holds for all layers (there are no `layer_types`).
        expert_width: name of the field with the inner width of one expert; `None` for families without experts.
    """

    layer_norms: int = 2
    qk_norm: str = "none"
    gated: bool = True
    norm_bias: bool = False
    qkv_bias: str | bool = False
    o_bias: str | bool = False
    mlp_bias: str | bool = False
    fused_qkv: bool = False
    fused_gate: bool = False
    uniform_window: bool = False
    expert_width: str | None = None


_BIASED: dict[str, Any] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}

FAMILY_SHAPES: dict[str, FamilyShape] = {
    "llama": FamilyShape(**_BIASED, mlp_bias="mlp_bias"),
    "mistral": FamilyShape(uniform_window=True),
    "qwen2": FamilyShape(qkv_bias=True),
    "qwen3": FamilyShape(qk_norm="head", **_BIASED),
    "smollm3": FamilyShape(**_BIASED, mlp_bias="mlp_bias"),
    "olmo2": FamilyShape(qk_norm="width", **_BIASED),
    "phi3": FamilyShape(fused_qkv=True, fused_gate=True, uniform_window=True),
    "granite": FamilyShape(**_BIASED, mlp_bias="mlp_bias"),
    "gemma2": FamilyShape(layer_norms=4, **_BIASED),
    "gemma3_text": FamilyShape(layer_norms=4, qk_norm="head", **_BIASED),
    "exaone4": FamilyShape(qk_norm="head"),
    "glm4": FamilyShape(layer_norms=4, qkv_bias="attention_bias", fused_gate=True),
    "cohere2": FamilyShape(layer_norms=1, **_BIASED),
    "starcoder2": FamilyShape(
        gated=False, norm_bias=True, qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", uniform_window=True
    ),
    "mixtral": FamilyShape(uniform_window=True, expert_width="intermediate_size"),
    "qwen3_moe": FamilyShape(qk_norm="head", **_BIASED, uniform_window=True, expert_width="moe_intermediate_size"),
}


def family_shape(config: Any) -> FamilyShape:
    """The row of `FAMILY_SHAPES` for a vanilla configuration or one with a `backbone`.

    Raises:
        ValueError: for a family that the accountant does not know.
    """
    name = getattr(config, "backbone", None) or config.model_type
    if name not in FAMILY_SHAPES:
        raise ValueError(
            f"The cost of the family {name!r} is not known; use one of {', '.join(sorted(FAMILY_SHAPES))}."
        )
    return FAMILY_SHAPES[name]


class LayerShape(NamedTuple):
    """Widths of the attention of a decoder layer.

    Attributes:
        hidden: width of the residual stream.
        queries: num_attention_heads * head_dim.
        keys: num_key_value_heads * head_dim, the width of the keys and of the values.
        head_dim: width of one head.
    """

    hidden: int
    queries: int
    keys: int
    head_dim: int


def layer_shape(config: Any) -> LayerShape:
    """Widths of a decoder layer of `config`; raises a `ValueError` as `family_shape` does."""
    family_shape(config)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return LayerShape(hidden, heads * head_dim, kv_heads * head_dim, head_dim)


class ExpertShape(NamedTuple):
    """The experts of one layer.

    Attributes:
        computing: experts with parameters.
        noop: experts without parameters and effect (MoD paper, section 4.3).
        per_token: experts that each token chooses among all of them.
        intermediate: inner width of one.
    """

    computing: int
    noop: int
    per_token: int
    intermediate: int


def expert_shape(config: Any, layer: int) -> ExpertShape | None:
    """The experts of a layer, `None` where its MLP is dense."""
    width = family_shape(config).expert_width
    if width is None:
        return None
    dense, step = getattr(config, "mlp_only_layers", None) or [], getattr(config, "decoder_sparse_step", 1)
    if layer in dense or (layer + 1) % step:
        return None
    noop = getattr(config, "num_noop_experts", 0)
    return ExpertShape(config.num_local_experts, noop, config.num_experts_per_tok, getattr(config, width))


def mlp_weights(config: Any, layer: int) -> tuple[int, float]:
    """Weights of the MLP of one layer, biases apart, and how many of them each token is multiplied with.

    With experts both have the matrix that chooses. With no-op experts the second is what a choice without preference
    gives, since how many of a token's experts compute is up to the token.
    """
    hidden = config.hidden_size
    one = (3 if family_shape(config).gated else 2) * hidden
    experts = expert_shape(config, layer)
    if experts is None:
        return one * config.intermediate_size, one * config.intermediate_size
    choices = experts.computing + experts.noop
    one *= experts.intermediate
    choosing = choices * hidden
    return experts.computing * one + choosing, experts.per_token * experts.computing / choices * one + choosing


def attention_weights(config: Any, projects_kv: bool = True) -> int:
    """Weights that attention multiplies a token with, biases apart; without keys and values where they are only read.

    Fused projections cannot leave them out.
    """
    d, q, k, _ = layer_shape(config)
    return d * (q + (2 * k if projects_kv or family_shape(config).fused_qkv else 0)) + q * d


def layer_parameters(config: Any, layer: int) -> int:
    """Parameters of one decoder layer."""
    family, (d, q, k, head_dim) = family_shape(config), layer_shape(config)
    stored, _ = mlp_weights(config, layer)
    biases = (q + 2 * k) * _flag(config, family.qkv_bias) + d * _flag(config, family.o_bias)
    if expert_shape(config, layer) is None:
        inputs = 2 if family.gated else 1
        biases += (inputs * config.intermediate_size + d) * _flag(config, family.mlp_bias)
    norms = family.layer_norms * d * (2 if family.norm_bias else 1)
    norms += {"none": 0, "head": 2 * head_dim, "width": q + k}[family.qk_norm]
    return attention_weights(config) + stored + biases + norms


class RecursionShape(NamedTuple):
    """What a shared layer has of its own at each recursion of a MoR.

    Attributes:
        attention: weights of the low-rank differences of the attention's matrices, biases apart.
        mlp: those of the MLP.
        parameters: of all recursions together, with the differences of biases and the norms.
    """

    attention: int = 0
    mlp: int = 0
    parameters: int = 0


def recursion_shape(config: Any) -> RecursionShape:
    """What each recursion has of its own in one shared layer; nothing where all recursions compute the same."""
    rank, norms = getattr(config, "recursion_rank", 0), getattr(config, "recursion_norms", False)
    if not rank and not norms:
        return RecursionShape()
    family, (d, q, k, head_dim) = family_shape(config), layer_shape(config)
    reads_kv = getattr(config, "kv_mode", None) == "shared"
    if family.fused_qkv:
        attention = [(d, q + 2 * k, family.qkv_bias)]
    else:
        attention = [(d, q, family.qkv_bias)] + [(d, k, family.qkv_bias)] * (0 if reads_kv else 2)
    attention.append((q, d, family.o_bias))
    inner, inputs = config.intermediate_size, 2 if family.gated else 1
    mlp = [(d, 2 * inner, family.mlp_bias)] if family.fused_gate else [(d, inner, family.mlp_bias)] * inputs
    mlp.append((inner, d, family.mlp_bias))

    attention_weights, mlp_weights = (
        sum(min(rank, entering, leaving) * (entering + leaving) for entering, leaving, _ in matrices)
        for matrices in (attention, mlp)
    )
    biases = sum(leaving for _, leaving, switch in attention + mlp if rank and _flag(config, switch))
    parameters = config.num_recursions * (attention_weights + mlp_weights + biases)
    if norms:
        width = family.layer_norms * d * (2 if family.norm_bias else 1)
        width += {"none": 0, "head": head_dim, "width": q}[family.qk_norm]
        width += 0 if reads_kv else {"none": 0, "head": head_dim, "width": k}[family.qk_norm]
        parameters += (config.num_recursions - 1) * width
    return RecursionShape(attention_weights, mlp_weights, parameters)


def _flag(config: Any, switch: str | bool) -> bool:
    return switch if isinstance(switch, bool) else bool(getattr(config, switch))


def window_of(config: Any, layer: int) -> int | None:
    """Sliding window of an unrolled layer in tokens, `None` for full attention."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None:
        return window if types[layer] == "sliding_attention" else None
    return window if family_shape(config).uniform_window else None
