"""Short prompts as the official code of JRT pads them (paper, appendix B.2), to reproduce its published numbers.

A masked token is a pad for linear attention only, and even there it keeps weight one; convolutions and sliding windows
see it as text. The strategy `exact` needs none of this.
"""

from typing import NamedTuple

import torch

from ..configuration.configuration_jrt import JRTConfig
from .prefix_tokens import Prefix


class PaddedPrompts(NamedTuple):
    """
    Attributes:
        inputs_embeds (`torch.Tensor` of shape `(batch, padded tokens, hidden_size)`): ends with the columns given.
        attention_mask (`torch.BoolTensor` of shape `(batch, padded tokens)`): False at pads; `None` without any.
        prefix: all of the padded prompt.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    prefix: Prefix


def pad_short_prompts(
    config: JRTConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    prefix: Prefix,
    pad_embedding: torch.Tensor,
) -> PaddedPrompts:
    """
    Args:
        config: with `short_prompt` `left_pad` or `read_twice`.
        inputs_embeds (`torch.Tensor` of shape `(batch, tokens, hidden_size)`)
        attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 0 at pads, which stand on the left.
        prefix: the prompts; tokens behind them follow.
        pad_embedding (`torch.Tensor` of shape `(hidden_size,)`): of the token to pad with.

    Raises:
        ValueError: for a batch that the official code cannot express.
    """
    kind, wanted = config.short_prompt, config.prefix_length
    lengths, columns = prefix.lengths.tolist(), prefix.columns
    short = [length < wanted for length in lengths]
    if not any(short):
        if attention_mask is not None:
            raise ValueError(
                f"`short_prompt` is {kind!r}, where pads are text once a prompt has {wanted} tokens, but the batch is "
                "padded; give rows of one length, or set `short_prompt` to 'exact'."
            )
        return PaddedPrompts(inputs_embeds, None, prefix)
    copies = 2 if kind == "read_twice" else 1
    width = max(wanted, copies * columns)
    if not all(short) or (width > wanted and len(set(lengths)) > 1):
        raise ValueError(
            f"`short_prompt` is {kind!r}, but prompts of {min(lengths)} to {max(lengths)} tokens cannot be padded to "
            f"one prefix of {wanted}; give rows of one length, or set `short_prompt` to 'exact'."
        )
    in_prompt = prefix.mask[:, :columns]
    if not bool(in_prompt[:, -1].all() and (in_prompt.int().diff(dim=1) >= 0).all()):
        raise ValueError(
            f"`short_prompt` is {kind!r}, which pads on the left, but the batch is padded otherwise, or its prefixes "
            "have holes or end in different columns; set it to 'exact'."
        )
    # where each padded column comes from, counted from the first column given; below zero for pads
    ends = torch.arange(width, device=inputs_embeds.device) - width
    counts = prefix.lengths[:, None]
    source = torch.where(ends < -copies * counts, -1, columns - 1 - (-1 - ends) % counts)
    kept = source >= 0
    index = source.clamp(min=0)[..., None].expand(-1, -1, inputs_embeds.shape[-1])
    prompt = torch.where(kept[..., None], inputs_embeds.gather(1, index), pad_embedding.to(inputs_embeds.dtype))
    rest = inputs_embeds[:, columns:]
    mask = torch.cat([kept, kept.new_ones(rest.shape[:2])], dim=1)
    in_prefix = torch.zeros_like(mask)
    in_prefix[:, :width] = True
    return PaddedPrompts(torch.cat([prompt, rest], dim=1), mask, Prefix(in_prefix, width, prefix.lengths))
