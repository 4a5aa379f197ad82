"""Decoder layers of vanilla families, taken from transformers itself. This file alone knows transformers' internals.

A family is one row in `FAMILIES`: its embedding, decoder layer, norm and rotary classes are found by name, its layers
are called with the one signature that transformers 5 gives them all, and what its model classes do outside the layers
(embedding factor, logit scaling) is named in the row.
"""

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .cache_naming import CACHE
from .module_mixins import NoOpExperts, mix_in
from .parallel_checks import TensorParallelChecks


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
        norm_after: norm between a part of the layer and the residual stream, `attention` or `mlp` -> name.
        num_experts: field of its configuration that counts the experts of its MLP.
    """

    module: str
    prefix: str
    base_model: str = "Model"
    uniform_window: bool = False
    softcaps_attention: bool = False
    scale_embeddings: Callable[[PreTrainedConfig, torch.Tensor, bool], torch.Tensor] | None = None
    finish_logits: Callable[[PreTrainedConfig, torch.Tensor], torch.Tensor] | None = None
    norm_after: Mapping[str, str] = field(default_factory=dict)
    num_experts: str | None = None

    @property
    def modeling(self) -> ModuleType:
        return importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")

    def find(self, suffix: str) -> Any:
        return getattr(self.modeling, self.prefix + suffix)


def _softcap_logits(config: PreTrainedConfig, logits: torch.Tensor) -> torch.Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


_SANDWICH = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "Llama"),
    "mistral": Family("mistral", "Mistral", uniform_window=True),
    "qwen2": Family("qwen2", "Qwen2"),
    "qwen3": Family("qwen3", "Qwen3"),
    "smollm3": Family("smollm3", "SmolLM3"),
    "olmo2": Family("olmo2", "Olmo2", norm_after=_SANDWICH),
    "phi3": Family("phi3", "Phi3", uniform_window=True),
    "granite": Family(
        "granite",
        "Granite",
        scale_embeddings=lambda config, embeddings, training: embeddings * config.embedding_multiplier,
        finish_logits=lambda config, logits: logits / config.logits_scaling,
    ),
    "gemma2": Family("gemma2", "Gemma2", softcaps_attention=True, finish_logits=_softcap_logits, norm_after=_SANDWICH),
    "gemma3_text": Family(
        "gemma3", "Gemma3", base_model="TextModel", finish_logits=_softcap_logits, norm_after=_SANDWICH
    ),
    "exaone4": Family("exaone4", "Exaone4", norm_after=_SANDWICH),
    "glm4": Family("glm4", "Glm4", norm_after={"attention": "post_self_attn_layernorm", "mlp": "post_mlp_layernorm"}),
    "cohere2": Family("cohere2", "Cohere2", finish_logits=lambda config, logits: logits * config.logit_scale),
    "starcoder2": Family(
        "starcoder2",
        "Starcoder2",
        uniform_window=True,
        scale_embeddings=lambda config, embeddings, training: nn.functional.dropout(
            embeddings, p=config.embedding_dropout, training=training
        ),
    ),
    "mixtral": Family("mixtral", "Mixtral", uniform_window=True, num_experts="num_local_experts"),
    "qwen3_moe": Family("qwen3_moe", "Qwen3Moe", uniform_window=True, num_experts="num_local_experts"),
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
    family = family_of(config)
    layers = nn.ModuleList([family.find("DecoderLayer")(config, first_use[layer]) for layer in sorted(first_use)])
    if getattr(config, "num_noop_experts", 0):
        wide = copy.copy(config)
        wide.__dict__[family.num_experts] = getattr(config, family.num_experts) + config.num_noop_experts
        for layer in layers:
            if has_experts(layer):
                layer.mlp.gate = type(layer.mlp.gate)(wide)
                mix_in(layer.mlp.experts, NoOpExperts)
    return layers


def has_experts(layer: nn.Module) -> bool:
    """Whether the MLP of a decoder layer is a mixture of experts."""
    return hasattr(layer.mlp, "experts")


def expert_load_loss(config: PreTrainedConfig, logits: tuple[torch.Tensor, ...], num_experts: int) -> torch.Tensor:
    """The family's own load-balancing loss over expert logits of shape `(tokens, num_experts)`, one per layer."""
    return family_of(config).modeling.load_balancing_loss_func(logits, num_experts, config.num_experts_per_tok)


def rotary_embeddings(
    rotary: nn.Module, hidden_states: torch.Tensor, position_ids: torch.Tensor, kinds: set[str]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Cosines and sines per attention kind, each of shape `(batch or 1, seq_len, rotary_dim)`."""
    if isinstance(getattr(rotary, "rope_type", None), dict):
        return {kind: rotary(hidden_states, position_ids, kind) for kind in kinds}
    return dict.fromkeys(kinds, rotary(hidden_states, position_ids=position_ids))


class BackbonePreTrainedModel(TensorParallelChecks, PreTrainedModel):
    """What every architecture on a vanilla backbone tells transformers."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE, "shared_kv"]
    # of a model those of its own family, which engines look for by name
    _no_split_modules = sorted({f"{family.prefix}DecoderLayer" for family in FAMILIES.values()})
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self._no_split_modules = [f"{family_of(config).prefix}DecoderLayer"]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers looks for experts in the module that defines the model class; ours come from the family's."""
        return any(FAMILIES[backbone].num_experts is not None for backbone in cls.config_class.backbones)

    def _grouped_mm_can_dispatch(self) -> bool:
        if family_of(self.config).num_experts is None:
            raise ValueError(
                f"experts_implementation is 'grouped_mm', but {self.config.backbone} has no experts; leave it out."
            )
        return super()._grouped_mm_can_dispatch()

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
