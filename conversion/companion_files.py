"""What belongs to a checkpoint beside weights and configuration: tokenizer and generation settings."""

import shutil
from pathlib import Path

from transformers import GenerationConfig

from .checkpoint_writer import write_json
from .source_checkpoint import SourceCheckpoint, generation_settings


def copy_companions(source: SourceCheckpoint, folder: Path) -> None:
    """Copies the tokenizer and the generation settings of `source` to `folder`.

    Settings that the source does not have are written from its configuration (begin, end and padding tokens), as
    transformers does when it saves a model.

    Raises:
        ConversionError: if generation_config.json is no JSON.
    """
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    for path in source.companions:
        shutil.copyfile(path, folder / path.name)
    settings = generation_settings(source)
    if settings is not None:
        write_json(folder / "generation_config.json", settings)
        return
    tokens = {name: getattr(source.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**{name: value for name, value in tokens.items() if value is not None}).save_pretrained(folder)
