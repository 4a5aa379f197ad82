"""Sequence classification on the last token, for every architecture."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from .cache_naming import CACHE, cache_argument


class ClassificationHead:
    """Mixed into `XForSequenceClassification`: a head on the last token that is not padding."""

    # the loss is a mean over the rows of the call: Trainer divides it by the accumulation steps
    accepts_loss_kwargs = False

    def _build_head(self, model: nn.Module) -> None:
        self.model = model
        self.num_labels = self.config.num_labels
        self.score = nn.Linear(self.config.hidden_size, self.num_labels, bias=False)
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
        **kwargs: Any,
    ) -> ModelOutput:
        """As in every sequence classifier of transformers; `labels` has shape `(batch,)` or `(batch, num_labels)`.

        Raises:
            ValueError: for a batch of several rows without a way to tell their last tokens.
        """
        kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **self._model_arguments(labels),
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        last = self._last_tokens(input_ids, attention_mask, logits)
        pooled_logits = logits[torch.arange(logits.shape[0], device=logits.device), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled_logits, config=self.config)
        return self._output(outputs, loss, pooled_logits)

    def _model_arguments(self, labels: torch.Tensor | None) -> dict[str, Any]:
        """What the base model takes beyond the usual."""
        return {}

    def _output(self, outputs: Any, loss: torch.Tensor | None, logits: torch.Tensor) -> ModelOutput:
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.cache},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_tokens(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, logits: torch.Tensor
    ) -> torch.Tensor | int:
        if input_ids is not None and self.config.pad_token_id is not None:
            present = input_ids != self.config.pad_token_id
        elif attention_mask is not None and attention_mask.ndim == 2:
            present = attention_mask[:, -logits.shape[1] :].bool()
        elif input_ids is not None and logits.shape[0] > 1:
            raise ValueError(
                f"the batch has {logits.shape[0]} rows, but neither `config.pad_token_id` nor a 2D `attention_mask` "
                "tells where they end; give one of them."
            )
        else:
            return -1
        positions = torch.arange(logits.shape[1], device=logits.device)
        return (positions * present.to(logits.device)).argmax(dim=-1)
