"""The checkpoint of a healed model: everything that the converted one had, with what healing did in its card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import PreTrainedModel

from ..conversion.checkpoint_writer import check_output, new_folder
from ..conversion.companion_files import copy_files, files_without


if TYPE_CHECKING:
    from ..conversion.source_checkpoint import SourceCheckpoint
    from .healing_run import Healed, HealingSettings

_UNMEASURED = "**Nothing about the quality of this checkpoint has been measured.**"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def write_healed(
    model: PreTrainedModel,
    checkpoint: SourceCheckpoint,
    output: Path,
    settings: HealingSettings,
    healed: Healed,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a folder that appears only when it is complete.

    Args:
        model: the healed model.
        checkpoint: what it was before; its tokenizer, terms of use and card are taken over.
        output: folder to make.
        settings, healed: go into the card.
        overwrite: replace a checkpoint that is in `output`.

    Raises:
        ConversionError: if the output is not free or cannot be written.
    """
    check_output(output, checkpoint.folder, overwrite=overwrite)
    files = files_without(checkpoint.folder, *_WEIGHTS)
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) + sum(p.stat().st_size for p in files)
    with new_folder(output, needed, overwrite=overwrite) as folder:
        copy_files(files, checkpoint.folder, folder)
        model.save_pretrained(folder)
        card = folder / "README.md"
        text = card.read_text("utf-8") if card.is_file() else f"# {output.name}\n"
        card.write_text(_with_healing(text, settings, healed), encoding="utf-8")


def _with_healing(card: str, settings: HealingSettings, healed: Healed) -> str:
    values: dict[str, Any] = {
        name: value if isinstance(value, int | float | str | None) else repr(value)
        for name, value in dataclasses.asdict(settings).items()
    }
    logs = [entry for entry in healed.log if "kl" in entry]
    trained = f"Distilled from its source on {healed.tokens} tokens in {healed.steps} steps"
    if logs:
        trained += f"; KL divergence from it on the text of training {logs[0]['kl']:.3f} -> {logs[-1]['kl']:.3f} nats"
    section = f"\n## Healing\n\n{trained}.\n\n```yaml\n{yaml.safe_dump(values, sort_keys=False)}```\n"
    if healed.calibration is not None:
        section += f"\n```\n{healed.calibration.table()}\n```\n"
    before, references, after = card.partition("\n## References")
    return (
        before.replace(_UNMEASURED, "See Healing below for what is known of its quality.")
        + section
        + references
        + after
    )
