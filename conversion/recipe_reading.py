"""What recipes of every kind have in common: YAML files, shipped ones by name, known keys, values of their type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from huggingface_hub.dataclasses import type_validator


if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


def shipped_names(folder: Traversable) -> list[str]:
    """Names of the recipes in a folder of the package, without ending."""
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_mapping(path: str | Path, folder: Traversable, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """The content of a YAML file, or of a recipe in `folder` by its name without ending.

    Raises:
        ValueError: of the type `error`, if the file is missing or no YAML mapping.
    """
    path = Path(path)
    shipped = folder / f"{path.name}.yaml"
    try:
        text = shipped.read_text("utf-8") if not path.exists() and shipped.is_file() else path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise error(
            f"The recipe {path.name} cannot be read; give a YAML file or one of {', '.join(shipped_names(folder))}."
        ) from cause
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise error(f"The recipe {path.name} is no valid YAML{where}; one `key: value` per line is enough.") from cause
    if not isinstance(content, dict):
        raise error(f"The recipe {path.name} holds no `key: value` lines; see the recipes of the package.")
    return {str(key): value for key, value in content.items()}


def check_key(key: str, known: Iterable[str], owner: str, error: type[ValueError] = ValueError) -> None:
    """Refuses a key that is not known, with the one that was probably meant; `owner` is what has no such field."""
    known = sorted(known)
    if key not in known:
        guess = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean `{guess[0]}`?" if guess else f"known are {', '.join(known)}."
        raise error(f"`{key}` is no field of {owner}; {hint}")


def typed_value(field: str, value: Any, kind: Any, error: type[ValueError] = ValueError) -> Any:
    """The value of a field, of the annotated type `kind`.

    Raises:
        ValueError: of the type `error`, if it is of another.
    """
    if isinstance(value, str) and float in (kind, *get_args(kind)):  # YAML reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            pass
    try:
        type_validator(field.rsplit(".", 1)[-1], value, kind)
    except TypeError as cause:
        name = str(kind).removeprefix("<class '").removesuffix("'>")
        raise error(f"`{field}` is {value!r}, but must be of type {name}.") from cause
    return value
