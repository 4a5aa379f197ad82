"""Conversion of a pretrained checkpoint to a MoR: source -> plan -> tensors -> folder."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..configuration.configuration_mor import MoRConfig
from ..model_cards.card import write_card
from ..modeling.modeling_mor import MoRForCausalLM
from ..modeling.remote_code import auto_map_of, export_remote_code
from .checkpoint_writer import check_output, new_folder, write_json, write_weights
from .companion_files import copy_companions
from .errors import ConversionError
from .official_checkpoint import is_official, official_blueprint
from .plan import ConversionPlan
from .recipe import Recipe
from .source_checkpoint import check_tokenizer, open_source
from .vanilla_to_mor import Blueprint, vanilla_blueprint


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
    config: MoRConfig


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
    """Makes a recursive model of a pretrained one, one tensor in memory at a time.

    Example:
        >>> convert("HuggingFaceTB/SmolLM2-135M", "smol-mor", num_recursions=2, init="stepwise")

    Args:
        source (`str` or `Path`): folder, GGUF file or Hub id; None to take it from the recipe.
        output (`str` or `Path`): folder to make; it appears only when it is complete. May be None for a dry run.
        recipe (`Recipe`, `str`, `Path` or `dict`, *optional*): a recipe, a YAML file, or the name of a shipped recipe.
        revision (`str`, *optional*): of a Hub source; goes before that of the recipe.
        dry_run (`bool`): stop after the plan.
        overwrite (`bool`): replace a checkpoint that is in `output`.
        quiet (`bool`): neither print the plan (stdout) nor the progress (stderr).
        fields: fields of `Recipe` and of `MoRConfig`, which go before those of `recipe`.

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
    checkpoint = open_source(where, revision=revision)
    check_tokenizer(checkpoint)
    if local is None:
        settings = replace(settings, source=str(where), revision=checkpoint.revision)
    if is_official(checkpoint.weights):
        settings = settings.for_official()
        blueprint = official_blueprint(checkpoint, settings)
    else:
        settings = settings.for_vanilla()
        blueprint = vanilla_blueprint(checkpoint, settings)
    check_targets(blueprint)
    if not quiet:
        print(blueprint.plan.table(), flush=True)
    if dry_run or target is None:
        return ConversionResult(None, blueprint.plan, blueprint.config)

    config = blueprint.config
    config.architectures = [MoRForCausalLM.__name__]
    config.auto_map = auto_map_of(MoRForCausalLM.remote_classes)
    with new_folder(target, sum(tensor.nbytes for tensor in blueprint.targets), overwrite=overwrite) as folder:
        write_weights(folder, blueprint.targets, settings.max_shard_bytes, quiet=quiet)
        export_remote_code(folder, MoRForCausalLM.remote_classes)
        config.save_pretrained(folder)
        copy_companions(checkpoint, folder)
        (folder / "varidepth_recipe.yaml").write_text(settings.to_yaml(), encoding="utf-8")
        write_json(folder / "varidepth_plan.json", blueprint.plan.to_dict())
        write_card(folder, checkpoint, settings, blueprint.plan, config)
    if not quiet:
        print(f"wrote {target.name}", file=sys.stderr)
    return ConversionResult(target, blueprint.plan, config)


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


def check_targets(blueprint: Blueprint) -> None:
    """Compares the tensors to be written with what the new model holds, so that none is left random.

    Raises:
        ConversionError: at the first difference.
    """
    with torch.device("meta"):
        model = MoRForCausalLM(blueprint.config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if blueprint.config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    planned = {target.name: target.shape for target in blueprint.targets}
    for name in [*expected, *planned]:
        if planned.get(name) != expected.get(name):
            raise ConversionError(
                f"The tensor {name} would have the shape {_shape(planned.get(name))}, but the new model needs "
                f"{_shape(expected.get(name))}; the weights and config.json of the source are of different models."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))
