"""The cache of a prefix linear attention layer: a state of constant size that can be rolled back.

`generate` and users make transformers' own caches; at the first forward pass `adopt_state_layers` puts this layer in
the place of transformers' linear attention layer, which needs a convolution, counts no tokens and cannot be rolled
back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from .feature_maps import FeatureMap
from .prefix_linear_attention import prefix_linear_attention


class Tokens(NamedTuple):
    """What a layer reads of new tokens: the arguments of `prefix_linear_attention`."""

    key: torch.Tensor
    value: torch.Tensor
    attention_mask: torch.Tensor | None
    prefix: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
    feature_map: str | FeatureMap

    def read(self, state: torch.Tensor | None, first: int) -> torch.Tensor:
        """The state after the prefix and the first tokens."""
        prefix_key, prefix_value, prefix_mask = self.prefix
        key, value = self.key[:, :, :first], self.value[:, :, :first]
        mask = None if self.attention_mask is None else self.attention_mask[:, :first]
        _, state = prefix_linear_attention(
            key,
            key,
            value,
            prefix_key,
            prefix_value,
            attention_mask=mask,
            prefix_mask=prefix_mask,
            state=state,
            feature_map=self.feature_map,
        )
        return state

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Tokens":
        """All tensors through a function of their batch dimension or device."""

        def of(tensor: torch.Tensor | None) -> Any:
            return None if tensor is None else function(tensor)

        key, value, mask, prefix, feature_map = self
        return Tokens(of(key), of(value), of(mask), tuple(of(t) for t in prefix), feature_map)  # type: ignore[arg-type]


class PrefixStateLayer(CacheLayerMixin):
    """
    Attributes:
        state (`torch.Tensor` of shape `(batch, heads, features, value_dim + 1)`):
            The state after all tokens seen; `None` before the first one.
        prefix_lengths (`torch.LongTensor` of shape `(batch,)`): tokens of each row's prefix.
        planned_mask (`torch.BoolTensor` of shape `(batch, prompt tokens)`):
            The prefix to read, where the first call sees more than the prompt.
        seen: columns seen, pads included.
        record_past: keep the keys and values since the last `crop`, so that it can undo them.
    """

    is_compileable = True
    is_sliding = False
    supports_early_init = False
    _tensors = ("state", "prefix_lengths", "planned_mask", "_base")

    def __init__(self, **kwargs: Any):
        super().__init__()
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.state: torch.Tensor | None = None
        self.prefix_lengths: torch.Tensor | None = None
        self.planned_mask: torch.Tensor | None = None
        self.seen = 0
        self._forget()
        self.is_initialized = False

    def _forget(self) -> None:
        """The state becomes what a rollback starts from."""
        self._base = self.state if self.record_past else None
        self._past: list[Tokens] = []

    def advance(self, state: torch.Tensor, tokens: Tokens, prefix_lengths: torch.Tensor) -> None:
        """Takes the state after new tokens."""
        if not self.is_initialized:
            self.is_initialized, self.device, self.dtype = True, state.device, state.dtype
            self.prefix_lengths = prefix_lengths
        if self.record_past:
            self._past.append(tokens)
        self.state = state
        self.seen += tokens.key.shape[2]

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
        removed, recorded = abs(tokens_to_remove), sum(tokens.key.shape[2] for tokens in self._past)
        if removed and not (tokens_to_remove < 0 and removed <= recorded):
            raise RuntimeError(
                f"`crop({tokens_to_remove})` was called, but a state of linear attention can only undo tokens that it "
                f"recorded, which are {recorded}; call `activate_past_recording` before they are seen, and pass their "
                "number as a negative one."
            )
        if removed:
            kept, self.state = recorded - removed, self._base
            for tokens in self._past:
                self.state = tokens.read(self.state, first=kept)
                kept -= min(kept, tokens.key.shape[2])
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

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in self._tensors:
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))
        self._past = [tokens.map(function) for tokens in self._past]

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


def adopt_state_layers(cache: Cache | None, config: PreTrainedConfig) -> Cache | None:
    """Puts `PrefixStateLayer`s where `config.layer_types` says `linear_attention`, in place.

    Raises:
        ValueError: for a cache that was made for another model.
    """
    if cache is None:
        return None
    if not cache.layers and isinstance(cache, DynamicCache):
        # made without a configuration
        cache.layers = DynamicCache(config=config).layers
    layer_types = config.layer_types
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


def known_lengths(
    cache: Cache | None, prefix_length: int | torch.Tensor | None, encoder_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Lengths of the prefix that a cache has read, of shape `(batch,)`.

    Raises:
        ValueError: for another prefix.
    """
    if encoder_mask is not None:
        raise ValueError("`encoder_mask` was given with a cache that has read its prefix; leave it out.")
    layers = state_layers(cache)
    known = layers[0].prefix_lengths if layers else None
    if prefix_length is None or known is None or torch.compiler.is_compiling():
        return known
    given = torch.as_tensor(prefix_length, device=known.device)
    if given.ndim and given.shape != known.shape or not bool((given == known).all()):
        raise ValueError(
            f"`prefix_length` is {given.tolist()}, but the cache has read a prefix of {known.tolist()} tokens; leave "
            "it out."
        )
    return known


def state_layers(cache: Cache | None) -> list[PrefixStateLayer]:
    """The layers of linear attention."""
    return [layer for layer in (() if cache is None else cache.layers) if isinstance(layer, PrefixStateLayer)]


def seen_columns(cache: Cache | None) -> int:
    """Columns that a cache has seen, pads included."""
    if cache is None:
        return 0
    return max([0] + [layer.get_seq_length() for layer in cache.layers if isinstance(layer, CacheLayerMixin)])
