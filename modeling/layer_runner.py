"""Runs a group of decoder layers for all tokens, for gathered tokens, or masked in static shapes.

An architecture only says which layers run for which tokens; everything that this takes (gathering, masks, rotary
embeddings, cache views, what is recorded on request) is done here, once for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from .attention_context import AttentionContext
from .cache_naming import CACHE
from .depth_cache import DepthLayer, SharedKeyValues, SharedReader, SlotView, WritePlan
from .module_mixins import RoutedPart
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
        layer_kwargs: further arguments of the layers.
    """

    layers: tuple[int, ...]
    slots: tuple[int, ...]
    recursion: int = 0
    layer_kwargs: dict[str, Any] = field(default_factory=dict)


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


AttentionInputs = tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Attending:
    """How the tokens of one call attend.

    Attributes:
        view: what the layers get for their cache.
        inputs: attention kind -> mask, and cosines and sines.
        place: puts attention weights to their queries and keys.
        layer_kwargs: further arguments of the layers.
        is_empty: no token attends.
    """

    view: Any
    inputs: Callable[[str], AttentionInputs]
    place: Pick = _everything
    layer_kwargs: dict[str, Any] = field(default_factory=dict)
    is_empty: bool = False


class LayerRunner:
    """Runs layer groups within one forward pass.

    Args:
        layers: the physical layers.
        config: the flat configuration.
        context: masks, columns and rotary embeddings of the pass.
        cache: the adopted cache, or `None`.
        recorder: what to record.
        layer_kwargs: the caller's further arguments, passed on to every layer.

    Attributes:
        mlp_tokens (`torch.BoolTensor`): which of the tokens that the MLP is computing count; `None` for all.
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
        self.mlp_tokens: torch.Tensor | None = context.valid

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
        attending = self._dense_attention(group, shared)
        for layer, slot in zip(group.layers, group.slots, strict=True):
            update = self._call(layer, slot, update, attending, **group.layer_kwargs)
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
        update = selection.gather(hidden_states)
        self.mlp_tokens = selection.valid
        attending = self._selected_attention(group, selection, shared)
        for layer, slot in zip(group.layers, group.slots, strict=True):
            update = self._call(layer, slot, update, attending, **group.layer_kwargs)
            self.recorder.state(selection.scatter(hidden_states, update) if self.recorder.hidden_states else update)
        self.mlp_tokens = self.context.valid
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
        """Every token is computed, but only the active ones are seen by others: static shapes, and masked training.

        Args:
            active (`torch.BoolTensor` of shape `(batch, seq_len)`): the entering tokens.
            combine: makes the new stream of all tokens; those that are not active must come out as they were.
        """
        update = hidden_states
        entered = active.unsqueeze(-1)
        self.mlp_tokens = active
        attending = self._masked_attention(group, active, shared)
        for layer, slot in zip(group.layers, group.slots, strict=True):
            update = self._call(layer, slot, update, attending, **group.layer_kwargs)
            self.recorder.state(torch.where(entered, update, hidden_states))
        self.mlp_tokens = self.context.valid
        result = combine(update, _everything)
        self.recorder.replace_last(result)
        return result

    def run_part(self, group: LayerGroup, hidden_states: torch.Tensor, part: RoutedPart) -> torch.Tensor:
        """Every token passes, but only those that enter `part` pass the attention, or the MLP, of the layers."""
        if part.unit == "mlp" or part.active is None:
            attending = self._dense_attention(group, None)
        elif part.computes_all:
            attending = self._masked_attention(group, part.active, None)
        elif part.selection is not None:
            attending = self._selected_attention(group, part.selection, None)
        else:
            attending = Attending(None, lambda kind: (None, self.context.rotary[kind]), is_empty=True)
        if part.unit == "mlp" and part.active is not None:
            self.mlp_tokens = part.active if part.selection is None else part.selection.valid
        for layer, slot in zip(group.layers, group.slots, strict=True):
            hidden_states = self._call(layer, slot, hidden_states, attending, routed=part)
            self.recorder.state(hidden_states)
        self.mlp_tokens = self.context.valid
        return hidden_states

    def skip(self, slots: int, hidden_states: torch.Tensor) -> None:
        """Records `slots` layers that no token entered."""
        for _ in range(slots):
            self.recorder.state(hidden_states)
            if self.recorder.attentions is not None:
                self.recorder.attentions.append(self._no_attention(hidden_states))

    def _dense_attention(self, group: LayerGroup, shared: SharedKeyValues | None) -> Attending:
        context = self.context
        return Attending(
            self._view(group, None, shared, None),
            lambda kind: (context.dense_mask(kind), context.rotary[kind]),
            layer_kwargs={"position_ids": context.position_ids},
        )

    def _selected_attention(
        self, group: LayerGroup, selection: Selection, shared: SharedKeyValues | None
    ) -> Attending:
        context = self.context
        query_columns = selection.pick_columns(context.columns)
        plan = None
        if shared is None and self.cache is not None and not selection.stands_in:
            slot_layer = self.cache.layers[group.slots[0]]
            assert isinstance(slot_layer, DepthLayer)
            plan = slot_layer.index.reserve(selection, context.columns)
        inputs: dict[str, AttentionInputs] = {}

        def inputs_of(kind: str) -> AttentionInputs:
            if kind not in inputs:
                if shared is not None:
                    mask = context.dense_mask(kind) if selection.full else context.selected_rows(kind, selection)
                elif plan is not None:
                    mask = context.routed_mask(kind, selection.rows, query_columns, plan.key_columns, plan.key_valid)
                else:
                    mask = context.routed_mask(
                        kind,
                        selection.rows,
                        query_columns,
                        query_columns,
                        selection.valid,
                        sees_itself=selection.stands_in,
                    )
                inputs[kind] = mask, context.selected_rotary(kind, selection)
            return inputs[kind]

        view = None
        if shared is not None or plan is not None:
            view = self._view(group, plan, shared, None if selection.all_rows else selection.rows)
        return Attending(view, inputs_of, self._attention_place(selection, plan, shared is not None))

    def _masked_attention(self, group: LayerGroup, active: torch.Tensor, shared: SharedKeyValues | None) -> Attending:
        context = self.context
        view = self._view(group, None, shared, None)
        if shared is not None:
            return Attending(view, lambda kind: (context.dense_mask(kind), context.rotary[kind]))
        rows = torch.arange(context.batch_size, device=active.device)
        query_columns = key_columns = context.columns.expand(context.batch_size, -1)
        key_valid = active
        if self.cache is not None:
            key_valid = self.cache.layers[group.slots[0]].flag(context.columns, active)
            key_columns = torch.arange(key_valid.shape[1], device=active.device).expand(context.batch_size, -1)

        def inputs_of(kind: str) -> AttentionInputs:
            mask = context.routed_mask(kind, rows, query_columns, key_columns, key_valid, sees_itself=True)
            return mask, context.rotary[kind]

        return Attending(view, inputs_of)

    def _view(
        self, group: LayerGroup, plan: WritePlan | None, shared: SharedKeyValues | None, rows: torch.Tensor | None
    ) -> Any:
        if shared is not None:
            return shared if group.recursion == 0 else SharedReader(shared, rows)
        if self.cache is None or (group.recursion == 0 and plan is None):
            return self.cache
        return SlotView(self.cache, group.recursion * len(group.layers), plan)

    def _call(
        self, layer: int, slot: int, hidden_states: torch.Tensor, attending: Attending, **kwargs: Any
    ) -> torch.Tensor:
        module = self.layers[layer]
        view = attending.view
        kwargs["shared_kv" if isinstance(view, SharedKeyValues | SharedReader) else CACHE] = view
        mask, rotary = attending.inputs(self.context.kinds[slot])
        hook = None
        if self.recorder.attentions is not None:
            store = self.recorder.attentions

            def record(_: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor | None]) -> None:
                weights = self._no_attention(output[0]) if attending.is_empty else output[1]
                store.append(None if weights is None else attending.place(weights))

            hook = module.self_attn.register_forward_hook(record)
        if self.cache is not None and self.cache.offloading:
            # transformers prefetches the next slot only, which may not be the next one that runs
            self.cache.layers[slot].prefetch()
        try:
            output = module(
                hidden_states,
                attention_mask=mask,
                position_embeddings=rotary,
                **kwargs,
                **attending.layer_kwargs,
                **self.layer_kwargs,
            )
            return output.to(hidden_states.device)
        finally:
            if hook is not None:
                hook.remove()

    def _no_attention(self, like: torch.Tensor) -> torch.Tensor:
        """Attention weights of a layer that no token entered."""
        total = int(self.context.seen) + self.context.seq_len
        return like.new_zeros(self.context.batch_size, self.config.num_attention_heads, self.context.seq_len, total)

    def _attention_place(self, selection: Selection, plan: WritePlan | None, dense_keys: bool) -> Pick:
        """Puts compact attention weights, of shape `(rows, heads, k, keys)`, to their queries and keys."""
        context = self.context

        def place(weights: torch.Tensor) -> torch.Tensor:
            total = int(context.seen) + context.seq_len
            full = weights.new_zeros(context.batch_size, weights.shape[1], context.seq_len, total)
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
