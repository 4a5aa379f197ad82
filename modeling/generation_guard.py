"""What `generate` cannot do exactly with a routed model, refused before the first step."""

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
