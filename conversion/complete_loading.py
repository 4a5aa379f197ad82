"""Loads a model whose weights are all in its checkpoint; transformers makes up what is missing."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from .source_checkpoint import DERIVED


def load_complete(folder: str | Path, name: str, **options: Any) -> Any:
    """The causal language model of a checkpoint.

    Args:
        folder: of the checkpoint, or its Hub id.
        name: for messages.
        options: of `from_pretrained`.

    Raises:
        ValueError: if weights and configuration are not of the same model.
    """
    # sizes that differ are reported by name like the rest, instead of in a table of transformers
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, info = loaded
    problems = (
        ("missing_keys", "lacks", "its configuration needs"),
        ("mismatched_keys", "has in another size", "its configuration asks for"),
        ("unexpected_keys", "holds", "its configuration does not know"),
    )
    for kind, verb, reason in problems:
        keys = sorted(key if isinstance(key, str) else key[0] for key in info[kind])
        keys = [key for key in keys if not DERIVED.search(key)]
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(
                f"The checkpoint {name} {verb} the weight {keys[0]}{more}, which {reason}; give weights and "
                "config.json of the same model."
            )
    return model
