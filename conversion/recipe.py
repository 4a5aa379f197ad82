"""A recipe: everything that decides what a conversion makes, as flags, keyword arguments or a YAML file."""

import dataclasses
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from .errors import ConversionError
from .layer_maps import INITIALISATIONS
from .recipe_fields import (
    ALIASES,
    ALL_FIELDS,
    ARCHITECTURES,
    AUTO,
    DEFAULT,
    FIELDS,
    WITHOUT_ROUTERS,
    checked_value,
    misplaced,
)
from .recipe_reading import check_key, read_mapping, shipped_names


ROUTER_INITS = ("on", "random")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# settings that only one architecture has, with the default for a vanilla source
_OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "mor": {"init": "stepwise", "drop_layers": False},
    "mod": {"num_routed_layers": None, "calibration_text": None},
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """
    Args:
        to (`str`, *optional*):
            architecture to make, `mor`, `mod` or `jrt`; by default that of an official checkpoint, and `mor` of a
            vanilla one.
        init (`str`, *optional*):
            MoR: how the shared layers are made of the source's, one of `INITIALISATIONS`; `stepwise` by default.
        seed (`int`, *optional*): of everything random, `init: random` and fresh router weights; 0 by default.
        dtype (`str`, *optional*): type of the weights; that of the source by default.
        drop_layers (`bool`, *optional*):
            MoR: drop source layers where the depth does not divide (the official code), instead of keeping them
            unique.
        num_routed_layers (`int`, *optional*): MoD: how many layers `routed_layers: auto` chooses; half by default.
        calibration_text (`str`, *optional*):
            MoD: file on which `routed_layers: auto` measures; the `pydoc` topics by default.
        router_init (`str`, *optional*):
            `on` (default): routers that let every token through with a gate of exactly 1; `random`:
            N(0, initializer_range) and the gate of the paper.
        max_shard_size (`str`): largest weight file, such as "5GB".
        base_model (`str`, *optional*): Hub id of the source for the model card, where the source is a local copy.
        source (`str`, *optional*): what to convert, where neither flag nor argument says so.
        revision (`str`, *optional*): branch, tag or commit of a Hub source.
        fields (`dict`): fields of the architecture's configuration; `routed_layers` may be `auto`.
    """

    to: str | None = None
    init: str | None = None
    seed: int | None = None
    dtype: str | None = None
    drop_layers: bool | None = None
    num_routed_layers: int | None = None
    calibration_text: str | None = None
    router_init: str | None = None
    max_shard_size: str = "5GB"
    base_model: str | None = None
    source: str | None = None
    revision: str | None = None
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for field, allowed in (
            ("to", (None, *ARCHITECTURES)),
            ("init", (None, *INITIALISATIONS)),
            ("router_init", (None, *ROUTER_INITS)),
            ("dtype", (None, *DTYPES)),
        ):
            if getattr(self, field) not in allowed:
                names = ", ".join(repr(value) for value in allowed if value is not None)
                raise ConversionError(f"`{field}` is {getattr(self, field)!r}, but must be one of {names}.")
        for owner, settings in _OWN_SETTINGS.items():
            for field in settings:
                if owner != (self.to or DEFAULT) and getattr(self, field) is not None:
                    raise misplaced(field, getattr(self, field), self.to or DEFAULT, [owner])
        for kind, names in (
            (int, ("seed", "num_routed_layers")),
            (bool, ("drop_layers",)),
            (str, ("base_model", "source", "revision", "calibration_text")),
        ):
            for field in names:
                if getattr(self, field) is not None:
                    _check_type(field, getattr(self, field), kind)
        object.__setattr__(self, "fields", {k: checked_value(self._user_of(k), k, v) for k, v in self.fields.items()})
        if self.fields.get("routed_layers") != AUTO:
            for field in ("num_routed_layers", "calibration_text"):
                if getattr(self, field) is not None:
                    raise ConversionError(
                        f"`{field}` is {getattr(self, field)!r}, but only `routed_layers: auto` measures layers; "
                        "add `--routed-layers auto` or leave it out."
                    )
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

    def _user_of(self, field: str) -> str:
        """The architecture that must have a field; without `to` it is the source that tells."""
        return self.to or ("jrt" if field in FIELDS["jrt"] else DEFAULT)

    def with_fields(self, **fields: Any) -> "Recipe":
        """The recipe with fields of the architecture laid over it."""
        return dataclasses.replace(self, fields={**self.fields, **fields})

    def with_chosen_layers(self, layers: list[int]) -> "Recipe":
        """The recipe with the layers that `auto` stood for; nothing of the measurement, whose text may be local."""
        chosen = {**self.fields, "routed_layers": layers}
        return dataclasses.replace(self, num_routed_layers=None, calibration_text=None, fields=chosen)

    def for_vanilla(self) -> "Recipe":
        """The recipe with the settings for a vanilla source filled in.

        Raises:
            ConversionError: if it sets up routers that its routing does not have.
        """
        to = self.to or DEFAULT
        defaults = {"to": to, "seed": 0, **_OWN_SETTINGS[to]}
        unset: dict[str, Any] = {key: value for key, value in defaults.items() if getattr(self, key) is None}
        without_routers, general = WITHOUT_ROUTERS[to]
        if self.fields.get("routing") != without_routers:
            return dataclasses.replace(self, **unset, router_init=self.router_init or "on")
        given = {"router_init": "random"} if self.router_init == "random" else {}
        given |= {field: value for field, value in sorted(self.fields.items()) if field not in general}
        for field, value in given.items():
            raise ConversionError(
                f"`{field}` is {value!r}, but routing={without_routers!r} has no router; leave it out or choose "
                "another routing."
            )
        return dataclasses.replace(self, **unset, router_init=None)

    def for_official(self, architecture: str) -> "Recipe":
        """The recipe for an official checkpoint of an architecture, whose layers and routers are taken as they are.

        Raises:
            ConversionError: if it makes something else, or says how layers or routers are to be made.
        """
        if self.to not in (None, architecture):
            raise ConversionError(
                f"`to` is {self.to!r}, but the source is an official checkpoint of {architecture!r}; use `--to "
                f"{architecture}`, or give a vanilla source."
            )
        for field in ("init", "seed", "drop_layers", "router_init"):
            if getattr(self, field) is not None:
                raise ConversionError(
                    f"`{field}` is {getattr(self, field)!r}, but the layers and routers of an official checkpoint are "
                    "taken as they are; leave it out."
                )
        for field in ("recursion_rank", "recursion_norms"):
            if self.fields.get(field):
                raise ConversionError(
                    f"`{field}` is {self.fields[field]!r}, but the recursions of an official checkpoint share all "
                    "weights; leave it out."
                )
        return dataclasses.replace(self, to=architecture)

    @classmethod
    def make(cls, base: "Recipe | None" = None, **fields: Any) -> "Recipe":
        """A recipe from flat keyword arguments; `None` leaves the value of `base`, or the default.

        Raises:
            ConversionError: for a key that neither a recipe nor its architecture has, and a value that is not allowed.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"fields"}
        known = own | set(ALL_FIELDS)
        spelt: dict[str, Any] = {}
        for key, value in fields.items():
            name = ALIASES.get(key.replace("-", "_"), key.replace("-", "_"))
            if name in spelt:
                raise ConversionError(f"`{name}` is given twice; give it once.")
            spelt[name] = value
        for key in spelt:
            check_key(key, known, "a recipe", ConversionError)
        given: dict[str, Any] = {k: str(v) if isinstance(v, Path) else v for k, v in spelt.items() if v is not None}
        settings = {key: value for key, value in given.items() if key in own}
        if settings.get("router_init") is True:  # YAML reads a bare `on` as true
            settings["router_init"] = "on"
        laid_over = {key: value for key, value in given.items() if key not in own}
        if base is not None:
            return dataclasses.replace(base, **settings, fields={**base.fields, **laid_over})
        return cls(**settings, fields=laid_over)

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Reads a YAML file, or a recipe that comes with the package by its name without ending.

        Raises:
            ConversionError: if the file is missing, no YAML mapping, or holds an unknown key.
        """
        return cls.make(None, **read_mapping(path, files(__package__) / "recipes", ConversionError))

    def to_dict(self) -> dict[str, Any]:
        """Flat, as in YAML; what is not set is left out."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "fields"}
        return {key: value for key, value in {**own, **self.fields}.items() if value is not None}

    def to_yaml(self) -> str:
        """The recipe as a YAML file that `load` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return shipped_names(files(__package__) / "recipes")


def _check_type(field: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConversionError(f"`{field}` is {value!r}, but must be of type {kind.__name__}.")
