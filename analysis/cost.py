"""The accountant: parameters, floating-point operations and KV bytes from a configuration and the routing. No torch.

Counts are exact for what transformers' layers execute, for vanilla configurations of the supported families and for
those of the routed architectures. One multiplication and one addition are two FLOPs. Only matrix products count
(projections, attention scores and values, MLP, routers, head); norms, activations, softmax, rotary angles and look-ups
do not. `paper_flops` holds the MoR paper's own, coarser rule.

Attention counts every (query, key) product that is computed: eager and SDPA attention multiply a rectangle of queries
and keys and mask it afterwards, so nothing is halved for causality. A kernel that skips masked blocks does less.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..configuration.configuration_mor import ROUTER_TYPES
from ..configuration.routed_config import RoutedPass
from .counts import FlopCount, ParameterCount
from .family_shapes import (
    attention_weights,
    family_shape,
    layer_parameters,
    layer_shape,
    mlp_weights,
    recursion_shape,
    window_of,
)


def count_parameters(config: Any) -> ParameterCount:
    """Unique parameters of the causal language model of `config` (routed, vanilla or JRT-RNN)."""
    if config.model_type == "jrt":
        from .jrt_cost import jrt_parameters  # with torch

        return jrt_parameters(config)
    d = config.hidden_size
    embedding = config.vocab_size * d
    physical = getattr(config, "num_physical_layers", config.num_hidden_layers)
    routers = 0
    if _num_routers(config):
        bias = router_outputs(config) if config.router_bias else 0
        routers = config.num_routers * sum(weights + bias for weights in _bank_weights(config) if weights)
    return ParameterCount(
        embedding=embedding,
        head=0 if config.tie_word_embeddings else embedding,
        layers=sum(layer_parameters(config, layer) for layer in range(physical)),
        final_norm=d * (2 if family_shape(config).norm_bias else 1),
        routers=routers,
        recursions=getattr(config, "num_shared_layers", 0) * recursion_shape(config).parameters,
    )


def router_outputs(config: Any) -> int:
    """Logits per router: one for expert choice, one per recursion for token choice."""
    return config.num_recursions if config.routing == "token_choice" else 1


def _num_routers(config: Any) -> int:
    return getattr(config, "num_routers", 0)


def _bank_weights(config: Any) -> tuple[int, int]:
    """Weights of one router and of one predictor, 0 where there is none; half the FLOPs of each per token."""
    d, out = config.hidden_size, router_outputs(config)
    inner = ROUTER_TYPES[getattr(config, "router_type", "linear")] * d
    predictor_inner = getattr(config, "predictor_hidden_size", None) or inner
    router, predictor = (width * d + (width or d) * out for width in (inner, predictor_inner))
    has_predictors = config.routing == "expert_choice" and config.inference_rule == "predictor"
    return router, predictor if has_predictors else 0


def passes_of(config: Any) -> list[RoutedPass]:
    """`config.routed_passes`; none for a vanilla configuration."""
    return list(getattr(config, "routed_passes", ()))


def pass_chains(config: Any) -> list[range]:
    """Numbers of the passes, in chains: only who entered a pass is a candidate for the next one of its chain.

    The recursions of a block (MoR) are a chain, and so is each routed layer for itself (MoD).
    """
    length = getattr(config, "num_recursions", 1)
    return [range(first, first + length) for first in range(0, len(passes_of(config)), length)]


@dataclass(frozen=True)
class RowRouting:
    """How many tokens of one row go where in one forward call.

    Attributes:
        tokens: columns given to the call. Dense layers compute all of them, pads too.
        entered: tokens of this call that enter each pass, in the order of `config.routed_passes`.
        past: columns of earlier calls with the same cache.
        stored: like `entered`, over the earlier calls.
    """

    tokens: int
    entered: tuple[float, ...] = ()
    past: int = 0
    stored: tuple[float, ...] = ()

    def after(self, tokens: int, entered: Sequence[float]) -> "RowRouting":
        """The call that follows this one with the same cache."""
        stored = tuple(a + b for a, b in zip(self.stored or (0,) * len(self.entered), self.entered, strict=True))
        return RowRouting(tokens, tuple(entered), self.past + self.tokens, stored)


def full_routing(config: Any, tokens: int, past: int = 0) -> RowRouting:
    """Every token enters every pass."""
    passes = len(passes_of(config))
    return RowRouting(tokens, (tokens,) * passes, past, (past,) * passes)


def training_routing(config: Any, tokens: int, warmth: float = 0.0) -> RowRouting:
    """A row of `tokens` in training: top-k for expert choice (MoR, section 2.2.1), balanced token choice.

    Args:
        config: a routed or a vanilla configuration.
        tokens: of the row.
        warmth: how far the capacities are still raised by `capacity_warmup_steps`: 1 at its begin, 0 after it.
    """
    multiple = getattr(config, "capacity_multiple", 1)
    first = getattr(config, "always_route_first", 0)
    loads = []
    for routed_pass in passes_of(config):
        share = routed_pass.share + (1 - routed_pass.share) * warmth
        count = max(1, int(share * tokens))
        loads.append(min(max(-(-count // multiple) * multiple, first), tokens))
    return RowRouting(tokens, tuple(loads), 0, (0,) * len(loads))


class SlotLoad(NamedTuple):
    """What one unrolled layer does in one call.

    Attributes:
        slot: unrolled layer, which is also the index in the cache.
        queries: tokens that enter the attention.
        keys: keys each of them is multiplied with.
        projects_kv: whether keys and values are computed (not in the deeper recursions of `kv_mode="shared"`).
        stored: tokens whose keys and values the cache holds afterwards.
        mlp_tokens: tokens that enter the MLP.
    """

    slot: int
    queries: float
    keys: float
    projects_kv: bool
    stored: float
    mlp_tokens: float


def slot_loads(config: Any, routing: RowRouting) -> list[SlotLoad]:
    """The work of every unrolled layer, first to last.

    Raises:
        ValueError: if `routing` does not have one entry per pass of `config`.
    """
    passes = passes_of(config)
    before = routing.stored or (0,) * len(passes)
    for name, values in (("entered", routing.entered), ("stored", before)):
        if len(values) != len(passes):
            raise ValueError(
                f"The routing has {len(values)} numbers in `{name}`, but this configuration has {len(passes)} routed "
                "passes (`config.routed_passes`); give one number per pass."
            )
    number_of = {slot: number for number, routed_pass in enumerate(passes) for slot in routed_pass.slots}
    loads = []
    for slot in range(config.num_hidden_layers):
        queries: float = routing.tokens
        mlp_tokens: float = routing.tokens
        window, writes = window_of(config, slot), True
        past = routing.past if window is None else min(routing.past, window - 1)
        keys: float = past + routing.tokens
        held: float = keys if window is None else min(routing.past + routing.tokens, window - 1)
        if slot in number_of:
            number = number_of[slot]
            routed_pass, entered = passes[number], routing.entered[number]
            writes = routed_pass.writes_kv
            queries, mlp_tokens = _part_loads(routed_pass, routing.tokens, entered)
            if routed_pass.stores_partly:
                keys = held = before[number] + entered
            elif not writes:
                held = 0
        # a layer that nobody enters is not called: its keys are multiplied with nothing
        loads.append(SlotLoad(slot, queries, keys if queries else 0, writes, held, mlp_tokens))
    return loads


def _part_loads(routed_pass: RoutedPass, tokens: float, entered: float) -> tuple[float, float]:
    """Tokens in the attention and in the MLP of a pass's layers."""
    if routed_pass.always:
        return tokens, tokens
    return (tokens if routed_pass.unit == "mlp" else entered), (tokens if routed_pass.unit == "attention" else entered)


def forward_flops(config: Any, routing: RowRouting, logits: int | None = None) -> FlopCount:
    """FLOPs of one forward call for one row, exact for the given routing.

    Experts count as chosen without preference where some are no-op experts, see `mlp_weights`.

    Args:
        config: a routed or a vanilla configuration of a supported family, or a JRT-RNN's, see `jrt_cost`.
        routing: how many tokens enter each pass.
        logits: positions the head computes; all columns by default, 1 in a decode step, 0 without a head.
    """
    if config.model_type == "jrt":
        from .jrt_cost import jrt_flops

        return jrt_flops(config, routing.tokens, routing.past, logits=logits)
    positions = routing.tokens if logits is None else logits
    return _flops(config, slot_loads(config, routing), routing.tokens, routing.entered, positions)


def _flops(
    config: Any, loads: Iterable[SlotLoad], tokens: float, entered: Sequence[float], positions: float
) -> FlopCount:
    width = layer_shape(config).queries
    projections: float = 0
    attention: float = 0
    mlp: float = 0
    recursions: float = 0
    own, repeated = recursion_shape(config), _repeated_slots(config)
    for load in loads:
        projections += 2 * load.queries * attention_weights(config, load.projects_kv)
        attention += 4 * load.queries * load.keys * width
        mlp += 2 * load.mlp_tokens * mlp_weights(config, load.slot)[1]
        if load.slot in repeated:
            recursions += 2 * (load.queries * own.attention + load.mlp_tokens * own.mlp)
    routers: float = 0
    if _num_routers(config):
        scored = zip(_bank_weights(config), scored_tokens(config, tokens, entered), strict=True)
        routers = sum(2 * weights * count for weights, count in scored)
    head = 2 * positions * config.hidden_size * config.vocab_size
    return FlopCount(projections, attention, mlp, routers, head, recursions)


def _repeated_slots(config: Any) -> set[int]:
    """Unrolled layers whose parameters a MoR shares."""
    return {slot for routed_pass in passes_of(config) for slot in routed_pass.slots}


def scored_tokens(config: Any, tokens: float, entered: Sequence[float]) -> tuple[float, float]:
    """Tokens that routers score, and that predictors score, summed over them.

    Who left a block at one recursion is not scored at the next. Predictors only run where tokens can leave.

    Args:
        config: a configuration with routers.
        tokens: columns of the call.
        entered: tokens that enter each pass.
    """
    if config.routing == "token_choice":
        return tokens * config.num_routers, 0
    passes = passes_of(config)
    by_routers: float = 0
    by_predictors: float = 0
    for chain in pass_chains(config):
        candidates = tokens
        for number in chain:
            by_routers += candidates
            if not passes[number].always:
                by_predictors += candidates
                candidates = entered[number]
    return by_routers, by_predictors


def kv_bytes(config: Any, routing: RowRouting, bytes_per_value: int = 4) -> int:
    """Bytes of keys and values the cache holds after the call: one key and one value per token and slot it entered.

    Padding of a ragged batch and room to grow are no part of it; see `varidepth.modeling.depth_cache.cache_bytes`.
    """
    width = layer_shape(config).keys
    return int(sum(2 * width * bytes_per_value * load.stored for load in slot_loads(config, routing)))


def expected_flops(config: Any, context: int = 1024, shares: Sequence[float] | None = None) -> FlopCount:
    """Expected FLOPs of one decode step.

    Args:
        config: a routed or a vanilla configuration of a supported family.
        context: tokens before this one.
        shares: share of all tokens that enters each pass; by default the capacities, or perfect balance.

    Raises:
        ValueError: if there is not one share per pass.
    """
    passes = passes_of(config)
    shares = [routed_pass.share for routed_pass in passes] if shares is None else shares
    # a token that enters finds the shares of those before it, and itself
    entering = RowRouting(1, (1,) * len(shares), context, tuple(share * context for share in shares))
    loads = {load.slot: load for load in slot_loads(config, entering)}
    for routed_pass, share in zip(passes, shares, strict=True):
        queries, mlp_tokens = _part_loads(routed_pass, 1, share)
        for slot in routed_pass.slots:
            loads[slot] = loads[slot]._replace(queries=queries, mlp_tokens=mlp_tokens)
    return _flops(config, loads.values(), 1, shares, 1)


@dataclass(frozen=True)
class CostSummary:
    """The figures of a plan or a model card.

    Attributes:
        parameters: unique parameters.
        flops_per_token: expected FLOPs of one decode step behind `context` tokens, head included.
        kv_bytes_per_token: expected bytes of keys and values that one more token adds behind full windows.
        context: tokens in the cache.
        mean_layers: expected decoder layers that a token runs whole.
    """

    parameters: ParameterCount
    flops_per_token: float
    kv_bytes_per_token: float
    context: int
    mean_layers: float


def cost_summary(config: Any, context: int = 1024, bytes_per_value: int = 2) -> CostSummary:
    """Expected cost of one token, if routing follows the capacities (or perfect balance) exactly.

    Args:
        config: a routed or a vanilla configuration of a supported family.
        context: tokens before this one.
        bytes_per_value: bytes of a stored number, 2 for bfloat16.
    """
    pass_of = {slot: routed_pass for routed_pass in passes_of(config) for slot in routed_pass.slots}
    stored = layers = 0.0
    for slot in range(config.num_hidden_layers):
        routed_pass = pass_of.get(slot)
        layers += 1.0 if routed_pass is None else routed_pass.share
        if routed_pass is not None and routed_pass.stores_partly:
            stored += routed_pass.share
        elif window_of(config, slot) is None and (routed_pass is None or routed_pass.writes_kv):
            stored += 1.0
    kv = stored * 2 * layer_shape(config).keys * bytes_per_value
    return CostSummary(count_parameters(config), expected_flops(config, context).total, kv, context, layers)
