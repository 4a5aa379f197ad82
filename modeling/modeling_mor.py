"""Mixture-of-Recursions (MoR, arXiv 2507.10524).

Identical to the backbone's vanilla model except: the layers between prelude and coda form recursive blocks that are
applied up to `num_recursions` times; a router decides per token how deep it goes; the tokens of a recursion are
gathered into a compact batch, and its KV cache slots hold only them.

Different from the official code: selection outside training is causal, pads never compete or enter, the router's
losses do not grow with gradient accumulation, and key and value projections are really skipped when they are shared.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from ..configuration.backbone_config import first_uses
from ..configuration.configuration_mor import MoRConfig, RecursiveBlock
from .attention_context import AttentionContext
from .decoder_backbone import (
    BackbonePreTrainedModel,
    attention_kinds,
    build_layers,
    build_parts,
    check_attention,
    family_of,
    share_key_values,
)
from .depth_cache import SharedKeyValues, adopt_cache, advance
from .generation_guard import RoutedGenerationGuard
from .heads import CausalLMHead, RoutedModelOutputWithPast, SequenceClassificationHead
from .layer_runner import Combine, LayerGroup, LayerRecorder, LayerRunner, Pick
from .remote_code import RemoteCodeMixin, register_class_names
from .router_loss import RouterLossScale, RouterLossTerms, balancing_loss, inject, membership_loss, z_loss
from .token_routing import (
    RouterBank,
    Selection,
    activate,
    apply_gate,
    capacity_counts,
    logit_threshold,
    router_expansion,
    top_k_membership,
    warmed_up,
)


# what modules and parameters follow from, and what may be edited afterwards
BUILT_FIELDS = (
    "backbone", "num_hidden_layers", "num_recursions", "sharing", "prelude_layers", "coda_layers", "routing",
    "router_type", "router_bias", "balancing", "kv_mode", "capacity_warmup_steps",
)  # fmt: skip
EDITABLE_FIELDS = (
    "capacities", "router_thresholds", "inference_rule", "gating", "router_activation", "router_alpha",
    "aux_loss_coef", "router_z_loss_coef", "balancing_coef", "balancing_update_rate",
)  # fmt: skip


class MoRPreTrainedModel(RemoteCodeMixin, BackbonePreTrainedModel):
    config: MoRConfig

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RouterBank):
            module.reset_parameters(self.config.initializer_range)
        elif isinstance(module, MoRModel):
            for name in ("balancing_bias", "routing_step"):
                if hasattr(module, name):
                    init.zeros_(getattr(module, name))
        else:
            super()._init_weights(module)


@dataclass
class RoutingTrace:
    """What a forward pass reports of its routing; nothing unless asked for.

    Attributes:
        depth (`torch.LongTensor` of shape `(batch, seq_len)`): block applications entered so far; `None` if not asked.
        logits: fp32 router outputs of shape `(batch, seq_len, outputs)`, router by router.
    """

    depth: torch.Tensor | None = None
    logits: list[torch.Tensor] = field(default_factory=list)

    def enter(self, active: torch.Tensor) -> None:
        if self.depth is not None:
            self.depth = self.depth + active

    def record(self, logits: torch.Tensor, candidates: torch.Tensor) -> None:
        if self.depth is not None:
            self.logits.append(logits.detach().masked_fill(~candidates.unsqueeze(-1), float("nan")))

    def record_unasked(self, routers: int) -> None:
        """Routers of one output that no token reached."""
        if self.depth is not None:
            shape = (*self.depth.shape, routers)
            self.logits.append(torch.full(shape, float("nan"), device=self.depth.device))


class MoRModel(MoRPreTrainedModel):
    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.embed_tokens, self.norm, self.rotary_emb = build_parts(config)
        self.layers = build_layers(config, first_uses(config.physical_layers))
        self.blocks = [_layer_groups(block, config.num_recursions) for block in config.recursive_blocks]
        if config.routing != "none":
            outputs = 1 if config.routing == "expert_choice" else config.num_recursions
            shape = (config.num_routers, config.hidden_size, outputs, router_expansion(config.router_type))
            self.routers = RouterBank(*shape, bias=config.router_bias)
            if config.inference_rule == "predictor":
                self.predictors = RouterBank(*shape, bias=config.router_bias)
        if config.routing == "token_choice" and config.balancing == "loss_free":
            self.register_buffer("balancing_bias", torch.zeros(len(self.blocks), config.num_recursions))
        if config.capacity_warmup_steps:
            self.register_buffer("routing_step", torch.zeros((), dtype=torch.long))
        if config.kv_mode == "shared":
            share_key_values([self.layers[layer] for block in config.recursive_blocks for layer in block.layers])
        self._keep_in_fp32_modules_strict = {
            name for name in ("routers", "predictors", "balancing_bias") if hasattr(self, name)
        }
        self._built = {name: getattr(config, name) for name in BUILT_FIELDS}
        self._checked: list[Any] = []
        self.router_loss_scale = RouterLossScale()
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def always_active(self) -> list[bool]:
        """Per recursion, whether every token enters it by construction: it is then run and stored densely."""
        config = self.config
        if config.routing == "expert_choice":
            return [capacity == 1 for capacity in config.capacities]
        return [config.routing == "none" or r == 0 for r in range(config.num_recursions)]

    def _partial_slots(self, always_active: list[bool]) -> tuple[list[list[int]], set[int]]:
        """Cache slots that do not hold every token.

        Returns:
            The slots of each block and recursion that only some tokens enter, and the slots that stay empty because
            their layers read those of the first recursion.
        """
        if self.config.kv_mode == "shared":
            return [], {slot for block in self.blocks for group in block[1:] for slot in group.slots}
        groups = [group for block in self.blocks for group in block if not always_active[group.recursion]]
        return [list(group.slots) for group in groups], set()

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_routing: bool = False,
        adds_router_loss: bool = False,
        **kwargs: Any,
    ) -> RoutedModelOutputWithPast:
        """As in every decoder of transformers, but makes no cache in training, and:

        Args:
            output_routing (`bool`, *optional*): return `token_depth` and `router_logits`.
            adds_router_loss (`bool`, *optional*):
                The caller adds `aux_loss` to its loss. Otherwise its gradient is injected here in training.

        Raises:
            ValueError: for inputs, masks and caches that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`.")
        config = self.config
        self._check_config()
        check_attention(config, routed=config.routing != "none")
        if self.training and self.gradient_checkpointing:
            self._check_checkpointing()
            past_key_values = None
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=config)
        always_active = self.always_active
        routed_slots, reading_slots = self._partial_slots(always_active)
        cache = adopt_cache(past_key_values, config, routed_slots, reading_slots)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        scale_embeddings = family_of(config).scale_embeddings
        hidden_states = inputs_embeds
        if scale_embeddings is not None:
            hidden_states = scale_embeddings(config, hidden_states, self.training)
        items = kwargs.pop("num_items_in_batch", None)
        recorder = LayerRecorder(
            hidden_states=[] if _wanted(config, kwargs, "output_hidden_states") else None,
            attentions=[] if _wanted(config, kwargs, "output_attentions") else None,
        )
        kinds = attention_kinds(config)
        stored_partly = {slot for group in routed_slots for slot in group} | reading_slots
        dense_slots = {kind: i for i, kind in reversed(list(enumerate(kinds))) if i not in stored_partly}
        context = AttentionContext(
            config,
            self.rotary_emb,
            hidden_states,
            attention_mask,
            position_ids,
            cache,
            dense_slots,
            reads_dense_keys=bool(reading_slots) and not all(always_active),
        )
        runner = LayerRunner(self.layers, config, context, cache, recorder, kwargs)
        recursion = Recursion(self, runner, always_active, output_routing)
        hidden_states = self.norm(recursion.forward(hidden_states))
        advance(cache, routed_slots, context.seq_len)

        recorder.replace_last(hidden_states)
        aux_loss = recursion.losses.mean(self.router_loss_scale.items if items is None else items)
        if aux_loss is not None and not adds_router_loss and torch.is_grad_enabled():
            hidden_states = inject(hidden_states, aux_loss, self.router_loss_scale)
        trace = recursion.trace
        return RoutedModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=None if recorder.hidden_states is None else tuple(recorder.hidden_states),
            attentions=None if recorder.attentions is None else tuple(recorder.attentions),
            aux_loss=aux_loss,
            token_depth=trace.depth,
            router_logits=torch.cat(trace.logits, dim=-1) if trace.logits else None,
        )

    def _check_config(self) -> None:
        """Fields may be edited on a built model, unless it was built by them; an edit is checked before it is used.

        Raises:
            ValueError: for a field that the model was built by, and for a value that is not allowed.
        """
        config = self.config
        current = [getattr(config, name) for name in (*BUILT_FIELDS, *EDITABLE_FIELDS)]
        if torch.compiler.is_compiling() or current == self._checked:
            return
        for name, built in self._built.items():
            if getattr(config, name) != built:
                raise ValueError(
                    f"`config.{name}` is {getattr(config, name)!r}, but the model was built with {built!r}; set it "
                    "before the model is made."
                )
        if config.inference_rule == "predictor" and not hasattr(self, "predictors"):
            raise ValueError(
                "`config.inference_rule` is 'predictor', but the model was built without predictors; set it before "
                "the model is made, and train it."
            )
        config.validate_mor()
        self._checked = current

    def _check_checkpointing(self) -> None:
        """Raises a `ValueError` where gradient checkpointing would lose a gradient."""
        checkpoint = getattr(self, "_gradient_checkpointing_func", None)
        if self.config.kv_mode == "shared" and getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
            raise ValueError(
                "kv_mode is 'shared' and gradient checkpointing is reentrant, which cannot carry the gradient of the "
                "shared keys and values; pass gradient_checkpointing_kwargs={'use_reentrant': False}."
            )


def _layer_groups(block: RecursiveBlock, recursions: int) -> list[LayerGroup]:
    """The layers and cache slots of each recursion of a block."""
    width = len(block.layers)
    starts = [block.start + r * width for r in range(recursions)]
    return [LayerGroup(block.layers, tuple(range(s, s + width)), r) for r, s in enumerate(starts)]


class Recursion:
    """One forward pass through prelude, recursive blocks and coda."""

    def __init__(self, model: MoRModel, runner: LayerRunner, always_active: list[bool], output_routing: bool):
        self.model = model
        self.config = model.config
        self.runner = runner
        self.context = runner.context
        self.always_active = always_active
        warming = model.training and self.config.capacity_warmup_steps > 0
        self.step = int(model.routing_step) if warming else self.config.capacity_warmup_steps
        valid = self.context.valid
        self.trace = RoutingTrace(torch.zeros_like(valid, dtype=torch.long) if output_routing else None)
        self.losses = RouterLossTerms(valid)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, seq_len, hidden_size)` -> the same, before the final norm."""
        config = self.config
        prelude = tuple(range(config.prelude_layers))
        coda = range(config.coda_layers)
        self.runner.recorder.state(hidden_states)
        hidden_states = self.runner.run_dense(LayerGroup(prelude, prelude), hidden_states)
        run_block = self._token_choice if config.routing == "token_choice" else self._expert_choice
        for number, block in enumerate(self.model.blocks):
            hidden_states = run_block(number, block, hidden_states)
        first_layer = config.num_physical_layers - config.coda_layers
        first_slot = config.num_hidden_layers - config.coda_layers
        group = LayerGroup(tuple(first_layer + i for i in coda), tuple(first_slot + i for i in coda))
        hidden_states = self.runner.run_dense(group, hidden_states)
        if self.model.training and config.capacity_warmup_steps:
            self.model.routing_step.add_(1)
        return hidden_states

    def _expert_choice(self, number: int, block: list[LayerGroup], hidden_states: torch.Tensor) -> torch.Tensor:
        """Recursions with hierarchical filtering: only tokens that entered one compete for the next (section 2.2.1).

        `routing="none"` is the case without routers.
        """
        config = self.config
        shared = self._new_shared()
        active = self.context.valid
        selection: Selection | None = None
        for r, group in enumerate(block):
            combine: Combine | None = None
            if config.routing == "expert_choice":
                router = number * len(block) + r
                logits = self._candidate_logits(self.model.routers, router, hidden_states, selection)
                self.trace.record(logits.unsqueeze(-1), active)
                active = self._decide(router, r, logits, hidden_states, active, selection)
                combine = self._gated_by(
                    hidden_states, activate(logits, config.router_activation, config.router_alpha)
                )
            ended, selection, hidden_states = self._recur(group, active, hidden_states, combine, shared)
            if ended:
                self.runner.skip(sum(len(skipped.slots) for skipped in block[r:]), hidden_states)
                self.trace.record_unasked(len(block) - r - 1)
                break
        return hidden_states

    def _decide(
        self,
        router: int,
        r: int,
        logits: torch.Tensor,
        hidden_states: torch.Tensor,
        candidates: torch.Tensor,
        selection: Selection | None,
    ) -> torch.Tensor:
        """Which candidates enter recursion r; collects the losses that teach the causal rule in training."""
        config, training = self.config, self.model.training
        by_predictor = config.inference_rule == "predictor"
        causal_logits = logits
        if by_predictor and (training or not self.always_active[r]):
            causal_logits = self._candidate_logits(self.model.predictors, router, hidden_states.detach(), selection)
        if self.always_active[r]:
            active = candidates
        elif training or config.inference_rule == "topk":
            capacity = config.capacities[r]
            if training:
                capacity = warmed_up(capacity, self.step, config.capacity_warmup_steps)
            active = top_k_membership(logits, candidates, capacity_counts(capacity, self.context.valid))
        else:
            active = candidates & (causal_logits >= logit_threshold(config.router_thresholds[r]))
        if training:
            self.losses.add(membership_loss(causal_logits, active), candidates, config.aux_loss_coef)
            self.losses.add(z_loss(logits.unsqueeze(-1)), candidates, config.router_z_loss_coef)
        return active

    def _token_choice(self, number: int, block: list[LayerGroup], hidden_states: torch.Tensor) -> torch.Tensor:
        """Every token chooses its depth at the block's entry and is gated once, where it leaves (section 2.2.1).

        As in the official code, the states in between are not gated (equation 2.2 of the paper gates each).
        """
        config, valid = self.config, self.context.valid
        entry = hidden_states
        logits = self.model.routers(entry, number).to(entry.device)
        self.trace.record(logits, valid)
        probabilities = activate(logits, config.router_activation, 1.0)
        loss_free = config.balancing == "loss_free"
        choice = (probabilities + self.model.balancing_bias[number] if loss_free else probabilities).argmax(dim=-1)
        gate = config.router_alpha * probabilities.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
        if self.model.training:
            self.losses.add(z_loss(logits), valid, config.router_z_loss_coef)
            if loss_free:
                self._move_balancing_bias(number, choice)
            else:
                self.losses.add(balancing_loss(probabilities, choice, valid), valid, config.balancing_coef)
        shared = self._new_shared()
        leave = self._gated_by(entry, gate)
        for r, group in enumerate(block):
            here = (choice == r).unsqueeze(-1)

            def combine(update: torch.Tensor, pick: Pick, here: torch.Tensor = here) -> torch.Tensor:
                return torch.where(pick(here), leave(update, pick), update)

            ended, _, hidden_states = self._recur(group, valid & (choice >= r), hidden_states, combine, shared)
            if ended:
                self.runner.skip(sum(len(skipped.slots) for skipped in block[r:]), hidden_states)
                break
        return hidden_states

    def _recur(
        self,
        group: LayerGroup,
        active: torch.Tensor,
        hidden_states: torch.Tensor,
        combine: Combine | None,
        shared: SharedKeyValues | None,
    ) -> tuple[bool, Selection | None, torch.Tensor]:
        """Applies one recursion of a block to the active tokens.

        Returns:
            Whether no token entered, so that the block ends; the selection, `None` where all tokens were computed; and
            the new stream.
        """
        selection = None
        if self.always_active[group.recursion]:
            hidden_states = self.runner.run_dense(group, hidden_states, combine, shared)
        elif self.context.is_static:
            hidden_states = self.runner.run_masked(group, hidden_states, active, combine, shared)
        else:
            selection = Selection.from_mask(active)
            if selection is None:
                return True, None, hidden_states
            hidden_states = self.runner.run_selected(group, hidden_states, selection, combine, shared)
        self.trace.enter(active)
        return False, selection, hidden_states

    def _candidate_logits(
        self, bank: RouterBank, router: int, hidden_states: torch.Tensor, selection: Selection | None
    ) -> torch.Tensor:
        """fp32 logits of shape `(batch, seq_len)`, computed for the candidates only; 0 elsewhere."""
        if selection is None:
            return bank(hidden_states, router).squeeze(-1).to(hidden_states.device)
        logits = bank(selection.gather(hidden_states), router).squeeze(-1).to(hidden_states.device)
        return selection.scatter(logits.new_zeros(self.context.valid.shape), logits)

    def _gated_by(self, residual: torch.Tensor, gate: torch.Tensor) -> Combine:
        gating = self.config.gating
        return lambda update, pick: apply_gate(gating, pick(residual), update, pick(gate))

    def _new_shared(self) -> SharedKeyValues | None:
        return SharedKeyValues(self.runner.cache) if self.config.kv_mode == "shared" else None

    @torch.no_grad()
    def _move_balancing_bias(self, number: int, choice: torch.Tensor) -> None:
        """b_i += u sign(mean load - load_i), over all ranks (paper, section 3.2; loss-free balancing)."""
        load = torch.bincount(choice[self.context.valid], minlength=self.config.num_recursions).float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        bias = self.model.balancing_bias[number]
        bias.add_(self.config.balancing_update_rate * (load.mean() - load).sign())


def _wanted(config: MoRConfig, kwargs: dict[str, Any], name: str) -> bool:
    asked = kwargs.pop(name, None)
    return bool(getattr(config, name, False) if asked is None else asked)


class MoRForCausalLM(RoutedGenerationGuard, CausalLMHead, MoRPreTrainedModel, GenerationMixin):
    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self._build_head(MoRModel(config))


class MoRForSequenceClassification(SequenceClassificationHead, MoRPreTrainedModel):
    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self._build_head(MoRModel(config))


MoRPreTrainedModel.remote_classes = {
    "AutoConfig": MoRConfig,
    "AutoModel": MoRModel,
    "AutoModelForCausalLM": MoRForCausalLM,
    "AutoModelForSequenceClassification": MoRForSequenceClassification,
}
register_class_names("mor", MoRPreTrainedModel.remote_classes)
