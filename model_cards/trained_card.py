"""The model card of a training run."""

from collections.abc import Mapping
from pathlib import Path

from transformers.configuration_utils import PreTrainedConfig

from .card import _fill, _save


_NAMES = {
    "mor": ("Mixture-of-Recursions (MoR)", "mixture-of-recursions"),
    "mod": ("Mixture-of-Depths (MoD)", "mixture-of-depths"),
    "jrt": ("JRT-RNN (Just Read Twice)", "jrt"),
}


def write_trained_card(folder: Path, config: PreTrainedConfig, recipe: str, facts: Mapping[str, str]) -> None:
    """Writes the README.md of a trained checkpoint, and its recipe beside it.

    Args:
        folder (`Path`): the checkpoint.
        config: of the model.
        recipe: YAML text, echoed.
        facts: of the run, as a table.
    """
    name, tag = _NAMES.get(config.model_type, (f"{config.model_type} language model", config.model_type))
    rows = [f"| {key} | {value} |" for key, value in facts.items()]
    text = _fill(
        "trained_card.md",
        title=folder.resolve().name,
        architecture=name,
        facts="\n".join(["| | |", "|---|---|", *rows]),
        recipe=recipe,
    )
    (folder / "varidepth_training.yaml").write_text(recipe, encoding="utf-8")
    _save(folder, text, None, {}, ["custom_code", "varidepth", tag] if config.model_type in _NAMES else ["varidepth"])
