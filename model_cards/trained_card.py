"""The model card of a training run."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers.configuration_utils import PreTrainedConfig

from ..conversion.checkpoint_files import term_files
from .card import fill_card, link_to, save_card


_NAMES = {
    "mor": ("Mixture-of-Recursions (MoR)", "mixture-of-recursions"),
    "mod": ("Mixture-of-Depths (MoD)", "mixture-of-depths"),
    "jrt": ("JRT-RNN (Just Read Twice)", "jrt"),
}
_REMOTE_CODE = """
The code in this repository is self-contained. Where varidepth is installed, `import varidepth` takes the place of
`trust_remote_code=True`.
"""


@dataclass(frozen=True)
class Origin:
    """What a training began with.

    Attributes:
        name: how to call it.
        base_model: Hub id, if known.
        license: fields of its card's metadata.
        folder: of its terms of use.
    """

    name: str
    base_model: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None


def write_trained_card(
    folder: Path, config: PreTrainedConfig, recipe: str, facts: Mapping[str, str], origin: Origin | None = None
) -> None:
    """Writes the README.md of a trained checkpoint, its recipe, and the terms of use that it inherits.

    Args:
        folder (`Path`): the checkpoint.
        config: of the model.
        recipe: YAML text, echoed.
        facts: of the run, as a table.
        origin: what the training began with; `None` from scratch.
    """
    ours = config.model_type in _NAMES
    name, tag = _NAMES.get(config.model_type, (f"{config.model_type} language model", config.model_type))
    rows = [f"| {key} | {value} |" for key, value in facts.items()]
    text = fill_card(
        "trained_card.md",
        title=folder.resolve().name,
        architecture=name,
        origin=f", from {link_to(origin.base_model, origin.name)} on" if origin else "",
        facts="\n".join(["| | |", "|---|---|", *rows]),
        options=", trust_remote_code=True" if ours else "",
        code=_REMOTE_CODE if ours else "",
        recipe=recipe,
    )
    (folder / "varidepth_training.yaml").write_text(recipe, encoding="utf-8")
    if origin is not None and origin.folder is not None:
        for path in term_files(origin.folder):
            shutil.copyfile(path, folder / path.name)
    tags = ["custom_code", "varidepth", tag] if ours else ["varidepth"]
    save_card(folder, text, origin.base_model if origin else None, dict(origin.license) if origin else {}, tags)
