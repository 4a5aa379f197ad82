"""Conversion of a pretrained checkpoint to an architecture of this package: source -> plan -> tensors -> folder."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..configuration.configuration_jrt import JRTConfig
from ..configuration.routed_config import RoutedConfig
from ..model_cards.card import write_card
from ..modeling.remote_code import auto_map_of, export_remote_code
from .blueprint import Blueprint
from .checkpoint_writer import check_output, new_folder, write_json, write_weights
from .companion_files import copy_companions
from .errors import ConversionError
from .official_checkpoint import is_official, official_blueprint
from .official_jrt import jrt_blueprint
from .plan import ConversionPlan
from .recipe import Recipe
from .recipe_fields import DEFAULT, ROUTED
from .source_checkpoint import OFFICIAL_JRT, SourceCheckpoint, check_tokenizer, is_official_jrt, open_source
from .vanilla_to_mod import mod_blueprint
from .vanilla_to_mor import mor_blueprint


_BLUEPRINTS = {"mor": mor_blueprint, "mod": mod_blueprint}


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did, or would do.

    Attributes:
        output: the new checkpoint; None after a dry run.
        plan: the plan.
        config: the configuration of the new model.
    """

    output: Path | None
    plan: ConversionPlan
    config: RoutedConfig | JRTConfig


def convert(
    source: str | Path | None,
    output: str | Path | None,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    revision: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **fields: Any,
) -> ConversionResult:
    """Makes a model with per-token depth of a pretrained one, one tensor in memory at a time; an official checkpoint
    becomes one of this package's architecture of it.

    Examples:
        >>> convert("HuggingFaceTB/SmolLM2-135M", "smol-mor", num_recursions=2, init="stepwise")
        >>> convert("HuggingFaceTB/SmolLM2-135M", "smol-mod", to="mod", routed_layers="auto")
        >>> convert("hazyresearch/JRT-360M-30B", "jrt-360m")

    Args:
        source (`str` or `Path`): folder, GGUF file or Hub id; None to take it from the recipe.
        output (`str` or `Path`): folder to make; it appears only when it is complete. May be None for a dry run.
        recipe (`Recipe`, `str`, `Path` or `dict`, *optional*): a recipe, a YAML file, or the name of a shipped recipe.
        revision (`str`, *optional*): of a Hub source; goes before that of the recipe.
        dry_run (`bool`): stop after the plan.
        overwrite (`bool`): replace a checkpoint that is in `output`.
        quiet (`bool`): neither print the plan (stdout) nor the progress (stderr).
        fields: fields of `Recipe` and of the configuration of its architecture, which go before those of `recipe`.

    Returns:
        `ConversionResult`

    Raises:
        ConversionError: with one sentence, if the source, the recipe or the output is unfit; nothing is left behind.
    """
    settings = resolve_recipe(recipe, fields)
    where = source if source is not None else settings.source
    if where is None:
        raise ConversionError("There is no source; give a folder, a GGUF file or a Hub id, or `source` in the recipe.")
    target = None if output is None else Path(output)
    if target is None and not dry_run:
        raise ConversionError("There is no output; give a folder for the new checkpoint, or ask for a dry run.")
    if revision is None and (source is None or settings.source in (None, str(source))):
        revision = settings.revision  # of another source it says nothing
    local = Path(where) if Path(where).exists() else None
    if local is not None:
        settings = replace(
            settings, source=None, revision=None
        )  # a path of this machine has no place in what is published
    if target is not None:
        check_output(target, local, overwrite=overwrite)
    checkpoint = open_source(where, revision=revision, allowed=_convertible(settings.to))
    check_tokenizer(checkpoint)
    if local is None:
        settings = replace(settings, source=str(where), revision=checkpoint.revision)
    blueprint = _blueprint(checkpoint, settings, quiet=quiet)
    blueprint.check_targets()
    config = blueprint.model.config
    if not quiet:
        print(blueprint.plan.table(), flush=True)
    if dry_run or target is None:
        return ConversionResult(None, blueprint.plan, config)

    classes = blueprint.model.remote_classes
    config.architectures = [type(blueprint.model).__name__]
    config.auto_map = auto_map_of(classes)
    with new_folder(target, sum(tensor.nbytes for tensor in blueprint.targets), overwrite=overwrite) as folder:
        write_weights(folder, blueprint.targets, blueprint.recipe.max_shard_bytes, quiet=quiet)
        export_remote_code(folder, classes)
        config.save_pretrained(folder)
        copy_companions(checkpoint, folder)
        (folder / "varidepth_recipe.yaml").write_text(blueprint.recipe.to_yaml(), encoding="utf-8")
        write_json(folder / "varidepth_plan.json", blueprint.plan.to_dict())
        write_card(folder, checkpoint, blueprint.recipe, blueprint.plan, config)
    if not quiet:
        print(f"wrote {target.name}", file=sys.stderr)
    return ConversionResult(target, blueprint.plan, config)


def _convertible(to: str | None) -> tuple[str, ...]:
    """Model types of the sources of an architecture; official ones of another are refused where they are known."""
    return (OFFICIAL_JRT,) if to == "jrt" else (*ROUTED[to or DEFAULT].backbones, OFFICIAL_JRT)


def _blueprint(checkpoint: SourceCheckpoint, settings: Recipe, *, quiet: bool) -> Blueprint:
    if is_official_jrt(checkpoint.raw_config):
        return jrt_blueprint(checkpoint, settings.for_official("jrt"))
    if is_official(checkpoint.weights):
        return official_blueprint(checkpoint, settings.for_official("mor"))
    recipe = settings.for_vanilla()
    return _BLUEPRINTS[recipe.to or DEFAULT](checkpoint, recipe, quiet=quiet)


def resolve_recipe(recipe: Recipe | str | Path | Mapping[str, Any] | None, fields: Mapping[str, Any]) -> Recipe:
    """The recipe as a value, with `fields` laid over it.

    Raises:
        ConversionError: for a file that cannot be read, an unknown key, or a value that is not allowed.
    """
    if isinstance(recipe, (str, Path)):
        recipe = Recipe.load(recipe)
    elif isinstance(recipe, Mapping):
        recipe = Recipe.make(None, **{str(key): value for key, value in recipe.items()})
    return Recipe.make(recipe, **fields)
