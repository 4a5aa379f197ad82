"""`generate` of every architecture: exact, or refused before the first step."""

import functools
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from .cache_naming import CACHE, rename_cache


class GenerationGuard:
    """Mixed into `XForCausalLM` of every architecture: `generate` takes the cache under both of its names."""

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        rename_cache(kwargs, CACHE)
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "continuous batching (`generate_batch`) stores every token in every layer and finds its pages by layer, "
            "which is wrong for shared, routed and recurrent layers; use `generate` on a padded batch."
        )

    def _assisted_decoding(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Behind a cache that has seen a part of the tokens, transformers' own would read all of them again."""
        cache, mask, prepare = kwargs.get(CACHE), kwargs.get("attention_mask"), self.prepare_inputs_for_generation
        config = kwargs.get("generation_config")
        columns = getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]
        seen = 0 if cache is None or columns != input_ids.shape[1] else cache.get_seq_length()
        if not seen:
            return super()._assisted_decoding(input_ids, *args, **kwargs)

        def prepare_unseen(candidates: torch.Tensor, next_sequence_length: int | None = None, **inputs: Any) -> Any:
            if next_sequence_length is None and inputs.get(CACHE) is cache:
                next_sequence_length = candidates.shape[1] - seen
            return prepare(candidates, next_sequence_length=next_sequence_length, **inputs)

        self.__dict__["prepare_inputs_for_generation"] = prepare_unseen
        try:
            return super()._assisted_decoding(input_ids, *args, **kwargs)
        finally:
            del self.__dict__["prepare_inputs_for_generation"]

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        """Leaves the 2D mask as it is: our layers need it to tell pads."""
        return attention_mask


class RoutedGenerationGuard(GenerationGuard):
    """Mixed into `XForCausalLM` of a routed architecture.

    `generate` takes `compute`, an operating point of a calibrated model for this call, and the cache under both of its
    names. Everything else in it is transformers' own.
    """

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, compute: float | None = None, **kwargs: Any) -> Any:
        rename_cache(kwargs, CACHE)
        # in evaluation mode also between training steps: routing in training looks at future tokens
        in_training = [module for module in self.modules() if module.training]
        before = self.config.compute
        self.eval()
        if compute is not None:
            self.config.compute = compute
        try:
            return super().generate(*args, **kwargs)
        finally:
            self.config.compute = before
            for module in in_training:
                module.training = True

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if getattr(self.config, "inference_rule", None) == "topk" and self.config.routing != "none":
            raise ValueError(
                "inference_rule is 'topk', which looks at future tokens and exists for measuring only; set "
                "`model.config.inference_rule` to 'threshold' to generate."
            )
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                "cache_implementation is 'quantized', which cannot hold rows of unequal length; use the default cache "
                "or 'static'."
            )
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit is {generation_config.assistant_early_exit}, but early exit by layer would cut "
                "a recursion short; pass a smaller model as `assistant_model`, or use `prompt_lookup_num_tokens`."
            )
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        if cache is not None and cache.is_compileable and hasattr(self, "_previous_max_cache_length"):
            cache.stream_length = self._previous_max_cache_length
        return result
