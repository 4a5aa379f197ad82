"""The files that make up a checkpoint: what a conversion carries along, and what it may replace."""

from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path


TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
TEMPLATE_FOLDER = "additional_chat_templates"
_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "README.md",
    "varidepth_*.json",
    "varidepth_*.yaml",
    *TOKENIZER_FILES,
    *TERMS,
)
_FOLDERS = {TEMPLATE_FOLDER: "*.jinja", "__pycache__": "*.pyc"}
_CODE = ("configuration", "modeling")  # the sub-packages whose modules are exported flat as remote code


def term_files(folder: Path) -> list[Path]:
    """License, notice and use policy beside the weights in `folder`."""
    return sorted(path for path in folder.iterdir() if path.is_file() and _fits(path.name, TERMS))


def chat_templates(folder: Path) -> list[Path]:
    """The named chat templates in the sub-folder of `folder`."""
    return sorted(path for path in (folder / TEMPLATE_FOLDER).glob("*.jinja") if path.is_file())


def first_foreign_entry(folder: Path) -> str | None:
    """The first entry of `folder`, by name, that no checkpoint holds; None if there is none."""
    root = __package__.rpartition(".")[0]
    code = {entry.name for part in _CODE for entry in files(f"{root}.{part}").iterdir() if entry.name.endswith(".py")}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            pattern = _FOLDERS.get(path.name)
            if pattern is None:
                return path.name
            for entry in sorted(path.iterdir()):
                if entry.is_dir() or not fnmatchcase(entry.name, pattern):
                    return f"{path.name}/{entry.name}"
        elif path.is_dir() or not (_fits(path.name, _FILES) or path.name in code):
            return path.name
    return None


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
