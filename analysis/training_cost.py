"""What a training run costs: floating-point operations, and the memory of one process, from a configuration.

FLOPs count as in `cost`. The backward pass of a product has two products of its size, so training takes three times
the forward pass; gradient checkpointing runs the decoder layers once more, but for their last product. Predictors,
whose inputs get no gradient, are counted as if they did. Capacities are those of training, raised at first by
`capacity_warmup_steps`.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from ..modeling import prefix_linear_attention
from ..modeling.feature_maps import find_feature_map
from .cost import RowRouting, count_parameters, forward_flops, full_routing, slot_loads, training_routing
from .family_shapes import expert_shape, family_shape, layer_shape
from .jrt_cost import recomputed_flops


# precision -> bytes of a weight, of a stored activation, and of a copy of each weight for the products
PRECISIONS = {"fp32": (4, 4, 0), "bf16": (4, 2, 2), "pure_bf16": (2, 2, 0)}
_WARMUP_SAMPLES = 32


def row_flops(config: Any, seq_len: int, *, gradient_checkpointing: bool = False, warmth: float = 0.0) -> float:
    """FLOPs of forward and backward pass of one row.

    Args:
        config: of a causal language model: vanilla, MoR, MoD or JRT-RNN.
        seq_len: tokens of the row.
        gradient_checkpointing: decoder layers are computed twice.
        warmth: see `training_routing`.
    """
    is_jrt = config.model_type == "jrt"
    routing = full_routing(config, seq_len) if is_jrt else training_routing(config, seq_len, warmth)
    once = forward_flops(config, routing)
    flops = 3 * once.total
    if gradient_checkpointing:
        # the last product of a layer gives nothing that its backward pass needs
        last = once.mlp / (3 if is_jrt or family_shape(config).gated else 2)
        flops += once.total - once.head - once.routers - last
    return flops + (recomputed_flops(config, seq_len) if is_jrt else 0.0)


def run_flops(
    config: Any, seq_len: int, rows: int, forward_passes: int, *, gradient_checkpointing: bool = False
) -> float:
    """FLOPs of a whole run.

    Args:
        config, seq_len, gradient_checkpointing: as in `row_flops`.
        rows: of all steps.
        forward_passes: that each process makes, which is what a capacity warm-up counts.
    """
    settled = row_flops(config, seq_len, gradient_checkpointing=gradient_checkpointing)
    warmup = getattr(config, "capacity_warmup_steps", 0)
    if not warmup:
        return rows * settled
    warm = min(warmup, forward_passes)
    # middles of equal parts of the passes in which capacities fall
    places = [(i + 0.5) * warm / _WARMUP_SAMPLES for i in range(_WARMUP_SAMPLES)]
    each = [
        row_flops(
            config,
            seq_len,
            gradient_checkpointing=gradient_checkpointing,
            warmth=0.5 * (1 + math.cos(math.pi * place / warmup)),
        )
        for place in places
    ]
    share = warm / forward_passes
    return rows * (share * sum(each) / len(each) + (1 - share) * settled)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one process needs at the highest point of a step, if it holds the whole model.

    Attributes:
        weights: with the copies that autocast makes of them.
        gradients: of all weights.
        optimizer: the two moments of AdamW.
        activations: what the decoder layers keep for the backward pass.
        logits: logits, their log-probabilities and the gradient.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(
    config: Any,
    rows: int,
    seq_len: int,
    *,
    precision: str = "fp32",
    gradient_checkpointing: bool = False,
) -> TrainingMemory:
    """An estimate of the memory of a training step, for SDPA or flash attention and AdamW.

    It counts what is stored; measured peaks lie between 0.8 and 1.15 times it. The workspace of kernels, fragments of
    the allocator and buffers of distributed engines come on top, and what these engines divide is not divided here.
    With experts, every token counts with those that it chooses.

    Args:
        config: of a causal language model: vanilla, MoR, MoD or JRT-RNN.
        rows: of one forward pass of the process (`per_device_train_batch_size`).
        seq_len: tokens of each.
        precision: `fp32`; `bf16`, autocast over fp32 weights (`TrainingArguments(bf16=True)`); or `pure_bf16`.
        gradient_checkpointing: layers keep their inputs only.
    """
    weight, value, copied = PRECISIONS[precision]
    count = count_parameters(config)
    tokens = rows * seq_len
    layers = [tokens_in * _layer_bytes(config, kind, seq_len, value) for kind, tokens_in in _layers(config, seq_len)]
    activations = sum(layers) * rows
    copies = copied * count.total
    if gradient_checkpointing:
        # of each layer its input, in the type of the residual stream, and one layer that is computed again
        kept = sum(tokens_in for _, tokens_in in _layers(config, seq_len))
        activations = rows * (max(layers, default=0.0) + kept * config.hidden_size * (4 if copied else value))
    if config.model_type == "jrt" and seq_len > prefix_linear_attention.BLOCK_TOKENS:
        activations += rows * prefix_linear_attention.BLOCK_TOKENS * _head_values(config) * 4
    # final norm
    activations += tokens * config.hidden_size * (14 if value == 2 else 12)
    return TrainingMemory(
        weights=weight * count.total + copies,
        gradients=weight * count.total,
        optimizer=2 * weight * count.total,
        activations=activations,
        logits=12.0 * tokens * config.vocab_size,
    )


def _layers(config: Any, seq_len: int) -> list[tuple[Any, float]]:
    """Kind or number of each unrolled layer, and the tokens of a row that it computes in training."""
    if config.model_type == "jrt":
        return [(kind, float(seq_len)) for kind in config.layer_types]
    routing: RowRouting = training_routing(config, seq_len)
    return [(load.slot, max(load.queries, load.mlp_tokens)) for load in slot_loads(config, routing)]


def _layer_bytes(config: Any, kind: Any, seq_len: int, value: int) -> float:
    """Bytes that one token leaves in a layer for its backward pass.

    A norm keeps its input, the scaled input and the output, in fp32 where it computes so; attention the rotated
    queries and keys, values and output; a gated MLP both inner products, the activation and their product.
    """
    d = config.hidden_size
    norm = 14 * d if value == 2 else 12 * d
    if config.model_type == "jrt":
        return 2 * norm + value * (_mixer_values(config, kind, seq_len) + 4 * config.intermediate_size)
    family, shape = family_shape(config), layer_shape(config)
    experts = expert_shape(config, kind) if family.expert_width else None
    inner = config.intermediate_size if experts is None else experts.per_token * experts.intermediate
    inside = (4 if family.gated else 2) * inner
    return family.layer_norms * norm + value * (2 * shape.queries + 2 * shape.keys + inside)


def _mixer_values(config: Any, kind: str, seq_len: int) -> float:
    d = config.hidden_size
    if kind == "conv":
        return 4 * d  # values and gates; the rest is computed again
    if kind == "sliding_attention":
        return 2 * d + 2 * (config.num_key_value_heads or config.num_attention_heads) * config.head_dim
    vectors = config.num_attention_heads * config.feature_dim
    prefix = min(config.prefix_length, seq_len) / seq_len
    inputs = 2 * vectors + 2 * d + prefix * (vectors + d)
    long = seq_len > prefix_linear_attention.BLOCK_TOKENS
    return inputs + (0.0 if long else _head_values(config))


def _head_values(config: Any) -> float:
    """Values per token that prefix linear attention keeps of a block: features, kernels of a chunk, sums, states."""
    features = find_feature_map(config.feature_map).size(config.feature_dim)
    values = config.head_dim + 1
    one = (
        2 * features
        + 3 * prefix_linear_attention.CHUNK_SIZE
        + 6 * values
        + 2 * features * values / prefix_linear_attention.CHUNK_SIZE
    )
    return config.num_attention_heads * one
