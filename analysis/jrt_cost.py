"""What a JRT-RNN costs: parameters, and the floating-point operations of a call, as its layers execute them."""

from ..configuration.configuration_jrt import JRTConfig
from ..modeling import prefix_linear_attention, window_blocks
from ..modeling.feature_maps import TaylorMap, find_feature_map
from ..modeling.prefix_linear_attention import CHUNK_SIZE
from .counts import FlopCount, ParameterCount


def jrt_parameters(config: JRTConfig) -> ParameterCount:
    """Unique parameters of the causal language model."""
    d, types = config.hidden_size, list(config.layer_types or ())
    key_values = (config.num_key_value_heads or config.num_attention_heads) * config.head_dim
    mixers = {
        "linear_attention": _linear_weights(config) + _prefix_weights(config),
        "sliding_attention": 2 * d * d + 2 * d * key_values,
        "conv": _conv_weights(config) + 5 * d + 2 * d * config.conv_kernel_size,
    }
    each = 3 * d * config.intermediate_size + 2 * d
    embedding = config.vocab_size * d
    return ParameterCount(
        embedding=embedding,
        head=0 if config.tie_word_embeddings else embedding,
        layers=sum(mixers[kind] + each for kind in types),
        final_norm=d,
        routers=0,
    )


def jrt_flops(
    config: JRTConfig, tokens: int, past: int = 0, prefix: int | None = None, logits: int | None = None
) -> FlopCount:
    """FLOPs of one call for one row.

    Counted are matrix products, and the taps of convolutions, which are none. The state that a decode step writes is
    no product either. Sliding windows are counted as run in blocks (`window_blocks`), as with SDPA
    attention; eager attention multiplies all tokens of a longer row.

    Args:
        config: of a JRT-RNN.
        tokens: given to the call.
        past: tokens of earlier calls with the same cache.
        prefix: tokens of the prefix that this call reads; by default as many as `config.prefix_length` says, none
            behind a past.
        logits: positions the head computes; all of them by default.
    """
    if prefix is None:
        prefix = 0 if past else min(config.prefix_length, tokens)
    d, types = config.hidden_size, list(config.layer_types or ())
    linear, sliding, conv = (types.count(kind) for kind in ("linear_attention", "sliding_attention", "conv"))
    key_values = (config.num_key_value_heads or config.num_attention_heads) * config.head_dim
    projections = tokens * (
        linear * _linear_weights(config) + sliding * (2 * d * d + 2 * d * key_values) + conv * _conv_weights(config)
    )
    projections += linear * prefix * _prefix_weights(config)
    return FlopCount(
        projections=2 * projections,
        attention=sliding * _window_flops(config, tokens, past),
        mlp=2 * tokens * len(types) * 3 * d * config.intermediate_size,
        head=2 * (tokens if logits is None else logits) * d * config.vocab_size,
        linear_attention=linear * config.num_attention_heads * _head_flops(config, tokens, prefix),
        conv=conv * 2 * tokens * 2 * d * config.conv_kernel_size,
    )


def _linear_weights(config: JRTConfig) -> int:
    """Projections of queries, keys, values and the output of prefix linear attention."""
    d = config.hidden_size
    return d * (2 * config.num_attention_heads * config.feature_dim + 2 * d)


def _prefix_weights(config: JRTConfig) -> int:
    """Projections of its keys and values of the prefix."""
    d = config.hidden_size
    return d * (config.num_attention_heads * config.feature_dim + d) if config.prefix_length else 0


def _conv_weights(config: JRTConfig) -> int:
    """Projections of a gated short convolution, biases apart."""
    return 6 * config.hidden_size**2


def _window_flops(config: JRTConfig, tokens: int, past: int) -> int:
    flops, block = 0, window_blocks.BLOCK_TOKENS
    for start in range(0, tokens, block):
        queries = min(block, tokens - start)
        keys = queries + min(past + start, config.sliding_window - 1)
        flops += 4 * queries * keys * config.hidden_size
    return flops


def _head_flops(config: JRTConfig, tokens: int, prefix: int) -> int:
    """Products of one head of prefix linear attention."""
    feature_map = find_feature_map(config.feature_map)
    features, values = feature_map.size(config.feature_dim), config.head_dim + 1
    # the Taylor kernel is a square of products of the vectors themselves, with a 1 in front
    inner = config.feature_dim + 1 if isinstance(feature_map, TaylorMap) else features
    flops = 2 * prefix * features * values
    if tokens == 1:
        return flops + 2 * features * values
    block = prefix_linear_attention.BLOCK_TOKENS
    for start in range(0, tokens, block):
        size = min(CHUNK_SIZE, tokens - start)
        chunks = -(-min(block, tokens - start) // size)
        per_chunk = size * size * (inner + values) + 2 * size * features * values
        flops += 2 * chunks * per_chunk
    return flops


def recomputed_flops(config: JRTConfig, tokens: int) -> float:
    """FLOPs that a backward pass repeats: those of convolutions, and in long rows of prefix linear attention."""
    flops = jrt_flops(config, tokens)
    return flops.conv + (flops.linear_attention if tokens > prefix_linear_attention.BLOCK_TOKENS else 0.0)
