"""`varidepth convert SOURCE -o OUT --to mor ...`"""

import argparse
import dataclasses
import re
import types
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from ..configuration.configuration_jrt import SHORT_PROMPTS
from ..configuration.configuration_mod import GATES, MOD_ROUTINGS, ROUTING_UNITS, MoDConfig
from ..configuration.configuration_mor import (
    BALANCINGS,
    GATINGS,
    KV_MODES,
    ROUTER_ACTIVATIONS,
    ROUTER_TYPES,
    ROUTINGS,
    SHARINGS,
    MoRConfig,
)
from ..conversion.convert import convert
from ..conversion.layer_maps import INITIALISATIONS
from ..conversion.recipe import DTYPES, ROUTER_INITS, Recipe, shipped_recipes
from ..conversion.recipe_fields import ALIASES, ALL_FIELDS, ARCHITECTURES, AUTO, CONFIGS, owners


def _merged(*names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in names for name in group))


# of all architectures; each refuses what it does not have
_CHOICES = {
    "sharing": SHARINGS,
    "routing": _merged(ROUTINGS, MOD_ROUTINGS),
    "router_type": tuple(ROUTER_TYPES),
    "router_activation": _merged(*ROUTER_ACTIVATIONS.values()),
    "gating": GATINGS,
    "gate": tuple(GATES),
    "routing_unit": ROUTING_UNITS,
    "inference_rule": _merged(MoRConfig.inference_rules, MoDConfig.inference_rules),
    "balancing": BALANCINGS,
    "kv_mode": KV_MODES,
    "short_prompt": SHORT_PROMPTS,
}
# described within other fields of MoRConfig
_HELP = {
    "balancing_coef": "Weight of the balancing loss.",
    "balancing_update_rate": "Step of the bias with loss-free balancing.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of a recipe; a flag goes before the recipe file."""
    parser.add_argument("source", nargs="?", help="folder, GGUF file or Hub id (or `source` in the recipe)")
    parser.add_argument("-o", "--output", help="folder to make")
    parser.add_argument("--recipe", help=f"YAML file, or a shipped recipe: {', '.join(shipped_recipes())}")
    parser.add_argument(
        "--to", choices=ARCHITECTURES, help="architecture (default: that of an official checkpoint, else mor)"
    )
    parser.add_argument("--init", choices=INITIALISATIONS, help="MoR: how shared layers are made (default: stepwise)")
    parser.add_argument("--num-routed-layers", type=int, help="MoD: of `--routed-layers auto` (default: half of all)")
    parser.add_argument("--calibration-text", help="MoD: file on which `auto` measures (default: the pydoc topics)")
    parser.add_argument("--router-init", choices=ROUTER_INITS, help="`on`: start at full depth (default)")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: that of the source)")
    parser.add_argument("--seed", type=int, help="of everything random (default: 0)")
    parser.add_argument(
        "--drop-layers", action="store_true", default=None, help="MoR: drop layers where the depth does not divide"
    )
    parser.add_argument("--max-shard-size", help="largest weight file, such as 5GB (default)")
    parser.add_argument("--base-model", help="Hub id of the source for the model card")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub source")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in the output folder")
    parser.add_argument("--quiet", action="store_true", help="print neither plan nor progress")
    groups: dict[str, Any] = {}
    for field, kind in ALL_FIELDS.items():
        flags = [f"--{name.replace('_', '-')}" for name in (*_spellings(field), field)]
        options = {"choices": _CHOICES[field]} if field in _CHOICES else _value_options(field, kind)
        text = field_help(field).replace("%", "%%")
        title = f"fields of {' and '.join(CONFIGS[name].__name__ for name in owners(field))}"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(*flags, dest=field, default=None, help=text, **options)


def run(args: argparse.Namespace) -> None:
    """Converts as the flags say."""
    if args.quiet:
        _silence()
    names = {field.name for field in dataclasses.fields(Recipe)} - {"fields", "source", "revision"} | set(ALL_FIELDS)
    fields = {name: getattr(args, name) for name in sorted(names) if getattr(args, name) is not None}
    convert(
        args.source,
        args.output,
        args.recipe,
        revision=args.revision,
        dry_run=args.dry_run,
        overwrite=args.overwrite,
        quiet=args.quiet and not args.dry_run,
        **fields,
    )


def field_help(field: str) -> str:
    """First sentence on a field in the documentation of each configuration that has it."""
    sentences: dict[str, list[str]] = {}
    for name in owners(field):
        documented = [field_descriptions(c.__dict__.get("__doc__") or "").get(field) for c in CONFIGS[name].__mro__]
        text = next((text for text in documented if text), _HELP.get(field, ""))
        sentences.setdefault(text, []).append(CONFIGS[name].__name__.removesuffix("Config"))
    if len(sentences) == 1:
        return next(iter(sentences))
    return " ".join(f"{', '.join(names)}: {text}" for text, names in sentences.items())


def field_descriptions(docstring: str) -> dict[str, str]:
    """First sentence on each argument in a docstring's `Args` section."""
    entries = re.findall(r"^ +([\w, ]+) \(`.*\):\n((?: {12,}.+\n)+)", docstring, flags=re.M)
    sentences: dict[str, str] = {}
    for names, text in entries:
        sentence = re.split(r"(?<=\.)\s", " ".join(text.split()) + " ", maxsplit=1)[0]
        sentences |= {name: sentence for name in names.split(", ")}
    return sentences


def _spellings(field: str) -> list[str]:
    return [alias for alias, name in ALIASES.items() if name == field]


def _value_options(field: str, kind: Any) -> dict[str, Any]:
    """Argparse options for an annotated field: `bool`, `int`, `float | int`, `list[float | int] | None`, `str` ..."""
    kinds = [k for k in _members(kind) if k is not type(None)]
    lists = [k for k in kinds if get_origin(k) is list]
    if field == "routed_layers":
        return {"nargs": "+", "type": _layer, "metavar": "LAYER", "action": _OneOrMore}
    if lists:
        return {"nargs": "+", "type": float, "metavar": "NUMBER", "action": _OneOrMore if len(kinds) > 1 else "store"}
    if kinds == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    if float in kinds:
        return {"type": float, "metavar": "NUMBER"}
    return {"type": kinds[0], "metavar": "INTEGER" if kinds[0] is int else "NAME"}


class _OneOrMore(argparse.Action):
    """One value as itself where the field takes it so, several as a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        single = len(values) == 1 and not isinstance(values[0], int)
        setattr(namespace, self.dest, values[0] if single else values)


def _layer(text: str) -> int | str:
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a layer nor {AUTO!r}") from None


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _silence() -> None:
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    disable_progress_bars()
