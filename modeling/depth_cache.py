"""KV cache layers that hold only the tokens that got there, inside transformers' own `Cache`.

`adopt_cache` replaces the routed slots of the stock cache that `generate` made. What the layers of one routed group
(a block at one recursion) have in common, the columns and lengths of its rows, is kept once in a `DepthIndex`. For
each forward pass the model makes a small view, and hands it to the decoder layers as their cache: attention modules
stay unmodified and only call its `update`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, QuantizedLayer, StaticLayer
from transformers.configuration_utils import PreTrainedConfig

from .token_routing import Selection


@dataclass
class DepthIndex:
    """Which columns the rows of a routed group hold.

    Attributes:
        seen (`int`): tokens of the stream so far, pads and exited ones included.
        columns (`torch.LongTensor` of shape `(batch, capacity)`): ascending per row; `None` before the first token.
        lengths (`list[int]`): stored tokens per row.
    """

    seen: int = 0
    columns: torch.Tensor | None = None
    lengths: list[int] = field(default_factory=list)

    def reserve(self, selection: Selection, columns: torch.Tensor) -> "WritePlan":
        """Makes room for the selected tokens and tells every layer of the group where they go.

        Args:
            selection: the entering tokens.
            columns (`torch.LongTensor` of shape `(seq_len,)`): columns of the chunk.
        """
        batch_size, k = len(selection.counts), selection.index.shape[1]
        device = columns.device
        if not self.lengths:
            self.lengths = [0] * batch_size
        before = self.lengths
        rows = [row for row, count in enumerate(selection.counts) if count]
        needed = max(before[row] for row in rows) + k
        if self.columns is None or self.columns.shape[1] < needed:
            self.columns = grown(self.columns, needed, 1, (batch_size, 0), torch.long, device)
        uniform = len({before[row] for row in rows}) == 1
        if uniform:
            start = before[rows[0]]
            where: slice | torch.Tensor = slice(start, start + k)
        else:
            starts = torch.tensor([before[row] for row in rows], device=device)
            where = starts[:, None] + torch.arange(k, device=device)
        new_columns = selection.pick_columns(columns)
        self.lengths = [length + count for length, count in zip(before, selection.counts, strict=True)]
        kv_length = max(self.lengths[row] for row in rows)
        whole = selection.all_rows
        if whole and uniform:
            self.columns[:, where] = new_columns
        else:
            at = where if not uniform else torch.arange(where.start, where.stop, device=device).expand(len(rows), -1)
            self.columns[selection.rows[:, None], at] = new_columns
            where = at
        key_columns = (self.columns if whole else self.columns[selection.rows])[:, :kv_length]
        return WritePlan(
            rows=None if whole else selection.rows,
            where=where,
            capacity=self.columns.shape[1],
            kv_length=kv_length,
            key_columns=key_columns,
            lengths=[self.lengths[row] for row in rows],
        )

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` columns of the stream."""
        self.seen -= tokens
        if self.columns is not None:
            stored = self.columns.new_tensor(self.lengths)
            slots = torch.arange(self.columns.shape[1], device=self.columns.device)
            kept = (slots < stored[:, None]) & (self.columns < self.seen)
            self.lengths = kept.sum(dim=1).tolist()

    def select_rows(self, rows: torch.Tensor) -> None:
        if self.columns is not None:
            self.columns = self.columns[rows.to(self.columns.device)]
            self.lengths = [self.lengths[row] for row in rows.tolist()]

    def reset(self) -> None:
        self.seen, self.columns, self.lengths = 0, None, []


@dataclass
class WritePlan:
    """Where the tokens of one call go in each layer of the group, and what comes back.

    Attributes:
        rows: batch rows, `None` for all.
        where: a slice of the buffer, or its indices of shape `(rows, k)`.
        capacity: length of the buffer.
        kv_length: number of keys that come back.
        key_columns (`torch.LongTensor` of shape `(rows, kv_length)`)
        lengths: keys of each row.
    """

    rows: torch.Tensor | None
    where: Any
    capacity: int
    kv_length: int
    key_columns: torch.Tensor
    lengths: list[int]

    @property
    def key_valid(self) -> torch.Tensor | None:
        """Which keys are there, of shape `(rows, kv_length)`; `None` if all are."""
        if min(self.lengths) == self.kv_length:
            return None
        device = self.key_columns.device
        ends = torch.tensor(self.lengths, device=device)
        return torch.arange(self.kv_length, device=device) < ends[:, None]


class DepthLayer(CacheLayerMixin):
    """Keys and values of the tokens that entered one layer at one recursion, of shape `(batch, heads, capacity, dim)`.

    Args:
        index: the group's index, shared with the other layers of the group.
        owner: this layer passes crop, reorder and reset on to the index; one layer per group does.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, index: DepthIndex, owner: bool):
        super().__init__()
        self.index = index
        self.owner = owner

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, plan: WritePlan, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new states of shape `(rows, heads, k, dim)`; returns `(rows, heads, kv_length, dim)`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        self.keys = self._write(self.keys, key_states, plan)
        self.values = self._write(self.values, value_states, plan)
        return self._read(self.keys, plan), self._read(self.values, plan)

    def _write(self, buffer: torch.Tensor | None, states: torch.Tensor, plan: WritePlan) -> torch.Tensor:
        if buffer is None or buffer.shape[2] < plan.capacity:
            batch_size = len(self.index.lengths)
            shape = (batch_size, states.shape[1], 0, states.shape[3])
            buffer = grown(buffer, plan.capacity, 2, shape, states.dtype, states.device, exact=True)
        if isinstance(plan.where, slice):
            buffer[:, :, plan.where] = states
        else:
            rows = plan.rows if plan.rows is not None else torch.arange(states.shape[0])
            at = rows.to(states.device)[:, None], slice(None), plan.where.to(states.device)
            buffer[at] = states.transpose(1, 2)
        return buffer

    def _read(self, buffer: torch.Tensor, plan: WritePlan) -> torch.Tensor:
        stored = buffer[:, :, : plan.kv_length]
        return stored if plan.rows is None else stored[plan.rows.to(stored.device)]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.index.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of the stream so far, not those stored: this is what positions and masks are counted from."""
        return self.index.seen

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        if self.owner:
            self.index.reset()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"`crop` got {tokens_to_remove}, but takes zero or the negative number of tokens to remove."
            )
        if self.owner and tokens_to_remove < 0:
            self.index.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch_size = self.keys.shape[0] if self.is_initialized else len(self.index.lengths) if self.owner else 0
        if batch_size:
            self.batch_select_indices(torch.arange(batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys = self.keys[indices.to(self.keys.device)]
            self.values = self.values[indices.to(self.values.device)]
        if self.owner:
            self.index.select_rows(indices)


@dataclass
class ActiveFlags:
    """Which columns of a static routed group hold a token that entered, of shape `(batch, max_cache_len)`."""

    flags: torch.Tensor | None = None

    def write(self, columns: torch.Tensor, active: torch.Tensor, length: int) -> torch.Tensor:
        """Notes which of the new tokens entered; returns the flags of all columns."""
        if self.flags is None:
            self.flags = torch.zeros((active.shape[0], length), dtype=torch.bool, device=active.device)
        return self.flags.index_copy_(1, columns, active)


class StaticDepthLayer(StaticLayer):
    """A full-length static layer for a routed slot: every token is stored, the flags say which ones entered.

    The static mode saves neither compute nor memory; it exists for static shapes (full-graph compile, export).

    Args:
        max_cache_len: columns of the buffer.
        active: the group's flags, shared by its layers.
        owner: this layer passes reorder and reset on to the flags; one layer per group does.
    """

    def __init__(self, max_cache_len: int, active: ActiveFlags, owner: bool):
        super().__init__(max_cache_len)
        self.active = active
        self.owner = owner

    def flag(self, columns: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        return self.active.write(columns, active, self.max_cache_len)

    def reset(self) -> None:
        super().reset()
        if self.owner and self.active.flags is not None:
            self.active.flags.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.owner and self.active.flags is not None:
            self.active.flags.copy_(self.active.flags[beam_idx.to(self.active.flags.device)])


class ReadingLayer(CacheLayerMixin):
    """Stands in a slot whose layer reads the keys and values of the first recursion: it stores nothing."""

    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise RuntimeError("this slot reads the keys and values of the first recursion and must not be written.")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("this slot reads the keys and values of the first recursion and must not be written.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        pass

    def batch_repeat_interleave(self, repeats: int) -> None:
        pass

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        pass


class SlotView:
    """Maps a shared layer's own index to its slot at the current recursion.

    Args:
        cache: the adopted cache.
        offset: slots between the layer's first use and the current recursion.
        plan: for routed slots, where the tokens go.
    """

    def __init__(self, cache: Cache, offset: int, plan: WritePlan | None = None):
        self.cache = cache
        self.offset = offset
        self.kwargs = {} if plan is None else {"plan": plan}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache.update(key_states, value_states, layer_idx + self.offset, **self.kwargs)


class SharedKeyValues:
    """Keys and values of the first recursion, written once and read by the deeper ones (paper, section 2.2.2).

    Works without a cache too: the states of this forward pass are kept here in any case.
    """

    reads = False

    def __init__(self, cache: Cache | None):
        self.cache = cache
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cache is not None:
            key_states, value_states = self.cache.update(key_states, value_states, layer_idx)
        self.states[layer_idx] = key_states, value_states
        return key_states, value_states


class SharedReader:
    """Returns what the first recursion wrote, for the rows of a selection; ignores what it is given."""

    reads = True

    def __init__(self, shared: SharedKeyValues, rows: torch.Tensor | None):
        self.shared = shared
        self.rows = rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.shared.states[layer_idx]
        if self.rows is None:
            return keys, values
        rows = self.rows.to(keys.device)
        return keys[rows], values[rows]


def adopt_cache(cache: Cache | None, config: PreTrainedConfig, groups: list[list[int]], reading: set[int]) -> None:
    """Prepares a stock cache for a routed model, in place: routed slots get layers that hold rows of unequal length.

    Args:
        cache: a fresh `DynamicCache` or `StaticCache`, or one that has been adopted before.
        config: the flat configuration; `num_hidden_layers` is the number of slots.
        groups: the slots of each routed group.
        reading: slots that stay empty because their layers read those of the first recursion.

    Raises:
        ValueError: for a quantized cache, and for one filled by another model.
    """
    if cache is None or getattr(cache, "_adopted_groups", None) == groups:
        return
    if any(isinstance(layer, QuantizedLayer) for layer in cache.layers):
        raise ValueError(
            "`cache` is a quantized cache, which cannot hold rows of unequal length; use the default cache "
            "or cache_implementation='static'."
        )
    seen = int(cache.get_seq_length())
    if seen > 0:
        raise ValueError(
            f"`cache` has already seen {seen} tokens, but was not filled by this model: it does not "
            "know at which depths they are stored; start with an empty cache."
        )
    if cache.layer_class_to_replicate is not None:
        cache.layers = DynamicCache(config=config).layers
        cache.layer_class_to_replicate = None
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(
            f"`cache` has {len(cache.layers)} layers, but the model needs one for each of its "
            f"{config.num_hidden_layers} unrolled layers; build the cache from the model's own config."
        )
    for group in groups:
        if cache.is_compileable:
            length = _stream_length(cache)
            active = ActiveFlags()
            replaced: list[CacheLayerMixin] = [StaticDepthLayer(length, active, slot == group[0]) for slot in group]
        else:
            index = DepthIndex()
            replaced = [DepthLayer(index, slot == group[0]) for slot in group]
        for slot, layer in zip(group, replaced, strict=True):
            cache.layers[slot] = layer
    for slot in reading:
        cache.layers[slot] = ReadingLayer()
    cache._adopted_groups = groups


def _stream_length(cache: Cache) -> int:
    """Columns of a static cache: sliding layers, which know only their window, do not tell."""
    lengths = [layer.get_max_length() for layer in cache.layers if not getattr(layer, "is_sliding", False)]
    length = getattr(cache, "stream_length", max(lengths, default=None))
    if length is None:
        raise ValueError(
            "`cache` is a static cache whose layers all slide, so that its length is unknown; let "
            "`generate` make it with cache_implementation='static', or set `cache.stream_length`."
        )
    return length


def advance(cache: Cache | None, groups: list[list[int]], tokens: int) -> None:
    """Counts `tokens` more tokens of the stream for every routed group, whether or not any of them entered."""
    if cache is None or cache.is_compileable:
        return
    for group in groups:
        cache.layers[group[0]].index.seen += tokens


def cache_bytes(cache: Cache) -> dict[str, int]:
    """Bytes of keys and values: `stored` for tokens that are there, `padding` for pads of ragged rows and free room.

    Pads that dense layers store, as vanilla models do, count as stored.
    """
    stored = allocated = 0
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None or not layer.is_initialized:
            continue
        for states in (layer.keys, layer.values):
            size = states.numel() * states.element_size()
            allocated += size
            if isinstance(layer, DepthLayer):
                stored += size // (states.shape[0] * states.shape[2]) * sum(layer.index.lengths)
            elif isinstance(layer, StaticLayer):
                stored += size // states.shape[2] * min(int(layer.cumulative_length), states.shape[2])
            else:
                stored += size
    return {"stored": stored, "padding": allocated - stored}


def grown(
    buffer: torch.Tensor | None,
    length: int,
    dim: int,
    empty: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    exact: bool = False,
) -> torch.Tensor:
    """`buffer` with at least `length` entries along `dim`; grows at most twofold, so that appending stays linear."""
    old = torch.empty(empty, dtype=dtype, device=device) if buffer is None else buffer
    new_length = length if exact else max(length, min(2 * old.shape[dim], 2 * length - 1))
    shape = list(old.shape)
    shape[dim] = new_length - old.shape[dim]
    return torch.cat([old, old.new_zeros(shape)], dim=dim)
