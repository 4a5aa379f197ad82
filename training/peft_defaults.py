"""What PEFT adapts in this package's models where nothing is said: what it adapts in a Llama.

PEFT looks defaults up by `model_type` alone, and the layers of one architecture may come from any family. So each
entry names the part in all families; those that a model does not have match nothing.
"""

import importlib.util
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any


_CONSTANTS = "peft.utils.constants"
_TABLES = "TRANSFORMERS_MODELS_TO_"
# part of a Llama -> its names in all families, where they are other ones too
_ATTENTION = {"q_proj": ("q_proj", "qkv_proj"), "k_proj": ("k_proj", "qkv_proj"), "v_proj": ("v_proj", "qkv_proj")}
_BACKBONE = _ATTENTION | {
    "gate_proj": ("gate_proj", "gate_up_proj"),
    "up_proj": ("up_proj", "gate_up_proj", "c_fc"),
    "down_proj": ("down_proj", "c_proj"),
    "post_attention_layernorm": (
        "post_attention_layernorm",
        "post_self_attn_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "post_mlp_layernorm",
    ),
}
# the encoder of the prefix has keys and values of its own
_PREFIX = {
    "k_proj": ("k_proj", "prefix_k_proj"),
    "v_proj": ("v_proj", "prefix_v_proj"),
}
_NAMES: dict[str, Mapping[str, tuple[str, ...]]] = {"mor": _BACKBONE, "mod": _BACKBONE, "jrt": _PREFIX}


def register_peft_defaults() -> None:
    """Adds the architectures to PEFT's tables: now if PEFT is imported, else when it will be.

    PEFT takes as long to import as a good part of this package, and most uses do without it.
    """
    if _CONSTANTS in sys.modules:
        _fill(vars(sys.modules[_CONSTANTS]))
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _fill(constants: Mapping[str, Any]) -> None:
    """Adds a row for each architecture to every table that has one for Llama; rows that are there stay."""
    for name, table in constants.items():
        if not name.startswith(_TABLES) or not isinstance(table, MutableMapping):
            continue
        parts = table.get("llama")
        if not isinstance(parts, list):
            continue
        for model_type, names in _NAMES.items():
            table.setdefault(model_type, _distinct(n for part in parts for n in names.get(part, (part,))))


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


class _WhenImported(MetaPathFinder):
    """Fills the tables right after the module that holds them has run, and is gone."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if fullname != _CONSTANTS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_fill(module: ModuleType) -> None:
            run(module)
            _fill(vars(module))

        spec.loader.exec_module = run_and_fill  # type: ignore[method-assign]
        return spec
