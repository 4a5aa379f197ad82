"""The flat configuration of a decoder whose layers come from a vanilla family of transformers.

The family's own fields (`hidden_size`, `num_attention_heads`, `rope_parameters`, ...) stand at top level, so that
PEFT, tensor-parallel plans and attention backends find the names they know. They are typed, defaulted and validated
by building the family's own configuration class; a key that neither the family nor the architecture knows is refused.
"""

import dataclasses
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .config_basics import (
    BASE_FIELDS,
    METADATA,
    ROPE_KEYS,
    CodeKeepingConfig,
    check_choice,
    is_transformers_key,
    unknown_key,
)


BACKBONES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "olmo2",
    "phi3",
    "granite",
    "gemma2",
    "gemma3_text",
    "exaone4",
    "glm4",
    "cohere2",
    "starcoder2",
)
# families whose MLP is a mixture of experts; the shared blocks of a recursive model are dense
MOE_BACKBONES = ("mixtral", "qwen3_moe")

# lists with one entry per unrolled layer: a repeat of a layer carries the entry of its first use
PER_LAYER_FIELDS = ("layer_types", "no_rope_layers")

# what the modeling code of every family reads, although not every configuration class declares it
_UNDECLARED = {"head_dim"}


@strict
class BackboneConfig(CodeKeepingConfig, PreTrainedConfig):
    r"""
    Args:
        backbone (`str`, *optional*, defaults to `"llama"`):
            Family whose decoder layers, norm, rotary embedding and embedding are used; one of `backbones`.
        num_hidden_layers (`int`, *optional*, defaults to 32):
            Unrolled depth: the number of layer applications of a token that skips nothing, and of KV cache slots.
        kwargs:
            Every field of the family's own configuration.

    Raises:
        ValueError: for a family that is not supported, and for a key that nobody knows.
    """

    # those that the architecture supports
    backbones: ClassVar[tuple[str, ...]] = BACKBONES

    backbone: str = "llama"
    num_hidden_layers: int = 32
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        check_choice("backbone", self.backbone, self.backbones)
        kwargs = self._adopt_family_fields(kwargs)
        super().__post_init__(**kwargs)

    def _adopt_family_fields(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Builds the family's config from `kwargs`, copies what it holds to `self`; returns transformers' metadata."""
        known = family_fields(self.backbone)
        own_fields = {field.name for field in dataclasses.fields(self)}

        family_kwargs = {name: getattr(self, name) for name in known & own_fields}
        family_kwargs |= {key: value for key, value in kwargs.items() if key in known | ROPE_KEYS}
        family = CONFIG_MAPPING[self.backbone](**family_kwargs)

        if getattr(family, "use_bidirectional_attention", False):
            raise ValueError(
                "`use_bidirectional_attention` is True, but routed models are causal; set it to False or start from a "
                "decoder."
            )
        derived = {key: value for key, value in vars(family).items() if key not in BASE_FIELDS and key[0] != "_"}
        for key, value in kwargs.items():
            if key in known | ROPE_KEYS or is_transformers_key(key):
                continue
            if key not in derived:
                owner = f"neither a field of {type(self).__name__} nor of the {self.backbone} configuration"
                raise unknown_key(key, owner, own_fields | known)
            if value != derived[key]:
                raise ValueError(
                    f"`{key}` is {value!r}, but the {self.backbone} configuration derives {derived[key]!r} from its "
                    "other fields; remove it."
                )
        for key, value in derived.items():
            if key not in own_fields:
                setattr(self, key, value)
        # the parameter names are the family's; transformers does not write this to config.json
        self.base_model_tp_plan = family.base_model_tp_plan
        return {key: value for key, value in kwargs.items() if key in METADATA | BASE_FIELDS}

    def repeat_layer_fields(self, physical_layers: list[int]) -> None:
        """Rewrites the per-layer lists so that every repeat carries the entry of its layer's first use.

        Args:
            physical_layers (`list[int]`): the physical layer of each unrolled layer.
        """
        first_use = first_uses(physical_layers)
        for name in PER_LAYER_FIELDS:
            entries = getattr(self, name, None)
            if entries is None:
                continue
            if len(entries) != self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` has {len(entries)} entries, but must have one for each of the {self.num_hidden_layers} "
                    "unrolled layers (`num_hidden_layers`)."
                )
            setattr(self, name, [entries[first_use[layer]] for layer in physical_layers])

    def to_diff_dict(self) -> dict[str, Any]:
        """All fields of the architecture and of the family; transformers' own ones where they are not at default.

        A difference to the defaults of one family would lose values that are another family's default.
        """
        default = PreTrainedConfig().to_dict()
        return {key: value for key, value in self.to_dict().items() if key not in default or value != default[key]}


def fields_of_source(source_config: PreTrainedConfig, backbones: tuple[str, ...]) -> dict[str, Any]:
    """What a vanilla configuration says, as fields of a `BackboneConfig`.

    Raises:
        ValueError: for a family that is not in `backbones`.
    """
    backbone = source_config.model_type
    check_choice("backbone", backbone, backbones)
    known = family_fields(backbone) | {"id2label", "label2id", "dtype"}
    return {"backbone": backbone, **{key: value for key, value in source_config.to_dict().items() if key in known}}


def family_fields(backbone: str) -> set[str]:
    """Names of the fields that the family's configuration adds to those of every configuration."""
    family = CONFIG_MAPPING[backbone]
    declared = {field.name for field in dataclasses.fields(family)}
    return (declared | _UNDECLARED | set(family.attribute_map.values())) - BASE_FIELDS


def first_uses(physical_layers: list[int]) -> dict[int, int]:
    """Maps each physical layer to the first unrolled index at which it is applied."""
    uses: dict[int, int] = {}
    for unrolled, layer in enumerate(physical_layers):
        uses.setdefault(layer, unrolled)
    return uses
