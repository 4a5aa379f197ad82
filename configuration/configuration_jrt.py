"""Configuration of JRT-RNN (Just Read Twice, arXiv 2407.05483)."""

import dataclasses
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .config_basics import ROPE_KEYS, CodeKeepingConfig, check_choice, is_transformers_key, unknown_key


MIXERS = ("linear_attention", "sliding_attention", "conv")
SHORT_PROMPTS = ("exact", "left_pad", "read_twice", "iterate")

# GPT-2's, padded to a multiple of 8
GPT2_VOCABULARY = 50264
# layers of the released models that read the prefix (paper, table 15, corrected by the official code)
_PREFIX_LAYERS = {26: (1, 6, 11, 16, 21), 36: (1, 6, 11, 16, 21, 27, 33)}
PRESETS: dict[str, dict[str, Any]] = {
    "360m": {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 26},
    "1.3b": {"hidden_size": 1792, "intermediate_size": 3584, "num_hidden_layers": 36},
}


@strict
class JRTConfig(CodeKeepingConfig, PreTrainedConfig):
    r"""
    Args:
        vocab_size (`int`, *optional*, defaults to 50264):
            Size of the vocabulary: GPT-2's, padded to a multiple of 8.
        hidden_size (`int`, *optional*, defaults to 1024):
            Width of the residual stream.
        intermediate_size (`int`, *optional*, defaults to 2048):
            Inner width of the gated MLPs.
        num_hidden_layers (`int`, *optional*, defaults to 26):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 16):
            Heads of linear and of sliding-window attention.
        num_key_value_heads (`int`, *optional*):
            Key and value heads of sliding-window attention; as many as `num_attention_heads` by default.
        layer_types (`list[str]`, *optional*):
            Mixer of each layer: `linear_attention` (prefix linear attention), `sliding_attention` or `conv` (gated
            short convolution). By default the layout of the released models where the depth is theirs (26 or 36), else
            linear and sliding-window attention as layers 1 and 2 of every five, and convolutions.
        feature_dim (`int`, *optional*, defaults to 16):
            Size of a query or key vector of linear attention, per head, before the feature map.
        feature_map (`str`, *optional*, defaults to `"taylor"`):
            `taylor`, the second-order Taylor expansion of the exponential (paper, section 3.1), `elu` (elu(x) + 1), or
            `softmax` over the features and their negatives; or one that was added to `feature_maps.FEATURE_MAPS`.
        prefix_length (`int`, *optional*, defaults to 1024):
            The first tokens of a prompt that linear attention reads non-causally, unless a call says otherwise; 0 is a
            causal model, the paper's baseline Based, which has no weights for a prefix.
        short_prompt (`str`, *optional*, defaults to `"exact"`):
            What a prompt of fewer tokens than `prefix_length` becomes. `exact`: all of it is the prefix, pads have no
            effect. The paper's ways (appendix B.2), with the padding of the official code, where a masked token keeps
            weight one in linear attention and is no pad elsewhere: `left_pad` with `short_prompt_token_id` up to
            `prefix_length`, and `read_twice`, which repeats the prompt first. `iterate` re-reads the sequence for each
            new token, so that generated tokens join the prefix.
        short_prompt_token_id (`int`, *optional*):
            The token to pad with; 220, a space, in GPT-2's vocabulary.
        sliding_window (`int`, *optional*, defaults to 129):
            Tokens that a sliding-window query sees, itself included.
        conv_kernel_size (`int`, *optional*, defaults to 3):
            Taps of the short convolutions.
        mlm_loss_weight (`float`, *optional*, defaults to 0.25):
            Weight of the masked-token loss inside the prefix (paper, section 4.2).
        mask_token_id (`int`, *optional*):
            The [MASK] token of that loss; 50263, the last padded row, in GPT-2's vocabulary. Without one there is no
            such loss.
        residual_in_fp32 (`bool`, *optional*, defaults to `True`):
            Keeps the residual stream in fp32 in models of lower precision.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation of the MLPs' gates.
        rms_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the norms.
        rope_parameters (`dict`, *optional*):
            Rotary embedding of the sliding-window layers; the only position information.
        max_position_embeddings (`int`, *optional*):
            Longest sequence, if there is a limit; positions only matter within the window.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of initial weights; divided by sqrt(2 num_hidden_layers) for projections into the
            residual stream.

    Raises:
        ValueError: for every invalid field or combination, with the field, the value and what is allowed.
    """

    model_type = "jrt"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "prefix_length"]

    vocab_size: int = GPT2_VOCABULARY
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 26
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    layer_types: list[str] | None = None
    feature_dim: int = 16
    feature_map: str = "taylor"
    prefix_length: int = 1024
    short_prompt: str = "exact"
    short_prompt_token_id: int | None = None
    sliding_window: int = 129
    conv_kernel_size: int = 3
    mlm_loss_weight: float | int = 0.25
    mask_token_id: int | None = None
    residual_in_fp32: bool = True
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int | None = None
    rope_parameters: RopeParameters | dict | None = None
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        known = {field.name for field in dataclasses.fields(self)}
        for key in kwargs:
            if key not in ROPE_KEYS and not is_transformers_key(key):
                raise unknown_key(key, "no field of JRTConfig", known)
        if self.vocab_size == GPT2_VOCABULARY:
            self.mask_token_id = 50263 if self.mask_token_id is None else self.mask_token_id
            self.short_prompt_token_id = 220 if self.short_prompt_token_id is None else self.short_prompt_token_id
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = default_layer_types(self.num_hidden_layers)
        super().__post_init__(**kwargs)
        self.validate_layout()
        self.validate_prefix()
        # transformers does not write this to config.json
        self.base_model_tp_plan = self._tensor_parallel_plan()

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Heads of attention and columns of MLPs are divided; convolutions are whole everywhere."""
        linear = ["q", "k", "v", *(("prefix_k", "prefix_v") if self.prefix_length else ())]
        mixers = {"linear_attention": ("linear_attn", linear), "sliding_attention": ("self_attn", ["q", "k", "v"])}
        plan = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
        for kind, (module, names) in mixers.items():
            if kind in self.layer_types:
                plan |= {f"{module}.{name}_proj": "colwise" for name in names} | {f"{module}.o_proj": "rowwise"}
        return {f"layers.*.{name}": style for name, style in plan.items()}

    @classmethod
    def preset(cls, name: str, **fields: Any) -> "JRTConfig":
        """The configuration of a released model, `"360m"` or `"1.3b"`; `fields` go before its own."""
        check_choice("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **fields})

    @property
    def head_dim(self) -> int:
        """Size of a value vector per head, and of all vectors of sliding-window attention."""
        return self.hidden_size // self.num_attention_heads

    @property
    def pads_officially(self) -> bool:
        """Short prompts are padded as the official code does."""
        return self.short_prompt in ("left_pad", "read_twice")

    def validate_layout(self) -> None:
        """Raises a `ValueError` for layers that cannot be built."""
        for kind in self.layer_types or ():
            check_choice("layer_types", kind, MIXERS)
        if len(self.layer_types or ()) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` has {len(self.layer_types or ())} entries, but must have one for each of the "
                f"{self.num_hidden_layers} layers (`num_hidden_layers`)."
            )
        least = {
            "hidden_size": 1,
            "intermediate_size": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "feature_dim": 1,
            "sliding_window": 2,
            "conv_kernel_size": 2,
            "prefix_length": 0,
        }
        for field, minimum in least.items():
            if getattr(self, field) < minimum:
                raise ValueError(f"`{field}` is {getattr(self, field)}, but must be at least {minimum}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}, but must be a multiple of `num_attention_heads`, which is "
                f"{self.num_attention_heads}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` is {self.num_key_value_heads}, but must divide `num_attention_heads`, which "
                f"is {self.num_attention_heads}."
            )

    def validate_prefix(self) -> None:
        """Raises a `ValueError` for a prefix that nobody reads, or token ids outside of the vocabulary."""
        check_choice("short_prompt", self.short_prompt, SHORT_PROMPTS)
        if self.prefix_length and "linear_attention" not in (self.layer_types or ()):
            raise ValueError(
                f"`prefix_length` is {self.prefix_length}, but no layer is 'linear_attention' and reads a prefix; "
                "set it to 0."
            )
        if self.short_prompt != "exact" and not self.prefix_length:
            raise ValueError(
                f"`short_prompt` is {self.short_prompt!r}, but `prefix_length` is 0; set it to 'exact' for a causal "
                "model."
            )
        if self.pads_officially and self.short_prompt_token_id is None:
            raise ValueError(
                f"`short_prompt` is {self.short_prompt!r}, which pads, but `short_prompt_token_id` is None; set it."
            )
        for field in ("mask_token_id", "short_prompt_token_id"):
            token = getattr(self, field)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"`{field}` is {token}, but must be below `vocab_size`, which is {self.vocab_size}.")


def default_layer_types(depth: int) -> list[str]:
    """The mixers of a model of `depth` layers, see `layer_types`."""
    reading = _PREFIX_LAYERS.get(depth, range(1, depth, 5))
    kinds = ["conv"] * depth
    for layer in reading:
        kinds[layer] = "linear_attention"
        if layer + 1 < depth:
            kinds[layer + 1] = "sliding_attention"
    return kinds
