"""The forward pass of all architectures with per-token depth; each adds which layers run under which router."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from ..configuration.routed_config import RoutedConfig, RoutedPass
from .attention_context import AttentionContext
from .cache_naming import CACHE, cache_argument
from .decoder_backbone import (
    BackbonePreTrainedModel,
    attention_kinds,
    build_layers,
    build_parts,
    check_attention,
    family_of,
)
from .depth_cache import adopt_cache, advance
from .expert_choice import RoutingTrace
from .expert_load import watch_experts
from .heads import RoutedModelOutputWithPast
from .layer_runner import LayerRecorder, LayerRunner
from .process_ranks import ranks_keep_step
from .remote_code import RemoteCodeMixin
from .router_loss import RouterLossScale, RouterLossTerms, inject
from .token_routing import RouterBank


class RoutedForward:
    """One forward pass through the layers; an architecture adds `run`.

    Args:
        model: the model.
        runner: runs its layers.
        passes: `config.routed_passes`, as they are in this forward pass.
        output_routing: report depths and router logits.
    """

    def __init__(self, model: "RoutedModel", runner: LayerRunner, passes: list[RoutedPass], output_routing: bool):
        self.model = model
        self.config = model.config
        self.runner = runner
        self.context = runner.context
        self.passes = passes
        warming = model.training and self.config.capacity_warmup_steps > 0
        self.step = int(model.routing_step) if warming else self.config.capacity_warmup_steps
        valid = self.context.valid
        outputs = self.config.num_recursions if self.config.routing == "token_choice" else 1
        self.trace = RoutingTrace(output_routing, valid, len(passes), self.config.num_routers, outputs)
        self.losses = RouterLossTerms(valid)

    def run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, seq_len, hidden_size)` -> the same, before the final norm."""
        raise NotImplementedError


class RoutedPreTrainedModel(RemoteCodeMixin, BackbonePreTrainedModel):
    config: RoutedConfig

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RouterBank):
            module.reset_parameters(self.config.initializer_range)
        elif isinstance(module, RoutedModel):
            for name, value in module.initial_buffers.items():
                init.constant_(getattr(module, name), value)
        else:
            super()._init_weights(module)


class RoutedModel:
    """Mixed into the base model of an architecture: a decoder whose tokens take different ways through its layers.

    Attributes:
        forward_class: the architecture's `RoutedForward`.
        built_fields: fields of the configuration that modules and parameters follow from.
        editable_fields: routing fields that may be edited on a built model.
        initial_buffers: value at which each buffer of the routing starts.
    """

    forward_class: type[RoutedForward]
    built_fields: tuple[str, ...]
    editable_fields: tuple[str, ...]

    def _begin_build(self, config: RoutedConfig, first_use: dict[int, int]) -> None:
        self.embed_tokens, self.norm, self.rotary_emb = build_parts(config)
        self.layers = build_layers(config, first_use)
        self.initial_buffers: dict[str, float] = {}
        if config.capacity_warmup_steps:
            self._keep("routing_step", torch.zeros((), dtype=torch.long), 0)

    def _build_routers(self, outputs: int, inner_size: int, predictor_inner_size: int) -> None:
        config = self.config
        shape = config.num_routers, config.hidden_size, outputs
        self.routers = RouterBank(*shape, inner_size, bias=config.router_bias)
        if config.inference_rule == "predictor":
            self.predictors = RouterBank(*shape, predictor_inner_size, bias=config.router_bias)

    def _keep(self, name: str, buffer: torch.Tensor, value: float) -> None:
        self.register_buffer(name, buffer.fill_(value))
        self.initial_buffers[name] = value

    def _end_build(self) -> None:
        fp32 = ["routers", "predictors", *(name for name in self.initial_buffers if name != "routing_step")]
        self._keep_in_fp32_modules_strict = {name for name in fp32 if hasattr(self, name)}
        self._built = {name: getattr(self.config, name) for name in self.built_fields}
        self._checked: list[Any] = []
        self.router_loss_scale = RouterLossScale()
        self.gradient_checkpointing = False
        self.post_init()

    @cache_argument
    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_routing: bool = False,
        adds_router_loss: bool = False,
        **kwargs: Any,
    ) -> RoutedModelOutputWithPast:
        """As in every decoder of transformers, but makes no cache in training, and:

        Args:
            output_routing (`bool`, *optional*): report the routing, see `RoutingFields`.
            adds_router_loss (`bool`, *optional*):
                The caller adds `aux_loss` to its loss. Otherwise its gradient is injected here in training.

        Raises:
            ValueError: for inputs, masks and caches that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`.")
        config = self.config
        self._check_config()
        passes = config.routed_passes
        check_attention(config, routed=not all(p.always or p.unit == "mlp" for p in passes))
        if self.training and self.gradient_checkpointing:
            self._check_checkpointing()
            cache = None
        if use_cache and cache is None and not self.training:
            cache = DynamicCache(config=config)
        routed_slots = [list(p.slots) for p in passes if p.stores_partly]
        reading_slots = {slot for p in passes if not p.writes_kv for slot in p.slots}
        adopt_cache(cache, config, routed_slots, reading_slots)
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
        stored_partly = {slot for group in routed_slots for slot in group} | reading_slots
        kinds = reversed(list(enumerate(attention_kinds(config))))
        context = AttentionContext(
            config,
            self.rotary_emb,
            hidden_states,
            attention_mask,
            position_ids,
            cache,
            dense_slots={kind: slot for slot, kind in kinds if slot not in stored_partly},
            reads_dense_keys=any(not p.writes_kv and not p.always for p in passes),
            keeps_step=ranks_keep_step(self.layers, self.training),
        )
        runner = LayerRunner(self.layers, config, context, cache, recorder, kwargs)
        routing = self.forward_class(self, runner, passes, output_routing)
        with watch_experts(self, runner, routing.losses):
            hidden_states = self.norm(routing.run(hidden_states))
        advance(cache, routed_slots, context.seq_len)
        if self.training and config.capacity_warmup_steps:
            self.routing_step.add_(1)

        recorder.replace_last(hidden_states)
        aux_loss = routing.losses.mean(self.router_loss_scale.items if items is None else items)
        if aux_loss is not None and not adds_router_loss and torch.is_grad_enabled():
            hidden_states = inject(hidden_states, aux_loss, self.router_loss_scale)
        trace = routing.trace
        return RoutedModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=None if recorder.hidden_states is None else tuple(recorder.hidden_states),
            attentions=None if recorder.attentions is None else tuple(recorder.attentions),
            aux_loss=aux_loss,
            routing_mask=trace.mask,
            router_logits=None if trace.router_logits is None else trace.router_logits.flatten(-2),
            decision_logits=trace.decision_logits,
            **{CACHE: cache if use_cache else None},
        )

    def _check_config(self) -> None:
        """Fields may be edited on a built model, unless it was built by them; an edit is checked before it is used.

        Raises:
            ValueError: for a field that the model was built by, and for a value that is not allowed.
        """
        config = self.config
        current = [getattr(config, name) for name in (*self.built_fields, *self.editable_fields)]
        if torch.compiler.is_compiling() or current == self._checked:
            return
        for name, built in self._built.items():
            if getattr(config, name) != built:
                raise ValueError(
                    f"`config.{name}` is {getattr(config, name)!r}, but the model was built with {built!r}; set it "
                    "before the model is made."
                )
        config.validate_routing()
        for rule, needed in (("predictor", "predictors"), ("ema_threshold", "threshold_ema")):
            if config.inference_rule == rule and not hasattr(self, needed):
                raise ValueError(
                    f"`config.inference_rule` is {rule!r}, but the model was built without {needed}; set it before "
                    "the model is made, and train it."
                )
        self._checked = current

    def _check_checkpointing(self) -> None:
        """Raises a `ValueError` where gradient checkpointing would lose a gradient."""
        checkpoint = getattr(self, "_gradient_checkpointing_func", None)
        if not getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
            return
        passes = self.config.routed_passes
        for lost, what in (
            (any(not p.writes_kv for p in passes), "kv_mode is 'shared'"),
            (any(p.unit != "block" for p in passes), "a part of a layer is routed"),
            (family_of(self.config).num_experts is not None, "the MLPs are mixtures of experts"),
        ):
            if lost:
                raise ValueError(
                    f"{what} and gradient checkpointing is reentrant, which cannot carry the gradient of what passes "
                    "beside the hidden states; pass gradient_checkpointing_kwargs={'use_reentrant': False}."
                )


def _wanted(config: RoutedConfig, kwargs: dict[str, Any], name: str) -> bool:
    asked = kwargs.pop(name, None)
    return bool(getattr(config, name, False) if asked is None else asked)
