"""What belongs to a checkpoint beside weights and configuration: tokenizer, generation settings, terms of use."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from .checkpoint_files import TEMPLATE_FOLDER, chat_templates, term_files
from .checkpoint_writer import write_json
from .source_checkpoint import SourceCheckpoint, generation_settings
from .tensor_source import read_json


def copy_companions(source: SourceCheckpoint, folder: Path) -> None:
    """Copies the tokenizer, its chat templates, the generation settings and the license of `source` to `folder`.

    Settings that the source does not have are written from its configuration (begin, end and padding tokens), as
    transformers does when it saves a model.

    Raises:
        ConversionError: if generation_config.json is no JSON.
    """
    tokenizer = source.tokenizer
    if tokenizer is None and source.companions and not _names_its_class(source.folder):
        # AutoTokenizer found the class by the source's model type, which the new checkpoint does not have
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
    for path in source.companions + term_files(source.folder):
        shutil.copyfile(path, folder / path.name)
    templates = chat_templates(source.folder) if source.companions else []
    if templates:
        (folder / TEMPLATE_FOLDER).mkdir()
    for path in templates:
        shutil.copyfile(path, folder / TEMPLATE_FOLDER / path.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    settings = generation_settings(source)
    if settings is not None:
        write_json(folder / "generation_config.json", settings)
        return
    tokens = {name: getattr(source.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**{name: value for name, value in tokens.items() if value is not None}).save_pretrained(folder)


def files_without(folder: Path, *patterns: str) -> list[Path]:
    """All files in a folder and below it, but those in the folder itself that match a pattern."""
    left_out = {path for pattern in patterns for path in folder.glob(pattern)}
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in left_out]


def copy_files(files: Iterable[Path], source: Path, target: Path) -> None:
    """Copies files of the folder `source` to the same places in `target`."""
    for path in files:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _names_its_class(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("tokenizer_class"))
