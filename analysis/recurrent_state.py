"""What a JRT-RNN remembers of a sequence, in bytes: as much after a million tokens as after a window of them."""

from dataclasses import dataclass, fields

from ..configuration.configuration_jrt import JRTConfig
from ..modeling.feature_maps import find_feature_map


@dataclass(frozen=True)
class StateBytes:
    """Bytes of the cache of one sequence, by the mixer that needs them (JRT paper, figure 2).

    Attributes:
        linear_attention: states of prefix linear attention, in fp32 or wider, with their normalisers.
        sliding_attention: keys and values of a full window; a query sees itself without the cache.
        conv: inputs of the short convolutions, one for each tap.
    """

    linear_attention: int
    sliding_attention: int
    conv: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def state_bytes(config: JRTConfig, bytes_per_value: int = 4) -> StateBytes:
    """The state of one sequence that is longer than the window.

    Args:
        config: of a JRT-RNN.
        bytes_per_value: of the model's weights, 2 for bfloat16.
    """
    features = find_feature_map(config.feature_map).size(config.feature_dim)
    key_values = (config.num_key_value_heads or config.num_attention_heads) * config.head_dim
    each = {
        "linear_attention": config.num_attention_heads * features * (config.head_dim + 1) * max(bytes_per_value, 4),
        "sliding_attention": (config.sliding_window - 1) * 2 * key_values * bytes_per_value,
        "conv": config.conv_kernel_size * 2 * config.hidden_size * bytes_per_value,
    }
    layers = list(config.layer_types or ())
    return StateBytes(**{kind: layers.count(kind) * size for kind, size in each.items()})
