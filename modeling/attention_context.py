"""Masks, columns and rotary embeddings of one forward pass, for dense layers and for gathered tokens.

A column is the index of a token in the stream that the cache has seen, pads included. Causality and windows go by
column; rotary embeddings alone go by `position_ids`.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .cache_naming import CACHE
from .decoder_backbone import attention_kinds, rotary_embeddings, window_of
from .token_routing import Selection


class AttentionContext:
    """What every layer of one forward pass needs to attend.

    Args:
        config: the flat configuration.
        rotary: the family's rotary embedding module.
        hidden_states (`torch.Tensor` of shape `(batch, seq_len, hidden_size)`): the embedded tokens.
        attention_mask: `None`, 2D of shape `(batch, seen + seq_len)` with 0 at pads, or 4D (bool, or additive float)
            of shape `(batch, 1, seq_len, seen + seq_len)`.
        position_ids (`torch.LongTensor` of shape `(batch or 1, seq_len)`, *optional*)
        cache: the adopted cache, or `None`.
        dense_slots: by attention kind, the first cache slot in which every token is stored.
        reads_dense_keys: selected tokens will attend to the keys of dense slots.
        keeps_step: layers run even if no token enters them, see `ranks_keep_step`.

    Attributes:
        columns (`torch.LongTensor` of shape `(seq_len,)`): columns of the new tokens.
        valid (`torch.BoolTensor` of shape `(batch, seq_len)`): False at pads.
        all_valid (`bool`): no token is a pad, now or before.

    Raises:
        ValueError: for a mask of another shape.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        rotary: torch.nn.Module,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        dense_slots: dict[str, int],
        reads_dense_keys: bool,
        keeps_step: bool = False,
    ):
        self.config = config
        self.keeps_step = keeps_step
        self.batch_size, self.seq_len = hidden_states.shape[:2]
        self.hidden_states = hidden_states
        self.cache = cache
        self.is_static = cache is not None and cache.is_compileable
        self.seen = cache.get_seq_length() if cache is not None else 0
        self.columns = torch.arange(self.seq_len, device=hidden_states.device) + self.seen
        self.documents = self._find_documents(position_ids, attention_mask)
        self.position_ids = self.columns.unsqueeze(0) if position_ids is None else position_ids
        self.attention_mask = attention_mask
        self._check_mask()
        self.kinds = attention_kinds(config)
        self.rotary = rotary_embeddings(rotary, hidden_states, self.position_ids, set(self.kinds))
        self.padding = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if self.padding is None:
            self.valid = hidden_states.new_ones((self.batch_size, self.seq_len), dtype=torch.bool)
            self.all_valid = True
        else:
            self.valid = self.padding.index_select(1, self.columns).bool()
            self.all_valid = False if self.is_static else bool(self.padding.all())
        # made before any layer has written to the cache, whose length they are sized by
        slots = dense_slots.items()
        self._dense_masks = {kind: self._make_dense_mask(kind, slot, explicit=False) for kind, slot in slots}
        self._selection_of_all: Selection | None = None
        self._explicit_masks: dict[str, torch.Tensor] = {}
        if reads_dense_keys and not self.is_static:
            self._explicit_masks = {kind: self._make_dense_mask(kind, slot, explicit=True) for kind, slot in slots}

    def _check_mask(self) -> None:
        mask = self.attention_mask
        if mask is None:
            return
        if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
            raise ValueError(
                f"`attention_mask` is {_shape_of(mask)}, but must be a tensor of shape (batch, columns) or "
                "(batch, 1, tokens, columns)."
            )
        if mask.ndim == 4 and (mask.shape[1] != 1 or mask.shape[2] != self.seq_len):
            raise ValueError(
                f"`attention_mask` is {_shape_of(mask)}, but a 4D mask must have shape "
                f"(batch, 1, {self.seq_len}, columns): one mask for all heads, one row for each new token."
            )
        if mask.ndim == 2 and not self.is_static and mask.shape[1] != self.seen + self.seq_len:
            raise ValueError(
                f"`attention_mask` has {mask.shape[1]} columns, but the cache has seen {self.seen} tokens and "
                f"{self.seq_len} are new; give one column for each of the {self.seen + self.seq_len}."
            )

    def _find_documents(self, position_ids: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Document of each token in packed rows, which transformers marks by positions that restart."""
        if position_ids is None or mask is not None or self.cache is not None or self.seq_len == 1:
            return None
        restarts = position_ids.diff(dim=1) != 1
        if not bool(restarts.any()):
            return None
        return torch.nn.functional.pad(restarts.cumsum(1), (1, 0)).expand(self.batch_size, -1)

    def first_tokens(self, count: int) -> torch.Tensor | None:
        """Which new tokens are among the first `count` of their row or document, of shape `(batch, seq_len)`.

        `None` where it is known that none is.
        """
        if not self.is_static and self.seen >= count:
            past = self.padding[:, : self.seen] if self.padding is not None else None
            if past is None or bool((past.sum(dim=1) >= count).all()):
                return None
        if self.documents is not None:
            starts = torch.nn.functional.pad(self.documents.diff(dim=1), (1, 0), value=1).bool()
            columns = self.columns.expand_as(self.documents)
            place = columns - columns.masked_fill(~starts, 0).cummax(dim=1).values
        elif self.padding is not None:
            place = (self.padding.cumsum(dim=1) - 1).index_select(1, self.columns)
        else:
            place = self.columns.expand(self.batch_size, -1)
        return self.valid & (place < count)

    def _make_dense_mask(self, kind: str, slot: int, explicit: bool) -> torch.Tensor | None:
        make: Any = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
        return make(
            config=self.config,
            inputs_embeds=self.hidden_states,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            layer_idx=slot,
            allow_is_causal_skip=not explicit,
            **{CACHE: self.cache},
        )

    def dense_mask(self, kind: str) -> torch.Tensor | None:
        """The mask of a layer that every token enters, as the vanilla model makes it."""
        return self._dense_masks[kind]

    def select(self, active: torch.Tensor) -> Selection | None:
        """The selection of the tokens where `active`, of shape `(batch, seq_len)`, is True.

        `None` for none, unless the ranks keep in step: then one token stands in.

        The one place where routing waits for the device: work can only be skipped once the counts are known.
        """
        counts = [int(active)] if active.numel() == 1 else active.sum(dim=1).tolist()
        if not any(counts):
            return Selection.of_none(self.batch_size, active.device) if self.keeps_step else None
        if min(counts) < self.seq_len:
            return Selection.of_some(active, counts)
        if self._selection_of_all is None:
            self._selection_of_all = Selection.of_all(self.batch_size, self.seq_len, active.device)
        return self._selection_of_all

    def selected_rotary(self, kind: str, selection: Selection) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines at the selected tokens, each of shape `(rows, k, rotary_dim)`."""
        cos, sin = self.rotary[kind]
        if selection.full:
            return cos, sin
        cos, sin = (selection.gather(part.expand(self.batch_size, -1, -1)) for part in (cos, sin))
        return cos, sin

    def selected_rows(self, kind: str, selection: Selection) -> torch.Tensor:
        """The dense mask's rows of the selected tokens, of shape `(rows, 1, k, keys)`."""
        mask = self._explicit_masks[kind]
        mask = mask.expand(self.batch_size, *mask.shape[1:])
        return selection.gather(mask.squeeze(1)).unsqueeze(1)

    def routed_mask(
        self,
        kind: str,
        rows: torch.Tensor,
        query_columns: torch.Tensor,
        key_columns: torch.Tensor,
        key_valid: torch.Tensor | None,
        sees_itself: bool = False,
    ) -> torch.Tensor | None:
        """Mask among tokens of one routed group: causal by column, within the window and the document.

        Args:
            kind: attention kind of the layer.
            rows (`torch.LongTensor` of shape `(rows,)`): batch rows.
            query_columns (`torch.LongTensor` of shape `(rows, k)`)
            key_columns (`torch.LongTensor` of shape `(rows, keys)`): ascending; the last ones are the queries'.
            key_valid (`torch.BoolTensor` of shape `(rows, keys)`): `None` if all keys are.
            sees_itself: every query sees its own key, also if that is not valid for others.

        Returns:
            `None` where `sdpa` needs no mask to be exact; else of shape `(rows, 1, k, keys)`, bool for `sdpa` and
            additive for `eager`.
        """
        window = window_of(self.config, kind)
        eager = self.config._attn_implementation in (None, "eager")
        plain = key_valid is None and self.all_valid and self.documents is None and self.attention_mask_4d is None
        if window is not None:
            plain = plain and not self.is_static and self.seen + self.seq_len <= window
        aligned = query_columns.shape[1] in (1, key_columns.shape[1])
        if plain and aligned and not eager:
            return None
        allowed = key_columns[:, None, :] <= query_columns[:, :, None]
        if window is not None:
            allowed = allowed & (key_columns[:, None, :] > query_columns[:, :, None] - window)
        if key_valid is not None:
            allowed = allowed & key_valid[:, None, :]
            if sees_itself:
                allowed = allowed | (key_columns[:, None, :] == query_columns[:, :, None])
        if self.padding is not None and not self.all_valid:
            allowed = allowed & self._visible(rows, key_columns)[:, None, :]
        if self.documents is not None:
            documents = self.documents[rows]
            allowed = allowed & (
                documents.gather(1, query_columns)[:, :, None] == documents.gather(1, key_columns)[:, None]
            )
        if self.attention_mask_4d is not None:
            given = self.attention_mask_4d[rows]
            index = query_columns - self.seen
            given = given.gather(1, index[..., None].expand(-1, -1, given.shape[-1]))
            allowed = allowed & given.gather(2, key_columns[:, None, :].expand(-1, index.shape[1], -1))
        allowed = allowed.unsqueeze(1)
        if not eager:
            return allowed
        dtype = self.hidden_states.dtype
        zero = torch.zeros((), dtype=dtype, device=allowed.device)
        return torch.where(allowed, zero, torch.finfo(dtype).min)

    def _visible(self, rows: torch.Tensor, key_columns: torch.Tensor) -> torch.Tensor:
        """A token that entered can be masked later: generate takes a generated pad token for padding."""
        padding = self.padding.bool()
        if padding.shape[1] < key_columns.shape[1]:
            padding = torch.nn.functional.pad(padding, (0, key_columns.shape[1] - padding.shape[1]))
        return padding[rows].gather(1, key_columns.clamp(max=padding.shape[1] - 1))

    @property
    def attention_mask_4d(self) -> torch.Tensor | None:
        """The user's own 4D mask as booleans of shape `(batch, seq_len, columns)`."""
        mask = self.attention_mask
        if mask is None or mask.ndim != 4:
            return None
        mask = mask[:, 0].expand(self.batch_size, -1, -1)
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _shape_of(value: Any) -> str:
    return (
        f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    )
