"""Saves checkpoints that carry their own code, flat and self-contained, with a complete `auto_map`.

The code loader of transformers reads one folder and follows one-level relative imports; the modules of this package
lie in two folders. So the closure of a model's modules is written beside the weights with its imports rewritten. The
same code works on such a copy, so that a model that was loaded by remote code saves as completely as an installed one.
"""

import ast
import sys
from pathlib import Path
from typing import Any, ClassVar

from transformers.models.auto import modeling_auto


def auto_map_of(classes: dict[str, type]) -> dict[str, str]:
    """The `auto_map` entries of a config.json, `{"AutoModel": "modeling_mor.MoRModel", ...}`."""
    return {auto: f"{_stem(cls.__module__)}.{cls.__name__}" for auto, cls in classes.items()}


def export_remote_code(folder: str | Path, classes: dict[str, type]) -> list[str]:
    """Writes every module that the classes need into `folder`.

    Args:
        folder: an existing folder.
        classes: classes by the Auto class that loads them.

    Returns:
        The file names.

    Raises:
        ValueError: if two modules would get the same file name, or an import cannot be flattened.
    """
    sources: dict[str, str] = {}
    for cls in classes.values():
        for name, source in _closure(cls.__module__).items():
            if sources.setdefault(name, source) != source:
                raise ValueError(f"two modules are both called {name}, but remote code is flat; rename one of them.")
    for name, source in sources.items():
        Path(folder, name).write_text(source, encoding="utf-8")
    return sorted(sources)


def register_class_names(model_type: str, classes: dict[str, type]) -> None:
    """Tells transformers the class names by model type, as Trainer's label smoothing and pipelines look them up."""
    tables = {
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    for auto, table in tables.items():
        table[model_type] = classes[auto].__name__


class RemoteCodeMixin:
    """Makes `save_pretrained`, and so `push_to_hub` and the checkpoints of every trainer, write the code too."""

    # Auto class -> class, set once for all classes of an architecture
    remote_classes: ClassVar[dict[str, type]] = {}

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> Any:
        if Path(save_directory).is_file():
            raise ValueError(f"`save_directory` is {str(save_directory)!r}, which is a file; give a folder.")
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            export_remote_code(save_directory, self.remote_classes)
        self.config.auto_map = auto_map_of(self.remote_classes)
        return super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)


def _stem(module_name: str) -> str:
    return module_name.rsplit(".", 1)[-1]


def _closure(module_name: str) -> dict[str, str]:
    """File name -> flattened source of a module and of all modules of this package that it imports."""
    pending, files = [module_name], {}
    while pending:
        name = pending.pop()
        file_name = f"{_stem(name)}.py"
        if file_name not in files:
            source = Path(sys.modules[name].__file__).read_text(encoding="utf-8")
            files[file_name], imported = _flatten(name, source)
            pending.extend(imported)
    return files


def _flatten(module_name: str, source: str) -> tuple[str, list[str]]:
    """Rewrites the relative imports of a module to one level; returns the source and the imported modules."""
    lines = source.splitlines(keepends=True)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]
    imported = []
    for node in sorted(imports, key=lambda node: node.lineno, reverse=True):
        target = ".".join([*module_name.split(".")[: -node.level], *(node.module or "").split(".")])
        if node.module is None or sys.modules[target].__file__.endswith("__init__.py"):
            raise ValueError(
                f"{module_name} imports from the package {target.rstrip('.')}, but remote code is flat; import "
                "from the module that defines the name."
            )
        imported.append(target)
        names = ", ".join(alias.name + (f" as {alias.asname}" if alias.asname else "") for alias in node.names)
        lines[node.lineno - 1 : node.end_lineno] = [f"from .{_stem(target)} import {names}\n"]
    return "".join(lines), imported
