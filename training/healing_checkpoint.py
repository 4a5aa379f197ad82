"""The checkpoint of a healed model: everything that the converted one had, with what healing did in its card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from transformers import PreTrainedModel

from ..conversion.checkpoint_writer import check_output, new_folder
from ..conversion.companion_files import copy_files, files_without
from ..model_cards.healed_card import add_healing


if TYPE_CHECKING:
    from ..conversion.source_checkpoint import SourceCheckpoint
    from .healing_run import Healed, HealingSettings

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def write_healed(
    model: PreTrainedModel,
    checkpoint: SourceCheckpoint,
    output: Path,
    settings: HealingSettings,
    healed: Healed,
    text: str,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a folder that appears only when it is complete, with weights of the type that they had before.

    Args:
        model: the healed model; its weights are left in the type of the checkpoint.
        checkpoint: what it was before; its tokenizer, terms of use and card are taken over.
        output: folder to make.
        settings, healed: go into the card.
        text: what was read, by a name that may be published.
        overwrite: replace a checkpoint that is in `output`.

    Raises:
        ConversionError: if the output is not free or cannot be written.
    """
    check_output(output, checkpoint.folder, overwrite=overwrite)
    _cast(model, checkpoint.config.dtype or torch.float32)
    files = files_without(checkpoint.folder, *_WEIGHTS)
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) + sum(p.stat().st_size for p in files)
    with new_folder(output, needed, overwrite=overwrite) as folder:
        copy_files(files, checkpoint.folder, folder)
        model.save_pretrained(folder)
        values: dict[str, Any] = {
            name: value if isinstance(value, int | float | str | None) else repr(value)
            for name, value in dataclasses.asdict(settings).items()
        }
        calibration = None if healed.calibration is None else healed.calibration.table()
        add_healing(folder, _trained(healed, text), yaml.safe_dump(values, sort_keys=False), calibration)


def _cast(model: Any, dtype: Any) -> None:
    """As transformers loads it: what is kept in fp32 stays in fp32."""
    kept = tuple(f"model.{name}" for name in model.model._keep_in_fp32_modules_strict)
    for name, parameter in model.named_parameters():
        if not name.startswith(kept):
            parameter.data = parameter.data.to(dtype)


def _trained(healed: Healed, text: str) -> str:
    logs = [entry for entry in healed.log if "kl" in entry]
    trained = f"Distilled from its source on {healed.tokens} tokens of `{text}` in {healed.steps} steps"
    if logs:
        trained += f" (KL divergence from it on the text of training {logs[0]['kl']:.3f} -> {logs[-1]['kl']:.3f} nats)"
    return trained
