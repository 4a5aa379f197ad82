"""The keys of a recipe beside its own: the fields of the architecture that it makes."""

import dataclasses
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from ..configuration.backbone_config import BackboneConfig
from ..configuration.configuration_jrt import JRTConfig
from ..configuration.configuration_mod import MoDConfig
from ..configuration.configuration_mor import MoRConfig
from ..configuration.routed_config import RoutedConfig
from .errors import ConversionError
from .recipe_reading import typed_value


# made of vanilla checkpoints
ROUTED: dict[str, type[RoutedConfig]] = {"mor": MoRConfig, "mod": MoDConfig}
CONFIGS: dict[str, type[PreTrainedConfig]] = {**ROUTED, "jrt": JRTConfig}
ARCHITECTURES = tuple(CONFIGS)
DEFAULT = "mor"  # what a vanilla checkpoint becomes where nothing is said
AUTO = "auto"  # value of `routed_layers` that has the layers chosen by measurement
ALIASES = {"recursions": "num_recursions"}  # other spellings of a field, as a key and as a flag

_CALIBRATED = {"compute", "compute_curve"}
_INHERITED = {field.name for field in dataclasses.fields(BackboneConfig)}
# what the weights of a JRT-RNN do not tell
_UNSEEN = {
    "num_attention_heads",
    "prefix_length",
    "short_prompt",
    "short_prompt_token_id",
    "sliding_window",
    "mlm_loss_weight",
    "mask_token_id",
    "residual_in_fp32",
    "rms_norm_eps",
}
# the fields of each architecture that a recipe may set; the depth follows from the source
FIELDS: dict[str, dict[str, Any]] = {
    name: {
        field.name: field.type
        for field in dataclasses.fields(config_class)
        if field.name not in _INHERITED | _CALIBRATED
    }
    for name, config_class in ROUTED.items()
}
FIELDS["jrt"] = {field.name: field.type for field in dataclasses.fields(JRTConfig) if field.name in _UNSEEN}
ALL_FIELDS: dict[str, Any] = {field: kind for fields in FIELDS.values() for field, kind in fields.items()}

# the routing that has no routers, and the fields that say something without them
WITHOUT_ROUTERS = {
    "mor": (
        "none",
        {
            "num_recursions",
            "sharing",
            "prelude_layers",
            "coda_layers",
            "routing",
            "kv_mode",
            "recursion_rank",
            "recursion_norms",
        },
    ),
    "mod": (
        "stochastic",
        {
            "routed_layers",
            "capacity",
            "capacity_multiple",
            "capacity_warmup_steps",
            "routing",
            "routing_unit",
            "always_route_first",
            "num_noop_experts",
        },
    ),
}


def owners(field: str) -> list[str]:
    """The architectures that have a field."""
    return [name for name, fields in FIELDS.items() if field in fields]


def checked_value(architecture: str, field: str, value: Any) -> Any:
    """The value of a field, in its type.

    Raises:
        ConversionError: if the architecture has no such field, or the value is of another type.
    """
    if field not in FIELDS[architecture]:
        raise misplaced(field, value, architecture, owners(field))
    kind = FIELDS[architecture][field]
    if field == "routed_layers" and value == AUTO:
        return value
    return typed_value(field, value, kind, ConversionError)


def misplaced(field: str, value: Any, architecture: str, users: list[str]) -> ConversionError:
    """The refusal of a key that belongs to another architecture."""
    return ConversionError(
        f"`{field}` is {value!r}, but only a conversion to {' or '.join(map(repr, users))} uses it; leave it out with "
        f"`to: {architecture}`, or use `--to {users[0]}`."
    )
