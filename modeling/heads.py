"""Heads and outputs that the routed architectures share."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple

from .cache_naming import CACHE, NamedCache, cache_argument
from .classification_head import ClassificationHead
from .decoder_backbone import family_of
from .router_loss import attach_loss_hooks


@dataclass
class RoutingFields(NamedCache):
    """What `output_routing=True` adds to an output, and the router's losses.

    Args:
        aux_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
            Weighted router losses of a training pass, as they are added to the loss.
        routing_mask (`torch.BoolTensor` of shape `(batch, seq_len, passes)`, *optional*):
            Which passes each token entered, in the order of `config.routed_passes`.
        router_logits (`torch.FloatTensor` of shape `(batch, seq_len, logits)`, *optional*):
            Router outputs, router by router; NaN where the token was no candidate.
        decision_logits (`torch.FloatTensor` of shape `(batch, seq_len, passes)`, *optional*):
            Expert choice: what the causal rule compares with its thresholds, the outputs of routers or predictors; NaN
            where it was not computed.
    """

    aux_loss: torch.FloatTensor | None = None
    routing_mask: torch.BoolTensor | None = None
    router_logits: torch.FloatTensor | None = None
    decision_logits: torch.FloatTensor | None = None

    @property
    def token_depth(self) -> torch.Tensor | None:
        """Number of passes that each token entered, of shape `(batch, seq_len)`; 0 at pads."""
        return None if self.routing_mask is None else self.routing_mask.sum(dim=-1)


@dataclass
class RoutedModelOutputWithPast(RoutingFields, BaseModelOutputWithPast):
    """A decoder's output with `RoutingFields`."""


@dataclass
class RoutedCausalLMOutputWithPast(RoutingFields, CausalLMOutputWithPast):
    """A causal language model's output with `RoutingFields`."""


@dataclass
class RoutedSequenceClassifierOutputWithPast(RoutingFields, SequenceClassifierOutputWithPast):
    """A classifier's output with `RoutingFields`."""


_COPIED = (CACHE, "hidden_states", "attentions", *(field.name for field in fields(RoutingFields)))


def _routing_fields(outputs: RoutedModelOutputWithPast) -> dict[str, Any]:
    return {name: getattr(outputs, name) for name in _COPIED}


class CausalLMHead:
    """Language model head over a routed `self.model`; mixed into `XForCausalLM`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def _build_head(self, model: nn.Module) -> None:
        config = self.config
        self.model = model
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        attach_loss_hooks(self, model.router_loss_scale)
        self.post_init()

    @cache_argument
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> RoutedCausalLMOutputWithPast:
        """As in every causal language model of transformers, and:

        Args:
            output_routing (`bool`, *optional*): report the routing, see `RoutingFields`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_routing=output_routing,
            adds_router_loss=labels is not None,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept, :])
        finish_logits = family_of(self.config).finish_logits
        if finish_logits is not None:
            logits = finish_logits(self.config, logits)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if outputs.aux_loss is not None:
                loss = loss + outputs.aux_loss.to(loss.device)
        return RoutedCausalLMOutputWithPast(loss=loss, logits=logits, **_routing_fields(outputs))


class RoutedClassificationHead(ClassificationHead):
    """Classification head over a routed `self.model`, whose router losses it adds to its own."""

    def _build_head(self, model: nn.Module) -> None:
        attach_loss_hooks(self, model.router_loss_scale, labels_are_tokens=False)
        super()._build_head(model)

    def _model_arguments(self, labels: torch.Tensor | None) -> dict[str, Any]:
        return {"adds_router_loss": labels is not None}

    def _output(
        self, outputs: RoutedModelOutputWithPast, loss: torch.Tensor | None, logits: torch.Tensor
    ) -> RoutedSequenceClassifierOutputWithPast:
        if loss is not None and outputs.aux_loss is not None:
            loss = loss + outputs.aux_loss.to(loss.device)
        return RoutedSequenceClassifierOutputWithPast(loss=loss, logits=logits, **_routing_fields(outputs))
