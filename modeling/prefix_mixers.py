"""Token mixers of JRT-RNN beside sliding-window attention: prefix linear attention and the gated short convolution."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from .feature_maps import FeatureMap, find_feature_map
from .prefix_cache import Tokens
from .prefix_linear_attention import prefix_linear_attention
from .prefix_tokens import Prefix, find_prefix


class PrefixLinearAttention(nn.Module):
    """Multi-head prefix linear attention (JRT, arXiv 2407.05483, section 4.2), for JRT-RNN and for any other model.

    Examples:
        >>> layer = PrefixLinearAttention(hidden_size=256, num_heads=4)
        >>> output, state = layer(torch.randn(2, 10, 256), prefix_length=6)
        >>> next_output, state = layer(torch.randn(2, 1, 256), state=state)

    Args:
        hidden_size: width of input and output.
        num_heads: number of heads.
        feature_dim: size of a query or key vector, per head.
        head_dim: size of a value vector, per head; `hidden_size // num_heads` by default.
        feature_map: a name in `feature_maps.FEATURE_MAPS`, or a `FeatureMap`.
        reads_prefix: have projections for a prefix; without them the layer is causal.
        layer_idx: its layer in a cache.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 16,
        feature_dim: int = 16,
        head_dim: int | None = None,
        feature_map: str | FeatureMap = "taylor",
        reads_prefix: bool = True,
        layer_idx: int | None = None,
    ):
        super().__init__()
        head_dim = head_dim or hidden_size // num_heads
        find_feature_map(feature_map)
        self.feature_dim, self.head_dim, self.feature_map = feature_dim, head_dim, feature_map
        self.reads_prefix, self.layer_idx = reads_prefix, layer_idx
        self.q_proj = nn.Linear(hidden_size, num_heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * feature_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        if reads_prefix:
            self.prefix_k_proj = nn.Linear(hidden_size, num_heads * feature_dim, bias=False)
            self.prefix_v_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prefix_length: int | torch.Tensor | None = None,
        encoder_mask: torch.Tensor | Prefix | None = None,
        state: torch.Tensor | None = None,
        cache: Cache | None = None,
        pads_leak: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, hidden_size)`)
            attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 0 at pads.
            prefix_length (`int` or `torch.LongTensor` of shape `(batch,)`, *optional*):
                The first tokens of each row that are the prefix, pads not counted.
            encoder_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 1 in the prefix, instead of a length.
            state (`torch.Tensor`, *optional*): what an earlier call returned; the tokens then continue from it.
            cache: with a `PrefixStateLayer` at `layer_idx`, which holds the state instead.
            pads_leak: as in the official code, a pad has a key of zero but keeps its value, so that it weighs 1 in
                both sums.
            options: of `prefix_linear_attention`.

        Returns:
            Output of shape `(batch, tokens, hidden_size)`, and the state.

        Raises:
            ValueError: for a prefix in a layer without one, and for shapes that do not fit.
        """
        if state is not None and cache is not None:
            raise ValueError("`state` and `cache` both hold what was read before; give one of them.")
        visible = None if pads_leak else attention_mask
        prefix = find_prefix(hidden_states, visible, prefix_length, encoder_mask)
        if prefix is not None and not self.reads_prefix:
            raise ValueError("a prefix was given, but the layer was made with reads_prefix=False and is causal.")
        query = _split_heads(self.q_proj(hidden_states), self.feature_dim)
        key = _split_heads(self.k_proj(hidden_states), self.feature_dim)
        value = _split_heads(self.v_proj(hidden_states), self.head_dim)
        prefix_key = prefix_value = prefix_mask = None
        if prefix is not None:
            columns = slice(0, prefix.columns)
            in_prefix, prefix_mask = hidden_states[:, columns], prefix.mask[:, columns]
            prefix_key = _split_heads(self.prefix_k_proj(in_prefix), self.feature_dim)
            prefix_value = _split_heads(self.prefix_v_proj(in_prefix), self.head_dim)
        if pads_leak and attention_mask is not None:
            kept = attention_mask.to(key.dtype)[:, None, :, None]
            key, attention_mask = key * kept, None
            if prefix_key is not None:
                prefix_key, prefix_mask = prefix_key * kept[:, :, : prefix_key.shape[2]], None
        slot = None if cache is None else cache.layers[self.layer_idx]
        output, state = prefix_linear_attention(
            query,
            key,
            value,
            prefix_key,
            prefix_value,
            attention_mask=attention_mask,
            prefix_mask=prefix_mask,
            state=state if slot is None else slot.state,
            feature_map=self.feature_map,
            **options,
        )
        if slot is not None:
            read = Tokens(key, value, attention_mask, (prefix_key, prefix_value, prefix_mask), self.feature_map)
            lengths = state.new_zeros(len(state), dtype=torch.long) if prefix is None else prefix.lengths
            slot.advance(state, read, lengths)
        return self.o_proj(output.transpose(1, 2).flatten(2)), state


def _split_heads(projected: torch.Tensor, size: int) -> torch.Tensor:
    """`(batch, tokens, heads * size)` -> `(batch, heads, tokens, size)`; in tensor parallelism only some heads."""
    return projected.unflatten(-1, (-1, size)).transpose(1, 2)


class GatedShortConvolution(nn.Module):
    """A causal depthwise convolution of a few taps, gated by a second projection: the BaseConv layer of Based.

    Args:
        hidden_size: width of input and output; twice that inside.
        kernel_size: taps.
        layer_idx: its layer in the cache.
    """

    def __init__(self, hidden_size: int, kernel_size: int = 3, layer_idx: int = 0):
        super().__init__()
        inner = 2 * hidden_size
        self.kernel_size, self.layer_idx = kernel_size, layer_idx
        self.in_proj = nn.Linear(hidden_size, 2 * inner)
        self.conv = nn.Conv1d(inner, inner, kernel_size, groups=inner, bias=False)
        self.out_proj = nn.Linear(inner, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, cache: Cache | None = None
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, hidden_size)`)
            attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
                0 at pads, over which the taps reach: neighbours are the valid tokens of a row.
            cache: with transformers' layer for convolutions at `layer_idx`.
        """
        projected = self.in_proj(hidden_states)
        if cache is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._mix(projected, attention_mask, cache)
        # in training a layer would keep twice what attention does; what is cheap is computed again
        return checkpoint(self._mix, projected, attention_mask, use_reentrant=False)

    def _mix(
        self, projected: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        """Output for values and gates, of shape `(batch, tokens, 4 * hidden_size)`."""
        value, gate = projected.mT.chunk(2, dim=1)
        tokens = value.shape[-1]
        if cache is not None:
            value = cache.update_conv_state(value.contiguous(), self.layer_idx, conv_kernel_size=self.kernel_size)
        order = None
        if attention_mask is not None:
            past = value.shape[-1] - tokens
            kept = F.pad(attention_mask.bool(), (past, 0), value=True)
            # pads go in front, what came before and the valid tokens follow
            order = kept.int().argsort(dim=1, stable=True)
            value = value.masked_fill(~kept[:, None], 0.0).gather(2, order[:, None].expand_as(value))
            if cache is not None:
                self._keep(cache, value)
        value = self._convolve(value, tokens if order is None else value.shape[-1])
        if order is not None:
            value = value.gather(2, order.argsort(dim=1)[:, None, -tokens:].expand(-1, value.shape[1], -1))
        return self.out_proj((F.silu(value) * gate).mT)

    def _convolve(self, value: torch.Tensor, tokens: int) -> torch.Tensor:
        """The outputs at the last `tokens` of `(batch, channels, at least tokens)`."""
        missing = self.kernel_size - 1 + tokens - value.shape[-1]
        return self.conv(F.pad(value, (missing, 0)) if missing > 0 else value[..., -missing:])

    def _keep(self, cache: Cache, value: torch.Tensor) -> None:
        states = cache.layers[self.layer_idx].conv_states
        taps = states[0].shape[-1]
        states[0].copy_(F.pad(value, (taps, 0))[..., -taps:])
