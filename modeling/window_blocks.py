"""Sliding-window attention over long inputs in linear time and memory: block by block, as in a chunked prefill."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_sliding_window_causal_mask

from .cache_naming import CACHE


# queries whose mask is held in memory at a time
BLOCK_TOKENS = 512


class Window(NamedTuple):
    """What sliding-window layers of one forward pass need to know of the tokens.

    Attributes:
        position_ids (`torch.LongTensor` of shape `(batch or 1, tokens)`)
        position_embeddings: cosines and sines, each of shape `(batch or 1, tokens, head_dim)`.
        attention_mask (`torch.Tensor` of shape `(batch, seen + tokens)`): 0 at pads, or `None`.
        mask: of the attention function, for all tokens at once; `None` in blocks too.
        in_blocks: the tokens are too many for one mask.
        seen: columns seen before.
        shared_masks: masks of blocks that all rows, blocks and layers can share, by tokens and by keys before them.
    """

    position_ids: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    attention_mask: torch.Tensor | None
    mask: Any
    in_blocks: bool
    seen: int
    shared_masks: dict[tuple[int, int], torch.Tensor | None]


def make_window(
    config: PreTrainedConfig,
    rotary: nn.Module,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    cache: Cache | None,
    seen: int,
) -> Window:
    """The window of one forward pass over `inputs_embeds`, of shape `(batch, tokens, hidden_size)`."""
    # only sdpa needs a mask that grows with the square; flash and flex attention know windows
    in_blocks = config._attn_implementation == "sdpa" and inputs_embeds.shape[1] > BLOCK_TOKENS
    in_blocks = in_blocks and not torch.compiler.is_compiling()
    mask = None
    if not in_blocks:
        mask = _mask(config, inputs_embeds, attention_mask, position_ids, cache, layer_idx=None)
    embeddings = rotary(inputs_embeds, position_ids=position_ids)
    return Window(position_ids, embeddings, attention_mask, mask, in_blocks, seen, {})


def attend(
    attention: nn.Module, hidden_states: torch.Tensor, window: Window, cache: Cache | None, **kwargs: Any
) -> torch.Tensor:
    """Runs an attention module of transformers over its window.

    Args:
        attention: with `config` and `layer_idx`.
        hidden_states (`torch.Tensor` of shape `(batch, tokens, hidden_size)`)
        window: of this forward pass.
        cache: of the model.
    """
    if not window.in_blocks:
        return attention(
            hidden_states,
            position_embeddings=window.position_embeddings,
            attention_mask=window.mask,
            **{CACHE: cache},
            **kwargs,
        )[0]
    config = attention.config
    shares = cache is None and window.attention_mask is None
    if cache is None:
        cache = DynamicCache(config=config)
    outputs = []
    for start in range(0, hidden_states.shape[1], BLOCK_TOKENS):
        part = slice(start, start + BLOCK_TOKENS)
        block = hidden_states[:, part]
        seen = window.attention_mask
        seen = None if seen is None else seen[:, : window.seen + start + block.shape[1]]
        positions = window.position_ids[:, part]
        size = block.shape[1], min(start, config.sliding_window - 1)
        if shares and size in window.shared_masks:
            mask = window.shared_masks[size]
        else:
            mask = _mask(config, block, seen, positions, cache, layer_idx=attention.layer_idx)
            if shares:
                mask = window.shared_masks[size] = _shareable(mask, block.dtype)
        cos, sin = window.position_embeddings
        outputs.append(
            attention(
                block,
                position_embeddings=(cos[:, part], sin[:, part]),
                attention_mask=mask,
                **{CACHE: cache},
                **kwargs,
            )[0]
        )
    return torch.cat(outputs, dim=1)


def _shareable(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The mask of one row, additive: of a boolean one each call would keep a copy like this for the backward pass."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    if torch.is_autocast_enabled(mask.device.type):
        # in the type of queries and keys, or each call would cast it and keep that copy
        dtype = torch.get_autocast_dtype(mask.device.type)
    return torch.zeros(mask[:1].shape, dtype=dtype, device=mask.device).masked_fill_(~mask[:1], float("-inf"))


def _mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    cache: Cache | None,
    layer_idx: int | None,
) -> Any:
    return create_sliding_window_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        layer_idx=layer_idx,
        **{CACHE: cache},
    )
