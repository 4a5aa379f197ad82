"""The accountant: parameters, floating-point operations and KV bytes from a configuration and the routing. No torch.

Counts are exact for what transformers' layers execute, for vanilla configurations of the supported families and for
`MoRConfig`. One multiplication and one addition are two FLOPs. Only matrix products count (projections, attention
scores and values, MLP, routers, head); norms, activations, softmax, rotary angles and look-ups do not. `paper_flops`
holds the paper's own, coarser rule.

Attention counts every (query, key) product that is computed: eager and SDPA attention multiply a rectangle of queries
and keys and mask it afterwards, so nothing is halved for causality. A kernel that skips masked blocks does less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
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
        uniform_window: `config.sliding_window` holds for all layers (there are no `layer_types`).
    """

    layer_norms: int = 2
    qk_norm: str = "none"
    gated: bool = True
    norm_bias: bool = False
    qkv_bias: str | bool = False
    o_bias: str | bool = False
    mlp_bias: str | bool = False
    fused_qkv: bool = False
    uniform_window: bool = False


_BIASED: dict[str, Any] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}

FAMILY_SHAPES: dict[str, FamilyShape] = {
    "llama": FamilyShape(**_BIASED, mlp_bias="mlp_bias"),
    "mistral": FamilyShape(uniform_window=True),
    "qwen2": FamilyShape(qkv_bias=True),
    "qwen3": FamilyShape(qk_norm="head", **_BIASED),
    "smollm3": FamilyShape(**_BIASED, mlp_bias="mlp_bias"),
    "olmo2": FamilyShape(qk_norm="width", **_BIASED),
    "phi3": FamilyShape(fused_qkv=True, uniform_window=True),
    "granite": FamilyShape(**_BIASED, mlp_bias="mlp_bias"),
    "gemma2": FamilyShape(layer_norms=4, **_BIASED),
    "gemma3_text": FamilyShape(layer_norms=4, qk_norm="head", **_BIASED),
    "exaone4": FamilyShape(qk_norm="head"),
    "glm4": FamilyShape(layer_norms=4, qkv_bias="attention_bias"),
    "cohere2": FamilyShape(layer_norms=1, **_BIASED),
    "starcoder2": FamilyShape(
        gated=False, norm_bias=True, qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", uniform_window=True
    ),
}

ROUTER_WIDTHS = {"linear": 0, "mlp": 2, "wide_mlp": 4}


def family_shape(config: Any) -> FamilyShape:
    """The row of `FAMILY_SHAPES` for a vanilla configuration or a `MoRConfig`.

    Raises:
        ValueError: for a family that the accountant does not know.
    """
    name = getattr(config, "backbone", None) or config.model_type
    if name not in FAMILY_SHAPES:
        raise ValueError(
            f"The cost of the family {name!r} is not known; use one of {', '.join(sorted(FAMILY_SHAPES))}."
        )
    return FAMILY_SHAPES[name]


def _flag(config: Any, switch: str | bool) -> bool:
    return switch if isinstance(switch, bool) else bool(getattr(config, switch))


class LayerShape(NamedTuple):
    """Widths of one decoder layer.

    Attributes:
        hidden: width of the residual stream.
        queries: num_attention_heads * head_dim.
        keys: num_key_value_heads * head_dim, the width of the keys and of the values.
        head_dim: width of one head.
        intermediate: inner width of the MLP.
    """

    hidden: int
    queries: int
    keys: int
    head_dim: int
    intermediate: int


def layer_shape(config: Any) -> LayerShape:
    """Widths of a decoder layer of `config`."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return LayerShape(hidden, heads * head_dim, kv_heads * head_dim, head_dim, config.intermediate_size)


@dataclass(frozen=True)
class ParameterCount:
    """Unique parameters; each shared layer and each tied matrix counts once.

    Attributes:
        embedding: input embedding.
        head: language-model head, 0 when tied to the embedding.
        layers: decoder layers.
        final_norm: norm before the head.
        routers: routers, with the predictors of `inference_rule="predictor"`.
    """

    embedding: int
    head: int
    layers: int
    final_norm: int
    routers: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def non_embedding(self) -> int:
        """Everything but the embedding and the head: the size that the paper's Table 6 quotes."""
        return self.layers + self.final_norm + self.routers


def layer_parameters(config: Any) -> int:
    """Parameters of one decoder layer."""
    family, shape = family_shape(config), layer_shape(config)
    d, q, k, head_dim, inner = shape
    inputs = 2 if family.gated else 1
    weights = d * (q + 2 * k) + q * d + (inputs + 1) * d * inner
    biases = (
        (q + 2 * k) * _flag(config, family.qkv_bias)
        + d * _flag(config, family.o_bias)
        + (inputs * inner + d) * _flag(config, family.mlp_bias)
    )
    norms = family.layer_norms * d * (2 if family.norm_bias else 1)
    norms += {"none": 0, "head": 2 * head_dim, "width": q + k}[family.qk_norm]
    return weights + biases + norms


def router_outputs(config: Any) -> int:
    """Logits per router: one for expert choice, one per recursion for token choice."""
    return config.num_recursions if config.routing == "token_choice" else 1


def _router_weights(config: Any) -> int:
    """Weights of one router, which is also half its FLOPs per token."""
    d, out, factor = config.hidden_size, router_outputs(config), ROUTER_WIDTHS[config.router_type]
    return factor * d * d + max(factor, 1) * d * out


def _has_predictors(config: Any) -> bool:
    return config.routing == "expert_choice" and config.inference_rule == "predictor"


def count_parameters(config: Any) -> ParameterCount:
    """Unique parameters of the causal language model of `config` (a `MoRConfig` or a vanilla configuration)."""
    d = config.hidden_size
    embedding = config.vocab_size * d
    physical = getattr(config, "num_physical_layers", config.num_hidden_layers)
    routers = 0
    if is_recursive(config) and config.routing != "none":
        one = _router_weights(config) + (router_outputs(config) if config.router_bias else 0)
        routers = config.num_routers * one * (2 if _has_predictors(config) else 1)
    return ParameterCount(
        embedding=embedding,
        head=0 if config.tie_word_embeddings else embedding,
        layers=physical * layer_parameters(config),
        final_norm=d * (2 if family_shape(config).norm_bias else 1),
        routers=routers,
    )


def is_recursive(config: Any) -> bool:
    """Whether `config` has recursive blocks, that is whether it is a `MoRConfig`."""
    return hasattr(config, "recursive_blocks")


def window_of(config: Any, layer: int) -> int | None:
    """Sliding window of an unrolled layer in tokens, `None` for full attention."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None:
        return window if types[layer] == "sliding_attention" else None
    return window if family_shape(config).uniform_window else None


@dataclass(frozen=True)
class RowRouting:
    """How many tokens of one row go where in one forward call.

    Attributes:
        tokens: columns given to the call. Dense layers compute all of them, pads too.
        entered:
            tokens of this call that enter each pass, block by block: `entered[block * num_recursions + recursion]`.
            Empty for a vanilla configuration and for `routing="none"`, where every token enters.
        past: columns of earlier calls with the same cache.
        stored: like `entered`, over the earlier calls.
    """

    tokens: int
    entered: tuple[int, ...] = ()
    past: int = 0
    stored: tuple[int, ...] = ()

    def after(self, tokens: int, entered: Sequence[int]) -> "RowRouting":
        """The call that follows this one with the same cache."""
        stored = tuple(a + b for a, b in zip(self.stored or (0,) * len(self.entered), self.entered, strict=True))
        return RowRouting(tokens, tuple(entered), self.past + self.tokens, stored)


def full_routing(config: Any, tokens: int, past: int = 0) -> RowRouting:
    """Every token enters every pass."""
    passes = len(config.recursive_blocks) * config.num_recursions if _is_routed(config) else 0
    return RowRouting(tokens, (tokens,) * passes, past, (past,) * passes)


def training_routing(config: Any, tokens: int) -> RowRouting:
    """A row of `tokens` in training: top-k for expert choice (paper, section 2.2.1), balanced token choice."""
    loads = [max(1, int(share * tokens)) for share in expected_shares(config)]
    blocks = len(config.recursive_blocks) if _is_routed(config) else 0
    return RowRouting(tokens, tuple(loads) * blocks, 0, (0,) * (len(loads) * blocks))


def expected_shares(config: Any) -> list[float]:
    """Share of all tokens that enters each recursion: the capacities, or balanced choice, or all."""
    n = getattr(config, "num_recursions", 1)
    if not _is_routed(config):
        return [1.0] * n
    if config.routing == "token_choice":
        return [(n - r) / n for r in range(n)]
    return list(config.capacities)


def _is_routed(config: Any) -> bool:
    return is_recursive(config) and config.routing != "none"


class SlotLoad(NamedTuple):
    """What one unrolled layer does in one call.

    Attributes:
        slot: unrolled layer, which is also the index in the cache.
        queries: tokens that enter the layer.
        keys: keys each of them is multiplied with.
        projects_kv: whether keys and values are computed (not in the deeper recursions of `kv_mode="shared"`).
        stored: tokens whose keys and values the cache holds afterwards.
    """

    slot: int
    queries: float
    keys: float
    projects_kv: bool
    stored: float


def slot_loads(config: Any, routing: RowRouting) -> list[SlotLoad]:
    """The work of every unrolled layer, prelude to coda.

    Raises:
        ValueError: if `routing` does not have one entry per pass of `config`.
    """
    slots = _recursive_slots(config)
    passes = len(config.recursive_blocks) * config.num_recursions if _is_routed(config) else 0
    before = routing.stored or (0,) * passes
    for name, values in (("entered", routing.entered), ("stored", before)):
        if len(values) != passes:
            raise ValueError(
                f"The routing has {len(values)} numbers in `{name}`, but this configuration has {passes} routed "
                "passes (blocks times recursions); give one number per pass."
            )
    dense = dense_recursions(config)
    shared = is_recursive(config) and config.kv_mode == "shared"
    loads = []
    for slot in range(config.num_hidden_layers):
        block, recursion = slots.get(slot, (0, 0))
        routed = slot in slots and not dense[recursion]
        keeps = not (shared and recursion)
        index = block * len(dense) + recursion
        queries = routing.entered[index] if routed else routing.tokens
        if routed and not shared:
            keys = held = before[index] + routing.entered[index]
        else:
            # with shared keys and values, those of the first recursion, which is dense
            window = window_of(config, slot)
            past = routing.past if window is None else min(routing.past, window - 1)
            keys = past + routing.tokens
            held = 0 if not keeps else keys if window is None else min(routing.past + routing.tokens, window - 1)
        # a layer that nobody enters is not called: its keys are multiplied with nothing
        loads.append(SlotLoad(slot, queries, keys if queries else 0, keeps, held))
    return loads


def dense_recursions(config: Any) -> list[bool]:
    """Per recursion, whether every token enters it by construction; it is then run and stored as in vanilla."""
    n = getattr(config, "num_recursions", 1)
    if not _is_routed(config):
        return [True] * n
    if config.routing == "token_choice":
        return [r == 0 for r in range(n)]
    return [capacity == 1 for capacity in config.capacities]


def _recursive_slots(config: Any) -> dict[int, tuple[int, int]]:
    """Unrolled layer -> (its block, its recursion), for the layers of recursive blocks."""
    slots: dict[int, tuple[int, int]] = {}
    if is_recursive(config):
        for number, block in enumerate(config.recursive_blocks):
            for offset in range(config.num_recursions * len(block.layers)):
                slots[block.start + offset] = number, offset // len(block.layers)
    return slots


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one forward call, by part.

    Attributes:
        projections: query, key, value and output projections.
        attention: queries times keys, and weights times values.
        mlp: the matrices of the MLP.
        routers: routers, or predictors with them.
        head: language-model head.
    """

    projections: float = 0
    attention: float = 0
    mlp: float = 0
    routers: float = 0
    head: float = 0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def forward_flops(config: Any, routing: RowRouting, logits: int | None = None) -> FlopCount:
    """FLOPs of one forward call for one row, exact for the given routing.

    Args:
        config: a `MoRConfig` or a vanilla configuration of a supported family.
        routing: how many tokens enter each pass.
        logits: positions the head computes; all columns by default, 1 in a decode step, 0 without a head.
    """
    family, (d, q, k, _, inner) = family_shape(config), layer_shape(config)
    mlp_weights = (3 if family.gated else 2) * d * inner
    projections: float = 0
    attention: float = 0
    mlp: float = 0
    for load in slot_loads(config, routing):
        kv = 2 * k if load.projects_kv or family.fused_qkv else 0
        projections += 2 * load.queries * (d * (q + kv) + q * d)
        attention += 4 * load.queries * load.keys * q
        mlp += 2 * load.queries * mlp_weights
    positions = routing.tokens if logits is None else logits
    return FlopCount(
        projections=projections,
        attention=attention,
        mlp=mlp,
        routers=2 * _router_weights(config) * router_tokens(config, routing) if _is_routed(config) else 0,
        head=2 * positions * d * config.vocab_size,
    )


def router_tokens(config: Any, routing: RowRouting) -> int:
    """Tokens scored, summed over routers and predictors.

    Who left a block at one recursion is not scored at the next. Predictors only run where tokens can leave.
    """
    blocks, n = len(config.recursive_blocks), config.num_recursions
    if config.routing == "token_choice":
        return routing.tokens * blocks
    dense, scored = dense_recursions(config), 0
    for block in range(blocks):
        for r in range(n):
            candidates = routing.tokens if r == 0 or dense[r - 1] else routing.entered[block * n + r - 1]
            scored += candidates * (1 + (_has_predictors(config) and not dense[r]))
    return scored


def kv_bytes(config: Any, routing: RowRouting, bytes_per_value: int = 4) -> int:
    """Bytes of keys and values the cache holds after the call: one key and one value per token and slot it entered.

    Padding of a ragged batch and room to grow are no part of it; see `varidepth.modeling.depth_cache.cache_bytes`.
    """
    width = layer_shape(config).keys
    return int(sum(2 * width * bytes_per_value * load.stored for load in slot_loads(config, routing)))


@dataclass(frozen=True)
class CostSummary:
    """The figures of a plan or a model card.

    Attributes:
        parameters: unique parameters.
        flops_per_token: expected FLOPs of one decode step behind `context` tokens, head included.
        kv_bytes_per_token: expected bytes of keys and values that one more token adds behind full windows.
        context: tokens in the cache.
        mean_layers: expected decoder layers that a token runs.
    """

    parameters: ParameterCount
    flops_per_token: float
    kv_bytes_per_token: float
    context: int
    mean_layers: float


def cost_summary(config: Any, context: int = 1024, bytes_per_value: int = 2) -> CostSummary:
    """Expected cost of one token, if routing follows the capacities (or perfect balance) exactly.

    Args:
        config: a `MoRConfig` or a vanilla configuration of a supported family.
        context: tokens before this one.
        bytes_per_value: bytes of a stored number, 2 for bfloat16.
    """
    shares = expected_shares(config)
    family, (d, q, k, _, inner) = family_shape(config), layer_shape(config)
    slots, dense = _recursive_slots(config), dense_recursions(config)
    shared = is_recursive(config) and config.kv_mode == "shared"
    flops = 2.0 * d * config.vocab_size
    kv = layers = 0.0
    for slot in range(config.num_hidden_layers):
        recursion = slots[slot][1] if slot in slots else 0
        routed = slot in slots and not dense[recursion]
        share = shares[recursion] if routed else 1.0
        source = share if routed and not shared else 1.0
        window = None if routed and not shared else window_of(config, slot)
        keeps = not (shared and recursion)
        keys = source * context if window is None else min(context, window - 1)
        kv_width = 2 * k if keeps or family.fused_qkv else 0
        weights = d * (q + kv_width) + q * d + (3 if family.gated else 2) * d * inner
        flops += share * (2 * weights + 4 * q * (keys + 1))
        kv += source * 2 * k * bytes_per_value if keeps and window is None else 0
        layers += share
    if _is_routed(config):
        scored = 1.0
        if config.routing == "expert_choice":
            candidates = [1.0, *shares[:-1]]
            predicted = [_has_predictors(config) and not whole for whole in dense]
            scored = sum(share * (1 + twice) for share, twice in zip(candidates, predicted, strict=True))
        flops += 2 * _router_weights(config) * scored * len(config.recursive_blocks)
    return CostSummary(count_parameters(config), flops, kv, context, layers)
