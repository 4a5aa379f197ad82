"""JRT-RNN (Just Read Twice, arXiv 2407.05483): a recurrent model that reads its prompt non-causally.

Prefix linear attention, sliding-window attention and gated short convolutions in one residual stream, each followed
by a gated MLP. Linear attention sums up a prefix, later tokens included, before the first token is answered; behind it
the model is a recurrent one, whose memory does not grow. Without a prefix it is the paper's causal baseline, Based.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralMLP,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..configuration.configuration_jrt import JRTConfig
from .cache_naming import CACHE, NamedCache, cache_argument
from .classification_head import ClassificationHead
from .parallel_checks import TensorParallelChecks
from .prefix_cache import adopt_state_layers, known_lengths, seen_columns, state_layers
from .prefix_generation import PrefixGeneration
from .prefix_loss import prefix_lm_loss, read_prompt_first
from .prefix_mixers import GatedShortConvolution, PrefixLinearAttention
from .prefix_tokens import Prefix, find_prefix
from .process_ranks import ranks_keep_step
from .remote_code import RemoteCodeMixin, register_class_names
from .short_prompts import pad_short_prompts
from .window_blocks import Window, attend, make_window


@dataclass
class PrefixFields(NamedCache):
    """
    Args:
        prefix_length (`torch.LongTensor` of shape `(batch,)`, *optional*):
            Tokens of each row's prefix. Passed to a later call without cache, it keeps the prefix that of the prompt.
    """

    prefix_length: torch.LongTensor | None = None


@dataclass
class JRTModelOutputWithPast(PrefixFields, BaseModelOutputWithPast):
    """A decoder's output with `PrefixFields`."""


@dataclass
class JRTCausalLMOutputWithPast(PrefixFields, CausalLMOutputWithPast):
    """A causal language model's output with `PrefixFields`."""


class _Stream(NamedTuple):
    """What every layer of one forward pass needs to know of the tokens."""

    window: Window | None
    padding: torch.Tensor | None
    prefix: Prefix | None
    pads_leak: bool


class JRTDecoderLayer(GradientCheckpointingLayer):
    """A mixer and a gated MLP, each behind a norm."""

    def __init__(self, config: JRTConfig, layer_idx: int):
        super().__init__()
        self.kind = config.layer_types[layer_idx]
        if self.kind == "linear_attention":
            self.linear_attn = PrefixLinearAttention(
                config.hidden_size,
                config.num_attention_heads,
                config.feature_dim,
                feature_map=config.feature_map,
                reads_prefix=config.prefix_length > 0,
                layer_idx=layer_idx,
            )
        elif self.kind == "sliding_attention":
            self.self_attn = MistralAttention(config, layer_idx)
        else:
            self.conv = GatedShortConvolution(config.hidden_size, config.conv_kernel_size, layer_idx)
        self.mlp = MistralMLP(config)
        self.input_layernorm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        for projection in self._residual_projections():
            projection.__dict__["_writes_residual"] = True

    def _residual_projections(self) -> list[nn.Module]:
        mixers = {"linear_attention": "linear_attn.o_proj", "sliding_attention": "self_attn.o_proj"}
        return [self.get_submodule(mixers.get(self.kind, "conv.out_proj")), self.mlp.down_proj]

    def forward(
        self, hidden_states: torch.Tensor, stream: _Stream, cache: Cache | None = None, **kwargs: Any
    ) -> torch.Tensor:
        dtype = self.input_layernorm.weight.dtype
        mixed = self._mix(self.input_layernorm(hidden_states).to(dtype), stream, cache, **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states).to(dtype))

    def _mix(self, normed: torch.Tensor, stream: _Stream, cache: Cache | None, **kwargs: Any) -> torch.Tensor:
        if self.kind == "linear_attention":
            return self.linear_attn(
                normed,
                attention_mask=stream.padding,
                encoder_mask=stream.prefix,
                cache=cache,
                pads_leak=stream.pads_leak,
            )[0]
        if self.kind == "sliding_attention":
            return attend(self.self_attn, normed, stream.window, cache, **kwargs)
        return self.conv(normed, None if stream.pads_leak else stream.padding, cache)


class JRTPreTrainedModel(RemoteCodeMixin, TensorParallelChecks, PreTrainedModel):
    config: JRTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["JRTDecoderLayer"]
    _skip_keys_device_placement = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": JRTDecoderLayer, "attentions": MistralAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
        elif getattr(module, "_writes_residual", False):
            scale = (2 * self.config.num_hidden_layers) ** -0.5
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range * scale)


class JRTModel(JRTPreTrainedModel):
    def __init__(self, config: JRTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([JRTDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MistralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def adopt_cache(self, cache: Cache) -> None:
        """Prepares an empty cache of transformers' for this model, in place; raises a `ValueError` for others."""
        adopt_state_layers(cache, self.config)

    @cache_argument
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        prefix_length: int | torch.Tensor | None = None,
        encoder_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> JRTModelOutputWithPast:
        """As in every decoder of transformers, but makes no cache in training, and:

        Args:
            prefix_length (`int` or `torch.LongTensor` of shape `(batch,)`, *optional*):
                The first tokens of each row, pads not counted, that are read non-causally; at most
                `config.prefix_length` by default. A cache that has seen tokens knows its prefix.
            encoder_mask (`torch.Tensor` of shape `(batch, at most tokens)`, *optional*):
                1 at the tokens of the prefix, instead of a length.

        Raises:
            ValueError: for inputs, masks, prefixes and caches that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`.")
        config = self.config
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.training and self.gradient_checkpointing:
            if seen_columns(cache):
                raise ValueError(
                    "the cache has seen tokens, which gradient checkpointing would forget, as it reads them without a "
                    "cache; train without one, or call `model.eval()` to generate."
                )
            cache = None
        elif use_cache and cache is None and not self.training:
            cache = DynamicCache(config=config)
        if cache is not None:
            self.adopt_cache(cache)
        seen = seen_columns(cache)
        # the cache of a padded prompt has seen more columns than the mask has
        padding = None if seen and config.pads_officially else _padding_of(attention_mask, inputs_embeds, seen)
        if seen:
            prefix, lengths = None, known_lengths(cache, prefix_length, encoder_mask)
        else:
            _check_documents(position_ids, attention_mask)
            prefix = self._find_prefix(inputs_embeds, padding, cache, prefix_length, encoder_mask)
            lengths = (
                inputs_embeds.new_zeros(len(inputs_embeds), dtype=torch.long) if prefix is None else prefix.lengths
            )
        tokens = inputs_embeds.shape[1]
        if config.pads_officially:
            if prefix is not None:
                # not a row of the weight, which may be offloaded or sharded
                pad = self.embed_tokens(torch.tensor([config.short_prompt_token_id], device=inputs_embeds.device))[0]
                inputs_embeds, padding, prefix = pad_short_prompts(config, inputs_embeds, padding, prefix, pad)
            attention_mask = position_ids = None
        if position_ids is None:
            position_ids = seen + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        window = None
        if "sliding_attention" in config.layer_types:
            window = make_window(config, self.rotary_emb, inputs_embeds, attention_mask, position_ids, cache, seen)
        stream = _Stream(window, padding, prefix, config.pads_officially)
        hidden_states = inputs_embeds
        if config.residual_in_fp32:
            hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        for layer in self.layers:
            hidden_states = layer(hidden_states, stream, cache=cache, **kwargs)
        hidden_states = self.norm(hidden_states).to(self.norm.weight.dtype)
        if hidden_states.shape[1] != tokens:
            hidden_states = hidden_states[:, -tokens:]
        return JRTModelOutputWithPast(
            last_hidden_state=hidden_states, **{CACHE: cache if use_cache else None}, prefix_length=lengths
        )

    def _find_prefix(
        self,
        inputs_embeds: torch.Tensor,
        padding: torch.Tensor | None,
        cache: Cache | None,
        prefix_length: int | torch.Tensor | None,
        encoder_mask: torch.Tensor | Prefix | None,
    ) -> Prefix | None:
        """The prefix of a first call."""
        if prefix_length is None and encoder_mask is None:
            encoder_mask = next((layer.planned_mask for layer in state_layers(cache)), None)
        prefix = find_prefix(inputs_embeds, padding, prefix_length, encoder_mask, default=self.config.prefix_length)
        if prefix is not None and not self.config.prefix_length:
            raise ValueError("a prefix was given, but `config.prefix_length` is 0: the model is causal.")
        if prefix is None and ranks_keep_step(self.layers, self.training) and self.config.prefix_length:
            # other ranks may have one, and wait for its projections or their gradients
            mask = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
            prefix = None if self.config.pads_officially else Prefix(mask, columns=1, lengths=mask.sum(dim=1))
        return prefix


def _padding_of(attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, seen: int) -> torch.Tensor | None:
    """The mask of the new tokens as booleans of shape `(batch, tokens)`; `None` if none of them is a pad."""
    if attention_mask is None:
        return None
    tokens = inputs_embeds.shape[1]
    if attention_mask.ndim != 2:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but recurrent layers can only tell pads; give "
            "one of shape (batch, columns) with 0 at pads."
        )
    if attention_mask.shape[1] != seen + tokens:
        raise ValueError(
            f"`attention_mask` has {attention_mask.shape[1]} columns, but the cache has seen {seen} tokens and "
            f"{tokens} are new; give one column for each of the {seen + tokens}."
        )
    padding = attention_mask[:, seen:].bool()
    if not torch.compiler.is_compiling() and bool(padding.all()):
        return None
    return padding


def _check_documents(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
    if position_ids is None or attention_mask is not None or torch.compiler.is_compiling():
        return
    if bool((position_ids.diff(dim=-1) != 1).any()):
        raise ValueError(
            "`position_ids` restart within a row, as in packed documents, but recurrent layers would mix them; give "
            "each document a row of its own."
        )


class JRTForCausalLM(PrefixGeneration, JRTPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: JRTConfig):
        super().__init__(config)
        self.model = JRTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_forward_pre_hook(read_prompt_first, with_kwargs=True)
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
        prefix_length: int | torch.LongTensor | None = None,
        encoder_mask: torch.Tensor | Prefix | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> JRTCausalLMOutputWithPast:
        """As in every causal language model of transformers, with `prefix_length` and `encoder_mask` of `JRTModel`.

        The loss is that of `prefix_lm_loss`: labels whose tokens the prefix has seen are not read.
        """
        if labels is None and num_items_in_batch is not None and self.config.prefix_length:
            raise ValueError(
                "the loss is made outside of the model, which would read labels that the prefix has seen; leave "
                "`label_smoothing_factor` and `compute_loss_func` out, so that the model gets the labels."
            )
        # not an argument of its own: Trainer would miss it in evaluation
        shift_labels = kwargs.pop("shift_labels", None)
        prefix = None
        if labels is not None and not seen_columns(cache):
            tokens, default = input_ids if inputs_embeds is None else inputs_embeds, self.config.prefix_length
            prefix = find_prefix(tokens, attention_mask, prefix_length, encoder_mask, default=default)
            prefix_length, encoder_mask = (0, None) if prefix is None else (None, prefix)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prefix_length=prefix_length,
            encoder_mask=encoder_mask,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept, :])
        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ValueError(
                    f"`labels` are {labels.shape[1]} tokens, but logits are kept of {logits.shape[1]}; leave "
                    "`logits_to_keep` out."
                )
            loss = prefix_lm_loss(
                logits,
                labels.to(logits.device),
                None if input_ids is None else input_ids.to(logits.device),
                None if prefix is None else prefix.to(logits.device),
                self.config.mask_token_id,
                self.config.mlm_loss_weight,
                num_items_in_batch,
                None if shift_labels is None else shift_labels.to(logits.device),
            )
        return JRTCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.cache},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            prefix_length=outputs.prefix_length,
        )


class JRTForSequenceClassification(ClassificationHead, JRTPreTrainedModel):
    def __init__(self, config: JRTConfig):
        super().__init__(config)
        self._build_head(JRTModel(config))


JRTPreTrainedModel.remote_classes = {
    "AutoConfig": JRTConfig,
    "AutoModel": JRTModel,
    "AutoModelForCausalLM": JRTForCausalLM,
    "AutoModelForSequenceClassification": JRTForSequenceClassification,
}
register_class_names("jrt", JRTPreTrainedModel.remote_classes)
