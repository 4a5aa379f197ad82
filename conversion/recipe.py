"""A recipe: everything that decides what a conversion makes, as flags, keyword arguments or a YAML file."""

import dataclasses
import difflib
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from huggingface_hub.dataclasses import type_validator

from ..configuration.backbone_config import BackboneConfig
from ..configuration.configuration_mor import MoRConfig
from .errors import ConversionError
from .layer_maps import INITIALISATIONS


ARCHITECTURES = ("mor",)
ROUTER_INITS = ("on", "random")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALIASES = {"recursions": "num_recursions"}  # other spellings of a field, as a key and as a flag
_VANILLA_DEFAULTS: dict[str, Any] = {"init": "stepwise", "seed": 0, "drop_layers": False}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# the fields of MoRConfig that a recipe may set; the depth follows from the source
MOR_FIELDS = {
    field.name: field.type
    for field in dataclasses.fields(MoRConfig)
    if field.name not in {f.name for f in dataclasses.fields(BackboneConfig)}
}


# those that say nothing without routers
ROUTING_FIELDS = tuple(
    sorted(MOR_FIELDS.keys() - {"num_recursions", "sharing", "prelude_layers", "coda_layers", "routing", "kv_mode"})
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """
    Args:
        to (`str`): architecture to make; `mor`.
        init (`str`, *optional*):
            How the shared layers are made of the source's, one of `INITIALISATIONS`; `stepwise` by default.
        seed (`int`, *optional*): of everything random, `init: random` and fresh router weights; 0 by default.
        dtype (`str`, *optional*): type of the weights; that of the source by default.
        drop_layers (`bool`, *optional*):
            Drop source layers where the depth does not divide (the official code), instead of keeping them unique.
        router_init (`str`, *optional*):
            `on` (default): zero weights and a bias that lets every token through, which needs `gating: interpolate` to
            be exact; `random`: N(0, initializer_range) and the gating of the paper.
        max_shard_size (`str`): largest weight file, such as "5GB".
        base_model (`str`, *optional*): Hub id of the source for the model card, where the source is a local copy.
        source (`str`, *optional*): what to convert, where neither flag nor argument says so.
        revision (`str`, *optional*): branch, tag or commit of a Hub source.
        mor (`dict`): fields of `MoRConfig`.
    """

    to: str = "mor"
    init: str | None = None
    seed: int | None = None
    dtype: str | None = None
    drop_layers: bool | None = None
    router_init: str | None = None
    max_shard_size: str = "5GB"
    base_model: str | None = None
    source: str | None = None
    revision: str | None = None
    mor: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for field, allowed in (
            ("to", ARCHITECTURES),
            ("init", (None, *INITIALISATIONS)),
            ("router_init", (None, *ROUTER_INITS)),
            ("dtype", (None, *DTYPES)),
        ):
            if getattr(self, field) not in allowed:
                names = ", ".join(repr(value) for value in allowed if value is not None)
                raise ConversionError(f"`{field}` is {getattr(self, field)!r}, but must be one of {names}.")
        if self.seed is not None:
            _check_type("seed", self.seed, int)
        if self.drop_layers is not None:
            _check_type("drop_layers", self.drop_layers, bool)
        for field in ("base_model", "source", "revision"):
            if getattr(self, field) is not None:
                _check_type(field, getattr(self, field), str)
        for field, value in self.mor.items():
            try:
                type_validator(field, value, MOR_FIELDS[field])
            except TypeError as error:
                kind = str(MOR_FIELDS[field]).removeprefix("<class '").removesuffix("'>")
                raise ConversionError(f"`{field}` is {value!r}, but must be of type {kind}.") from error
        self.max_shard_bytes  # noqa: B018  refuses a size that cannot be read

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        text = str(self.max_shard_size).strip().upper().replace(" ", "")
        digits = text.rstrip("KMGIB")
        try:
            size = float(digits) * _UNITS[text[len(digits) :]]
        except (ValueError, KeyError):
            size = 0
        if size < 1:
            raise ConversionError(
                f"`max_shard_size` is {self.max_shard_size!r}, but must be a size such as '5GB' or '500MB'."
            )
        return int(size)

    def for_vanilla(self) -> "Recipe":
        """The recipe with the defaults for a vanilla source filled in.

        Raises:
            ConversionError: if it sets up routers that its routing does not have.
        """
        unset: dict[str, Any] = {key: value for key, value in _VANILLA_DEFAULTS.items() if getattr(self, key) is None}
        if self.mor.get("routing") != "none":
            return dataclasses.replace(self, **unset, router_init=self.router_init or "on")
        given = ["router_init"] if self.router_init == "random" else []
        given += [field for field in ROUTING_FIELDS if self.mor.get(field) is not None]
        if given:
            value = self.router_init if given[0] == "router_init" else self.mor[given[0]]
            raise ConversionError(
                f"`{given[0]}` is {value!r}, but routing='none' has no router; leave it out or choose another routing."
            )
        return dataclasses.replace(self, **unset, router_init=None)

    def for_official(self) -> "Recipe":
        """The recipe for an official MoR checkpoint, whose layers and routers are taken as they are.

        Raises:
            ConversionError: if it says how layers or routers are to be made.
        """
        for field in (*_VANILLA_DEFAULTS, "router_init"):
            if getattr(self, field) is not None:
                raise ConversionError(
                    f"`{field}` is {getattr(self, field)!r}, but the layers and routers of an official MoR checkpoint "
                    "are taken as they are; leave it out."
                )
        return self

    @classmethod
    def make(cls, base: "Recipe | None" = None, **fields: Any) -> "Recipe":
        """A recipe from flat keyword arguments; `None` leaves the value of `base`, or the default.

        Raises:
            ConversionError: for a key that neither a recipe nor `MoRConfig` has, and a value that is not allowed.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"mor"}
        known = own | set(MOR_FIELDS)
        spelt: dict[str, Any] = {}
        for key, value in fields.items():
            name = ALIASES.get(key.replace("-", "_"), key.replace("-", "_"))
            if name in spelt:
                raise ConversionError(f"`{name}` is given twice; give it once.")
            spelt[name] = value
        for key in spelt:
            if key not in known:
                guess = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean `{guess[0]}`?" if guess else f"known are {', '.join(sorted(known))}."
                raise ConversionError(f"`{key}` is no field of a recipe; {hint}")
        given = {key: value for key, value in spelt.items() if value is not None}
        settings = {key: value for key, value in given.items() if key in own}
        if settings.get("router_init") is True:  # YAML reads a bare `on` as true
            settings["router_init"] = "on"
        mor = {key: _number(value, MOR_FIELDS[key]) for key, value in given.items() if key in MOR_FIELDS}
        if base is not None:
            return dataclasses.replace(base, **settings, mor={**base.mor, **mor})
        return cls(**settings, mor=mor)

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Reads a YAML file, or a recipe that comes with the package by its name without ending.

        Raises:
            ConversionError: if the file is missing, no YAML mapping, or holds an unknown key.
        """
        path = Path(path)
        shipped = files(__package__) / "recipes" / f"{path.name}.yaml"
        try:
            text = shipped.read_text("utf-8") if not path.exists() and shipped.is_file() else path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConversionError(
                f"The recipe {path.name} cannot be read; give a YAML file or one of {', '.join(shipped_recipes())}."
            ) from error
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" in line {mark.line + 1}" if mark else ""
            raise ConversionError(
                f"The recipe {path.name} is no valid YAML{where}; one `key: value` per line is enough."
            ) from error
        if not isinstance(content, dict):
            raise ConversionError(
                f"The recipe {path.name} holds no `key: value` lines; see the recipes of the package."
            )
        return cls.make(None, **{str(key): value for key, value in content.items()})

    def to_dict(self) -> dict[str, Any]:
        """Flat, as in YAML; what is not set is left out."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "mor"}
        return {key: value for key, value in {**own, **self.mor}.items() if value is not None}

    def to_yaml(self) -> str:
        """The recipe as a YAML file that `load` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in (files(__package__) / "recipes").iterdir())


def _check_type(field: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConversionError(f"`{field}` is {value!r}, but must be of type {kind.__name__}.")


def _number(value: Any, kind: Any) -> Any:
    """YAML reads 1e-3 as text; where the field is a number it is one."""
    if isinstance(value, str) and float in get_args(kind):
        try:
            return float(value)
        except ValueError:
            return value
    return value
