"""Prefix linear attention (JRT, arXiv 2407.05483, section 4.2): one op in three forms with one result.

A token attends to the tokens before it through `key` and `value`, and to the whole prefix, later tokens included,
through `prefix_key` and `prefix_value`, under one normaliser (equation 3):

    num_i = sum_{j <= i} kernel(q_i, k_j) v_j + sum_{j in prefix} kernel(q_i, k'_j) v'_j
    den_i = the same with v = 1;    y_i = num_i / den_i

- `reference`: the formula, quadratic.
- `chunked`: linear in time and memory; blocks that are recomputed in the backward pass.
- `recurrent`: token by token, as in decoding.

The state after the last token, `sum_j weights * phi(k_j) [v_j, 1]^T` over tokens and prefix, of shape `(batch, heads,
features, value_dim + 1)` and in fp32 or wider, is all that later tokens need (equation 4).
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..configuration.config_basics import check_choice
from .feature_maps import FeatureMap, find_feature_map, in_graph


IMPLEMENTATIONS = ("chunked", "reference", "recurrent")
# tokens whose features are held in memory at a time
BLOCK_TOKENS = 1024
# tokens that attend to each other directly in the chunked form
CHUNK_SIZE = 64
_EPSILON = 1e-12


def prefix_linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor | None = None,
    prefix_value: torch.Tensor | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    prefix_mask: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    feature_map: str | FeatureMap = "taylor",
    implementation: str = "chunked",
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        query, key (`torch.Tensor` of shape `(batch, heads, tokens, feature_dim)`)
        value (`torch.Tensor` of shape `(batch, heads, tokens, value_dim)`)
        prefix_key (`torch.Tensor` of shape `(batch, heads, prefix_tokens, feature_dim)`, *optional*)
        prefix_value (`torch.Tensor` of shape `(batch, heads, prefix_tokens, value_dim)`, *optional*)
        attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 0 at pads, which weigh nothing.
        prefix_mask (`torch.Tensor` of shape `(batch, prefix_tokens)`, *optional*): 0 outside of a row's prefix.
        state (`torch.Tensor`, *optional*): the state that an earlier call returned.
        feature_map: a name in `feature_maps.FEATURE_MAPS`, or a `FeatureMap`.
        implementation: `chunked`, `reference` or `recurrent`.
        chunk_size: tokens that attend to each other directly in the chunked form.

    Returns:
        Output of shape `(batch, heads, tokens, value_dim)`, in the type of `value`, and the new state. The output at
        pads means nothing.

    Raises:
        ValueError: for shapes that do not fit, or an unknown implementation or map.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` is {chunk_size}, but must be at least 1.")
    feature_map = find_feature_map(feature_map)
    _check_shapes(query, key, value, prefix_key, prefix_value, attention_mask, prefix_mask, state, feature_map)
    given = query, key, value, prefix_key, prefix_value, state
    product_dtype = _product_dtype(query)
    state_dtype = torch.promote_types(product_dtype, torch.float32)
    problem = _Problem(
        feature_map,
        feature_map.weights(query.shape[-1], like=query.new_empty((), dtype=state_dtype)),
        chunk_size,
        product_dtype,
        keeps_inputs_only=query.shape[2] > BLOCK_TOKENS and not torch.compiler.is_compiling(),
        buffers=None if in_graph(*(t for t in given if t is not None)) else {},
    )
    if state is None:
        size = feature_map.size(query.shape[-1])
        state = query.new_zeros((*query.shape[:2], size, value.shape[-1] + 1), dtype=state_dtype)
    run = {"chunked": _attend_block, "reference": _reference, "recurrent": _recurrent}[implementation]
    if implementation == "chunked" and query.shape[2] == 1:
        run = _recurrent
    with torch.autocast(query.device.type, enabled=False):
        state = state.to(state_dtype).flatten(0, 1)
        if run is _reference:
            prefix = prefix_key, prefix_value, prefix_mask
            output, state = _reference(problem, query, key, value, attention_mask, state, *prefix)
        else:
            if prefix_key is not None:
                for part in _blocks(prefix_key.shape[2]):
                    state = _call(_read_block, problem, part, prefix_key, prefix_value, prefix_mask, state=state)
            outputs = None if problem.buffers is None and query.shape[2] else value.new_empty(value.shape)
            kept = []
            for part in _blocks(query.shape[2]):
                output, state = _call(run, problem, part, query, key, value, attention_mask, state=state)
                if outputs is None:
                    kept.append(output)
                else:
                    outputs[:, :, part] = output
            output = torch.cat(kept, dim=2) if outputs is None else outputs
    return output, state.unflatten(0, query.shape[:2])


class _Problem(NamedTuple):
    """What all blocks of a call share.

    Attributes:
        feature_map: the map.
        weights: of its features, of shape `(features, 1)`, or `None`.
        chunk_size: tokens.
        dtype: in which products are computed.
        keeps_inputs_only: recompute a block in the backward pass.
        buffers: work space of one block that the next one writes over; `None` in a graph, where nothing may be.
    """

    feature_map: FeatureMap
    weights: torch.Tensor | None
    chunk_size: int
    dtype: torch.dtype
    keeps_inputs_only: bool
    buffers: dict[str, torch.Tensor] | None

    def buffer(self, name: str, *shape: int, like: torch.Tensor) -> torch.Tensor | None:
        """Fresh pages cost as much time as the products: each block is computed in the same memory."""
        if self.buffers is None:
            return None
        if name not in self.buffers or self.buffers[name].shape != shape:
            self.buffers[name] = like.new_empty(shape, dtype=self.dtype)
        return self.buffers[name]

    def expand(self, prepared: torch.Tensor, feature_dim: int) -> torch.Tensor:
        """Features, which the next call of this method may write over."""
        size = self.feature_map.size(feature_dim)
        buffer = self.buffer("features", *prepared.shape[:-2], size, prepared.shape[-1], like=prepared)
        return self.feature_map.expand(prepared) if buffer is None else self.feature_map.expand_into(prepared, buffer)

    def kernel(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Kernels of prepared queries and keys."""
        buffer = self.buffer("kernel", *query.shape[:-2], query.shape[-1], key.shape[-1], like=query)
        if buffer is None:
            return self.feature_map.kernel(query, key)
        return self.feature_map.kernel_into(query, key, buffer)

    def prepare(self, vectors: torch.Tensor) -> torch.Tensor:
        """`(..., tokens, feature_dim)` -> `(..., prepared_dim, tokens)`."""
        return self.feature_map.prepare(vectors.to(self.dtype))

    def with_ones(self, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Values as `(rows, tokens, value_dim + 1)`, with a column that sums up the kernels; zero where masked."""
        value = F.pad(value.to(self.dtype), (0, 1), value=1.0)
        if mask is not None:
            value = value * mask.to(self.dtype)[:, None, :, None]
        return value.flatten(0, 1)

    def sum_over(self, features: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """What keys add to the state: `(..., features, value_dim + 1)`, in the state's type."""
        buffer = self.buffer("steps", *features.shape[:-1], value.shape[-1], like=value)
        sums = torch.matmul(features, value, out=buffer)
        if self.weights is None:
            return sums.to(torch.promote_types(sums.dtype, torch.float32))
        return sums * self.weights if buffer is None or sums.dtype != self.weights.dtype else sums.mul_(self.weights)


def _reference(
    problem: _Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    state: torch.Tensor,
    prefix_key: torch.Tensor | None,
    prefix_value: torch.Tensor | None,
    prefix_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    phi, ones = problem.feature_map, problem.with_ones(value, mask)
    queries, keys = (problem.prepare(tensor.flatten(0, 1)) for tensor in (query, key))
    sums = phi.kernel(queries, keys).tril() @ ones + phi.expand(queries).mT @ state.to(ones.dtype)
    state = state + problem.sum_over(phi.expand(keys), ones)
    if prefix_key is not None:
        ones, keys = problem.with_ones(prefix_value, prefix_mask), problem.prepare(prefix_key.flatten(0, 1))
        sums = sums + phi.kernel(queries, keys) @ ones
        state = state + problem.sum_over(phi.expand(keys), ones)
    return _normalised(sums, value), state


def _recurrent(
    problem: _Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    queries, keys = (
        problem.feature_map.expand(problem.prepare(tensor.flatten(0, 1))).to(state.dtype) for tensor in (query, key)
    )
    if problem.weights is not None:
        keys = keys * problem.weights
    ones = problem.with_ones(value, mask).to(state.dtype)
    sums = []
    for token in range(ones.shape[1]):
        at = slice(token, token + 1)
        state = torch.addcmul(state, keys[..., at], ones[:, at])
        sums.append(queries[..., at].mT @ state)
    return _normalised(torch.cat(sums, dim=1), value), state


def _read_block(
    problem: _Problem, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, state: torch.Tensor
) -> torch.Tensor:
    """The state with a block of the prefix added."""
    features = problem.expand(problem.prepare(key.flatten(0, 1)), key.shape[-1])
    return state + problem.sum_over(features, problem.with_ones(value, mask))


def _attend_block(
    problem: _Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of a block: to each other within chunks, and through the state to all before their chunk."""
    tokens, feature_dim = query.shape[2:]
    size = min(problem.chunk_size, tokens)
    rows = (query.flatten(0, 1), key.flatten(0, 1), problem.with_ones(value, mask))
    queries, keys, ones = (F.pad(row, (0, 0, 0, -tokens % size)).unflatten(1, (-1, size)) for row in rows)
    queries, keys = problem.prepare(queries), problem.prepare(keys)
    within = problem.kernel(queries, keys)
    within = within.tril() if problem.buffers is None else within.tril_()
    sums = torch.matmul(within, ones, out=problem.buffer("sums", *ones.shape, like=ones)).flatten(0, 1)
    before, state = _states_before(problem, state, problem.sum_over(problem.expand(keys, feature_dim), ones))
    queried = problem.expand(queries, feature_dim).flatten(0, 1).mT
    before = before.to(queried.dtype).flatten(0, 1)
    sums = torch.baddbmm(sums, queried, before, out=None if problem.buffers is None else sums)
    return _normalised(sums.unflatten(0, queries.shape[:2]).flatten(1, 2)[:, :tokens], value), state


def _states_before(problem: _Problem, state: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state before each chunk, of shape `(rows, chunks, features, value_dim + 1)`, and after the last one."""
    if problem.buffers is None:
        states = [state]
        for step in steps.unbind(1):
            states.append(states[-1] + step)
        return torch.stack(states[:-1], dim=1), states[-1]
    # the same, written over the steps
    for step in steps.unbind(1):
        after = state + step
        step.copy_(state)
        state = after
    return steps, state


def _normalised(sums: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`(rows, tokens, value_dim + 1)` -> `(batch, heads, tokens, value_dim)`, in the type of `value`."""
    return (sums[..., :-1] / (sums[..., -1:] + _EPSILON)).to(value.dtype).unflatten(0, value.shape[:2])


def _call(function: Any, problem: _Problem, part: slice, *tensors: torch.Tensor | None, state: torch.Tensor) -> Any:
    """Calls `function` on a block of tokens; the last of `tensors` is a mask."""
    *vectors, mask = tensors
    inputs = [t[:, :, part] for t in vectors] + [None if mask is None else mask[:, part], state]
    if problem.keeps_inputs_only and problem.buffers is None:
        return checkpoint(function, problem, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(problem, *inputs)


def _blocks(tokens: int) -> list[slice]:
    return [slice(start, start + BLOCK_TOKENS) for start in range(0, tokens, BLOCK_TOKENS)]


def _product_dtype(query: torch.Tensor) -> torch.dtype:
    """That of the input, but fp32 on a processor that would emulate products in half precision."""
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
        return query.dtype
    units: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    names = ("avx512_bf16", "amx_bf16") if query.dtype == torch.bfloat16 else ("amx_fp16",)
    return query.dtype if any(units.get(name) for name in names) else torch.float32


def _check_shapes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor | None,
    prefix_value: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    prefix_mask: torch.Tensor | None,
    state: torch.Tensor | None,
    feature_map: FeatureMap,
) -> None:
    if query.ndim != 4:
        raise ValueError(f"`query` has shape {tuple(query.shape)}, but must be (batch, heads, tokens, feature_dim).")
    batch, heads, tokens, feature_dim = query.shape
    if (prefix_key is None) != (prefix_value is None):
        raise ValueError("only one of `prefix_key` and `prefix_value` was given; give both, or none.")
    if prefix_mask is not None and prefix_key is None:
        raise ValueError("`prefix_mask` was given without `prefix_key` and `prefix_value`; give them too.")
    prefix_tokens = 0 if prefix_key is None else prefix_key.shape[2]
    value_dim = value.shape[-1]
    for name, tensor, shape in (
        ("key", key, (batch, heads, tokens, feature_dim)),
        ("value", value, (batch, heads, tokens, value_dim)),
        ("prefix_key", prefix_key, (batch, heads, prefix_tokens, feature_dim)),
        ("prefix_value", prefix_value, (batch, heads, prefix_tokens, value_dim)),
        ("attention_mask", attention_mask, (batch, tokens)),
        ("prefix_mask", prefix_mask, (batch, prefix_tokens)),
        ("state", state, (batch, heads, feature_map.size(feature_dim), value_dim + 1)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, but must be {shape} to fit the query.")
