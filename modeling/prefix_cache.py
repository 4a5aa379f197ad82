"""The cache of a prefix linear attention layer: a state of constant size that can be rolled back.

`generate` and users make transformers' own caches; at the first forward pass `adopt_state_layers` puts this layer in
the place of transformers' linear attention layer, which needs a convolution, counts no tokens and cannot be rolled
back.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .feature_maps import FeatureMap
from .prefix_linear_attention import prefix_linear_attention


class PrefixStateLayer(CacheLayerMixin):
    """
    Attributes:
        state (`torch.Tensor` of shape `(batch, heads, features, value_dim + 1)`):
            The state after all tokens seen; `None` before the first one.
        prefix_lengths (`torch.LongTensor` of shape `(batch,)`): tokens of each row's prefix.
        seen: columns seen, pads included.
        record_past: keep the keys and values since the last `crop`, so that it can undo them.
    """

    is_compileable = True
    is_sliding = False
    supports_early_init = False
    _tensors = ("state", "prefix_lengths", "_base")

    def __init__(self, **kwargs: Any):
        super().__init__()
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.state: torch.Tensor | None = None
        self.prefix_lengths: torch.Tensor | None = None
        self.seen = 0
        self._forget()
        self.is_initialized = False

    def _forget(self) -> None:
        """The state becomes what a rollback starts from."""
        self._base = self.state if self.record_past else None
        self._past: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def advance(
        self,
        state: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        prefix_lengths: torch.Tensor | None,
        feature_map: str | FeatureMap,
    ) -> None:
        """Takes the state after new tokens, whose keys and values have shape `(batch, heads, tokens, size)`."""
        if not self.is_initialized:
            self.is_initialized, self.device, self.dtype = True, state.device, state.dtype
            self.prefix_lengths = prefix_lengths
            # the prefix stays in the state: it cannot be undone
            self.state = state
            self._forget()
        elif self.record_past:
            self._past.append((key, value, attention_mask))
            self._feature_map = feature_map
        self.state = state
        self.seen += key.shape[2]

    def activate_past_recording(self) -> None:
        self.record_past = True
        self._forget()

    @property
    def is_croppable(self) -> bool:
        return self.record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Undoes the last `-tokens_to_remove` tokens seen since the last call.

        Raises:
            RuntimeError: if they were not recorded.
        """
        removed = abs(tokens_to_remove)
        recorded = sum(key.shape[2] for key, _, _ in self._past)
        if removed and not (self.record_past and tokens_to_remove < 0 and removed <= recorded):
            raise RuntimeError(
                f"`crop({tokens_to_remove})` was called, but a state of linear attention can only undo tokens that it "
                f"recorded, which are {recorded if self.record_past else 0}; call `activate_past_recording` before "
                "they are seen, and pass their number as a negative one."
            )
        if removed:
            kept = recorded - removed
            self.state = self._base
            for key, value, mask in self._past:
                tokens = min(kept, key.shape[2])
                kept -= tokens
                if tokens:
                    key, value = key[:, :, :tokens], value[:, :, :tokens]
                    mask = None if mask is None else mask[:, :tokens]
                    _, self.state = prefix_linear_attention(
                        key, key, value, attention_mask=mask, state=self.state, feature_map=self._feature_map
                    )
            self.seen -= removed
        self._forget()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("the state of linear attention is made by its first forward pass.")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a linear attention layer keeps a state instead of keys and values; use `advance`.")

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def _map(self, function: Any) -> None:
        for name in self._tensors:
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))
        self._past = [tuple(t if t is None else function(t) for t in tensors) for tensors in self._past]  # type: ignore[misc]

    def offload(self) -> None:
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda tensor: tensor[indices])


def adopt_state_layers(cache: Cache | None, layer_types: list[str]) -> Cache | None:
    """Puts `PrefixStateLayer`s where `layer_types` says `linear_attention`, in place.

    Raises:
        ValueError: for a cache that was made for another model.
    """
    if cache is None:
        return None
    if len(cache.layers) != len(layer_types):
        raise ValueError(
            f"the cache has {len(cache.layers)} layers, but the model needs one of its own kind for each of its "
            f"{len(layer_types)} layers; make it with `DynamicCache(config=model.config)`."
        )
    for index, kind in enumerate(layer_types):
        if kind == "linear_attention" and not isinstance(cache.layers[index], PrefixStateLayer):
            recording = getattr(cache.layers[index], "record_past", False)
            cache.layers[index] = PrefixStateLayer()
            if recording:
                cache.layers[index].activate_past_recording()
    return cache


def state_layer_of(cache: Cache | None) -> PrefixStateLayer | None:
    """The first state layer that has seen a token."""
    layers = () if cache is None else cache.layers
    return next((layer for layer in layers if isinstance(layer, PrefixStateLayer) and layer.is_initialized), None)


def seen_columns(cache: Cache | None) -> int:
    """Columns that a cache has seen, pads included."""
    if cache is None:
        return 0
    counting = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    return max((int(layer.get_seq_length()) for layer in counting), default=0)
