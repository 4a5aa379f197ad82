"""What the configurations of all architectures share."""

import dataclasses
import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.configuration_utils import PreTrainedConfig


# what transformers itself writes into a config.json or passes to a config beside the dataclass fields
METADATA = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "tie_last_hidden_states",
    "torch_dtype",
}
ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"}
BASE_FIELDS = {field.name for field in dataclasses.fields(PreTrainedConfig)}


def is_transformers_key(key: str) -> bool:
    """Whether transformers itself knows this key of every configuration."""
    return key in METADATA | BASE_FIELDS or key in GenerationConfig._get_default_generation_params()


def unknown_key(key: str, owner: str, known: Iterable[str]) -> ValueError:
    """The error for a key that nobody knows; `owner` says whose field it is not."""
    guess = difflib.get_close_matches(key, sorted(known), n=1)
    return ValueError(f"`{key}` is {owner}" + (f"; did you mean `{guess[0]}`?" if guess else "; remove it."))


def check_choice(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises a `ValueError` that names the field, the value and what is allowed."""
    if value not in allowed:
        guess = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {guess[0]!r}?" if guess else "."
        raise ValueError(f"`{field}` is {value!r}, but must be one of {', '.join(map(repr, allowed))}{hint}")


class CodeKeepingConfig:
    """Mixed into a configuration whose checkpoints carry their own code."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As in transformers; drops an `auto_map` whose code files do not lie in the folder."""
        auto_map = getattr(self, "auto_map", None)
        references = [reference for reference in (auto_map or {}).values() if isinstance(reference, str)]
        files = [f"{reference.split('--')[-1].split('.')[0]}.py" for reference in references]
        if not all(Path(save_directory, file).is_file() for file in files):
            self.auto_map = {}
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            if auto_map:
                self.auto_map = auto_map
