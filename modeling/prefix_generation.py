"""What `generate` must know of a prefix: it is that of the prompt, whatever is generated behind it."""

import functools
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from .cache_naming import CACHE
from .generation_guard import GenerationGuard
from .prefix_cache import known_lengths, seen_columns, state_layers
from .prefix_tokens import Prefix, find_prefix


class PrefixGeneration(GenerationGuard):
    """Mixed into `XForCausalLM` of a model that reads a prefix; `generate` itself is transformers' own."""

    # a state can be rolled back, see `PrefixStateLayer.crop`
    _is_stateful = False

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.config.short_prompt == "iterate":
            if model_kwargs.get(CACHE) is not None:
                raise ValueError("`short_prompt` is 'iterate', which reads all tokens again; pass no cache.")
            generation_config.use_cache = model_kwargs["use_cache"] = False
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                "cache_implementation is 'quantized', which cannot hold recurrent states; use the default cache."
            )
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get(CACHE) is not None:
            self.model.adopt_cache(model_kwargs[CACHE])
        return result

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """A prefix is read as a whole: the first chunk of a chunked prefill holds all of it."""
        seen = seen_columns(model_kwargs.get(CACHE))
        if seen:
            known_lengths(model_kwargs[CACHE], model_kwargs.get("prefix_length"), model_kwargs.get("encoder_mask"))
        if seen and self.config.pads_officially:
            raise ValueError(
                f"`short_prompt` is {self.config.short_prompt!r}, whose cache holds pads that the input does not, so "
                "that it cannot be continued; set it to 'exact'."
            )
        if generation_config.prefill_chunk_size is not None and not seen:
            prefix = self._prefix_of_prompt(input_ids, model_kwargs)
            if prefix is not None:
                generation_config.prefill_chunk_size = max(generation_config.prefill_chunk_size, prefix.columns)
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _assisted_decoding(self, input_ids: torch.Tensor, *args: Any, **model_kwargs: Any) -> Any:
        """Its first forward pass sees candidates behind the prompt, and its assistant must not see our arguments."""
        layers = state_layers(model_kwargs.get(CACHE))
        if layers and not seen_columns(model_kwargs[CACHE]):
            prefix = self._prefix_of_prompt(input_ids, model_kwargs)
            none = torch.zeros(input_ids.shape[0], 0, dtype=torch.bool, device=input_ids.device)
            for layer in layers:
                layer.planned_mask = none if prefix is None else prefix.mask
        for name in ("prefix_length", "encoder_mask"):
            model_kwargs.pop(name, None)
        return super()._assisted_decoding(input_ids, *args, **model_kwargs)

    def _prefix_of_prompt(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> Prefix | None:
        embeds = model_kwargs.get("inputs_embeds")
        return find_prefix(
            input_ids if embeds is None else embeds,
            model_kwargs.get("attention_mask"),
            model_kwargs.get("prefix_length"),
            model_kwargs.get("encoder_mask"),
            default=self.config.prefix_length,
        )

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if seen_columns(inputs.get(CACHE)):
            # the cache knows its prefix
            inputs.pop("prefix_length", None)
            inputs.pop("encoder_mask", None)
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        uncached = model_kwargs.get(CACHE) is None
        if uncached and self.config.short_prompt != "iterate" and model_kwargs.get("encoder_mask") is None:
            model_kwargs["prefix_length"] = outputs.prefix_length
        return model_kwargs
