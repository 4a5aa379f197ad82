"""Runs a group of decoder layers for all tokens, for gathered tokens, or masked in static shapes.

An architecture only says which layers run for which tokens; everything that this takes (gathering, masks, rotary
embeddings, cache views, what is recorded on request) is done here, once for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from .attention_context import AttentionContext
from .depth_cache import DepthLayer, SharedKeyValues, SharedReader, SlotView, WritePlan
from .token_routing import Selection


# picks the entries of the entering tokens from a tensor of shape (batch, seq_len, ...)
Pick = Callable[[torch.Tensor], torch.Tensor]
# makes the new stream from the layers' output and a pick
Combine = Callable[[torch.Tensor, Pick], torch.Tensor]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that the same tokens pass.

    Attributes:
        layers: physical layers, in order.
        slots: their unrolled indices, which are their cache slots.
        recursion: 0 at the layers' first use.
    """

    layers: tuple[int, ...]
    slots: tuple[int, ...]
    recursion: int = 0


@dataclass
class LayerRecorder:
    """Hidden states and attention weights of every unrolled layer at full length; each `None` if not asked for."""

    hidden_states: list[torch.Tensor] | None = None
    attentions: list[torch.Tensor] | None = None

    def state(self, hidden_states: torch.Tensor) -> None:
        if self.hidden_states is not None:
            self.hidden_states.append(hidden_states)

    def replace_last(self, hidden_states: torch.Tensor) -> None:
        if self.hidden_states:
            self.hidden_states[-1] = hidden_states


def _everything(tokens: torch.Tensor) -> torch.Tensor:
    return tokens


class LayerRunner:
    """Runs layer groups within one forward pass.

    Args:
        layers: the physical layers.
        config: the flat configuration.
        context: masks, columns and rotary embeddings of the pass.
        cache: the adopted cache, or `None`.
        recorder: what to record.
        layer_kwargs: the caller's further arguments, passed on to every layer.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        config: PreTrainedConfig,
        context: AttentionContext,
        cache: Cache | None,
        recorder: LayerRecorder,
        layer_kwargs: dict[str, Any],
    ):
        self.layers = layers
        self.config = config
        self.context = context
        self.cache = cache
        self.recorder = recorder
        self.layer_kwargs = layer_kwargs

    def run_dense(
        self,
        group: LayerGroup,
        hidden_states: torch.Tensor,
        combine: Combine | None = None,
        shared: SharedKeyValues | None = None,
    ) -> torch.Tensor:
        """Every token passes, pads included, exactly as in the vanilla model.

        Args:
            group: the layers.
            hidden_states (`torch.Tensor` of shape `(batch, seq_len, hidden_size)`)
            combine: applied to the output; by default the output replaces the stream.
            shared: keys and values that the recursions share: written at recursion 0, read later.
        """
        update = hidden_states
        view = self._view(group, None, shared, None)
        for layer, slot in zip(group.layers, group.slots, strict=True):
            kind = self.context.kinds[slot]
            update = self._call(
                layer,
                slot,
                update,
                self.context.dense_mask(kind),
                self.context.rotary[kind],
                view,
                _everything,
                position_ids=self.context.position_ids,
            )
            self.recorder.state(update)
        if combine is not None:
            update = combine(update, _everything)
            self.recorder.replace_last(update)
        return update

    def run_selected(
        self,
        group: LayerGroup,
        hidden_states: torch.Tensor,
        selection: Selection,
        combine: Combine,
        shared: SharedKeyValues | None = None,
    ) -> torch.Tensor:
        """Only the selected tokens pass; the others cost and store nothing.

        Args:
            selection: the entering tokens.
            combine: makes the selected tokens' new stream from the output and a pick of the selected tokens.
            shared: as in `run_dense`.
        """
        context = self.context
        query_columns = context.columns[selection.index]
        plan = None
        if shared is None and self.cache is not None:
            slot_layer = self.cache.layers[group.slots[0]]
            assert isinstance(slot_layer, DepthLayer)
            plan = slot_layer.index.reserve(selection, context.columns)
        view = self._view(group, plan, shared, None if selection.all_rows else selection.rows)
        masks: dict[str, tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor]]] = {}
        update = selection.gather(hidden_states)
        for layer, slot in zip(group.layers, group.slots, strict=True):
            kind = context.kinds[slot]
            if kind not in masks:
                if shared is not None:
                    mask = context.dense_mask(kind) if selection.full else context.selected_rows(kind, selection)
                elif plan is not None:
                    mask = context.routed_mask(kind, selection.rows, query_columns, plan.key_columns, plan.key_valid)
                else:
                    mask = context.routed_mask(kind, selection.rows, query_columns, query_columns, selection.valid)
                masks[kind] = mask, context.selected_rotary(kind, selection)
            mask, rotary = masks[kind]
            place = self._attention_place(selection, plan, shared is not None)
            update = self._call(layer, slot, update, mask, rotary, view, place)
            self.recorder.state(selection.scatter(hidden_states, update) if self.recorder.hidden_states else update)
        result = selection.scatter(hidden_states, combine(update, selection.gather))
        self.recorder.replace_last(result)
        return result

    def run_masked(
        self,
        group: LayerGroup,
        hidden_states: torch.Tensor,
        active: torch.Tensor,
        combine: Combine,
        shared: SharedKeyValues | None = None,
    ) -> torch.Tensor:
        """Every token passes in static shapes, but only the active ones change and are seen by others.

        Args:
            active (`torch.BoolTensor` of shape `(batch, seq_len)`): the entering tokens.
        """
        context = self.context
        key_valid = None
        if shared is None:
            key_valid = self.cache.layers[group.slots[0]].flag(context.columns, active)
            rows = torch.arange(context.batch_size, device=active.device)
            query_columns = context.columns.expand(context.batch_size, -1)
            key_columns = torch.arange(key_valid.shape[1], device=active.device).expand(context.batch_size, -1)
        view = self._view(group, None, shared, None)
        update = hidden_states
        entered = active.unsqueeze(-1)
        for layer, slot in zip(group.layers, group.slots, strict=True):
            kind = context.kinds[slot]
            if shared is None:
                mask = context.routed_mask(kind, rows, query_columns, key_columns, key_valid)
            else:
                mask = context.dense_mask(kind)
            update = self._call(layer, slot, update, mask, context.rotary[kind], view, _everything)
            self.recorder.state(torch.where(entered, update, hidden_states))
        result = torch.where(entered, combine(update, _everything).to(hidden_states.dtype), hidden_states)
        self.recorder.replace_last(result)
        return result

    def skip(self, slots: int, hidden_states: torch.Tensor) -> None:
        """Records `slots` layers that no token entered."""
        for _ in range(slots):
            self.recorder.state(hidden_states)
            if self.recorder.attentions is not None:
                shape = (self.context.batch_size, self.config.num_attention_heads, self.context.seq_len, self._total)
                self.recorder.attentions.append(hidden_states.new_zeros(shape))

    @property
    def _total(self) -> int:
        return int(self.context.seen) + self.context.seq_len

    def _view(
        self, group: LayerGroup, plan: WritePlan | None, shared: SharedKeyValues | None, rows: torch.Tensor | None
    ) -> Any:
        if shared is not None:
            return shared if group.recursion == 0 else SharedReader(shared, rows)
        if self.cache is None or (group.recursion == 0 and plan is None):
            return self.cache
        return SlotView(self.cache, group.recursion * len(group.layers), plan)

    def _call(
        self,
        layer: int,
        slot: int,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        view: Any,
        place: Pick,
        **kwargs: Any,
    ) -> torch.Tensor:
        module = self.layers[layer]
        key = "shared_kv" if isinstance(view, SharedKeyValues | SharedReader) else "past_key_values"
        kwargs[key] = view
        hook = None
        if self.recorder.attentions is not None:
            store = self.recorder.attentions
            hook = module.self_attn.register_forward_hook(
                lambda _, args, output: store.append(None if output[1] is None else place(output[1]))
            )
        if self.cache is not None and self.cache.offloading:
            # transformers prefetches the next slot only, which may not be the next one that runs
            self.cache.layers[slot].prefetch()
        try:
            output = module(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **kwargs,
                **self.layer_kwargs,
            )
            return output.to(hidden_states.device)
        finally:
            if hook is not None:
                hook.remove()

    def _attention_place(self, selection: Selection, plan: WritePlan | None, dense_keys: bool) -> Pick:
        """Puts compact attention weights, of shape `(rows, heads, k, keys)`, to their queries and keys."""
        context = self.context

        def place(weights: torch.Tensor) -> torch.Tensor:
            full = weights.new_zeros(context.batch_size, weights.shape[1], context.seq_len, self._total)
            key_columns = context.columns[selection.index] if plan is None else plan.key_columns
            for i, row in enumerate(selection.rows.tolist()):
                count = selection.counts[row]
                queries = selection.index[i, :count]
                if dense_keys:
                    full[row, :, queries, -weights.shape[-1] :] = weights[i, :, :count]
                    continue
                stored = count if plan is None else plan.lengths[i]
                columns = key_columns[i, :stored]
                full[row, :, queries[:, None], columns] = weights[i, :, :count, :stored]
            return full

        return place
