"""Decoder layers of vanilla families, taken from transformers itself. This file alone knows transformers' internals.

A family is one row in `FAMILIES`: its embedding, decoder layer, norm and rotary classes are found by name, its layers
are called with the one signature that transformers 5 gives them all, and what its model classes do outside the layers
(embedding factor, logit scaling) is named in the row.
"""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """What must be known of a vanilla family beyond its layers.

    Attributes:
        module: module in `transformers.models`, also the folder of its `modeling_` file.
        prefix: prefix of its class names.
        base_model: suffix of its base model's class name.
        uniform_window: every layer slides when `config.sliding_window` is set and there are no `layer_types`.
        softcaps_attention: its attention caps the scores, which `sdpa` cannot do.
        scale_embeddings: what its model does to the embeddings, `(config, embeddings, training) -> embeddings`.
        finish_logits: what its language model does to the head's output, `(config, logits) -> logits`.
    """

    module: str
    prefix: str
    base_model: str = "Model"
    uniform_window: bool = False
    softcaps_attention: bool = False
    scale_embeddings: Callable[[PreTrainedConfig, torch.Tensor, bool], torch.Tensor] | None = None
    finish_logits: Callable[[PreTrainedConfig, torch.Tensor], torch.Tensor] | None = None

    @property
    def modeling(self) -> ModuleType:
        return importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")

    def find(self, suffix: str) -> Any:
        return getattr(self.modeling, self.prefix + suffix)


def _softcap_logits(config: PreTrainedConfig, logits: torch.Tensor) -> torch.Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "Llama"),
    "mistral": Family("mistral", "Mistral", uniform_window=True),
    "qwen2": Family("qwen2", "Qwen2"),
    "qwen3": Family("qwen3", "Qwen3"),
    "smollm3": Family("smollm3", "SmolLM3"),
    "olmo2": Family("olmo2", "Olmo2"),
    "phi3": Family("phi3", "Phi3", uniform_window=True),
    "granite": Family(
        "granite",
        "Granite",
        scale_embeddings=lambda config, embeddings, training: embeddings * config.embedding_multiplier,
        finish_logits=lambda config, logits: logits / config.logits_scaling,
    ),
    "gemma2": Family("gemma2", "Gemma2", softcaps_attention=True, finish_logits=_softcap_logits),
    "gemma3_text": Family("gemma3", "Gemma3", base_model="TextModel", finish_logits=_softcap_logits),
    "exaone4": Family("exaone4", "Exaone4"),
    "glm4": Family("glm4", "Glm4"),
    "cohere2": Family("cohere2", "Cohere2", finish_logits=lambda config, logits: logits * config.logit_scale),
    "starcoder2": Family(
        "starcoder2",
        "Starcoder2",
        uniform_window=True,
        scale_embeddings=lambda config, embeddings, training: nn.functional.dropout(
            embeddings, p=config.embedding_dropout, training=training
        ),
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    return FAMILIES[config.backbone]


def attention_kinds(config: PreTrainedConfig) -> list[str]:
    """`"full_attention"` or `"sliding_attention"` for every unrolled layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    slides = family_of(config).uniform_window and config.sliding_window is not None
    return ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers


def window_of(config: PreTrainedConfig, kind: str) -> int | None:
    """Number of columns that a query sees, itself included; `None` for all."""
    return config.sliding_window if kind == "sliding_attention" else None


def check_attention(config: PreTrainedConfig, routed: bool) -> None:
    """Refuses an attention implementation that cannot be exact.

    Raises:
        ValueError: for routed layers under anything but `eager` and `sdpa`.
    """
    implementation = config._attn_implementation
    if routed and implementation not in (None, "eager", "sdpa"):
        raise ValueError(
            f"attn_implementation is {implementation!r}, but routed layers attend by the column of each token, which "
            "only 'eager' and 'sdpa' masks can express (flash attention would apply causality and windows by compact "
            "index); use attn_implementation='sdpa' or routing='none'."
        )


def build_parts(config: PreTrainedConfig) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The family's embedding, final norm and rotary embedding, as its own base model builds them."""
    shell_config = copy.copy(config)
    shell_config.__dict__["num_hidden_layers"] = 0
    shell = family_of(config).find(family_of(config).base_model)(shell_config)
    shell.rotary_emb.config = config
    return shell.embed_tokens, shell.norm, shell.rotary_emb


def build_layers(config: PreTrainedConfig, first_use: dict[int, int]) -> nn.ModuleList:
    """One decoder layer per physical layer, built for the unrolled index of its first use."""
    layer_class = family_of(config).find("DecoderLayer")
    return nn.ModuleList([layer_class(config, first_use[layer]) for layer in sorted(first_use)])


def rotary_embeddings(
    rotary: nn.Module, hidden_states: torch.Tensor, position_ids: torch.Tensor, kinds: set[str]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Cosines and sines per attention kind, each of shape `(batch or 1, seq_len, rotary_dim)`."""
    if isinstance(getattr(rotary, "rope_type", None), dict):
        return {kind: rotary(hidden_states, position_ids, kind) for kind in kinds}
    return dict.fromkeys(kinds, rotary(hidden_states, position_ids=position_ids))


def share_key_values(layers: nn.ModuleList) -> None:
    """Lets the attention of `layers` skip its key and value projections where it only reads them."""
    for layer in layers:
        attention = layer.self_attn
        attention.__class__ = _reading_class(type(attention))
        for projection in (attention.k_proj, attention.v_proj):
            projection.__class__ = _SkippableLinear


class _SkippableLinear(nn.Linear):
    """A linear layer that returns zeros, at no cost, while `skipped` is set."""

    skipped = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.skipped:
            return input.new_zeros(1).expand(*input.shape[:-1], self.out_features)
        return super().forward(input)


def _new_reading(attention_class: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(_reading_class(attention_class))


class _ReadingAttention:
    """Takes the view of the shared keys and values as `shared_kv`.

    Under gradient checkpointing a decoder layer drops what it gets as `past_key_values`. The projections are switched
    here, inside the layer, so that the recomputation in the backward pass skips what the forward pass skipped.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Pickles by the family's own class: this one is made at run time."""
        return _new_reading, (type(self).__bases__[1],), self.__dict__

    def forward(self, hidden_states: torch.Tensor, *args: Any, shared_kv: Any = None, **kwargs: Any) -> Any:
        if shared_kv is None:
            return super().forward(hidden_states, *args, **kwargs)
        kwargs["past_key_values"] = shared_kv
        projections = [p for p in (self.k_proj, self.v_proj) if isinstance(p, _SkippableLinear)]
        for projection in projections:
            projection.skipped = shared_kv.reads
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            for projection in projections:
                projection.skipped = False


_READING_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _reading_class(attention_class: type[nn.Module]) -> type[nn.Module]:
    if attention_class not in _READING_CLASSES:
        name = attention_class.__name__
        _READING_CLASSES[attention_class] = type(name, (_ReadingAttention, attention_class), {})
    return _READING_CLASSES[attention_class]


class BackbonePreTrainedModel(PreTrainedModel):
    """What every architecture on a vanilla backbone tells transformers."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "shared_kv"]
    _no_split_modules = sorted({f"{family.prefix}DecoderLayer" for family in FAMILIES.values()})
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    @property
    def _supports_sdpa(self) -> bool:
        return not family_of(self.config).softcaps_attention

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        if not self._supports_sdpa:
            raise ValueError(
                f"attn_implementation is 'sdpa', but {self.config.backbone} caps its attention scores, which sdpa "
                "cannot do; use attn_implementation='eager'."
            )
        return super()._sdpa_can_dispatch(is_init_check)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises as the family does, whose rules depend on its own classes (zero-centred norms, buffers)."""
        pretrained = family_of(self.config).find("PreTrainedModel")
        agent = pretrained.__new__(pretrained)
        nn.Module.__init__(agent)
        agent.config = self.config
        agent._init_weights(module)
