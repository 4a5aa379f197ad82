"""Model cards: templates filled with what a conversion knows, and metadata that the Hub accepts."""

from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from transformers.configuration_utils import PreTrainedConfig

from ..configuration.configuration_mor import MoRConfig


if TYPE_CHECKING:
    from ..conversion.plan import ConversionPlan
    from ..conversion.recipe import Recipe
    from ..conversion.source_checkpoint import SourceCheckpoint


def write_card(
    folder: Path, source: "SourceCheckpoint", recipe: "Recipe", plan: "ConversionPlan", config: MoRConfig
) -> None:
    """Writes the README.md of a converted checkpoint.

    Args:
        folder (`Path`): the new checkpoint.
        source (`SourceCheckpoint`): what it was made of; its license is copied where it is known.
        recipe (`Recipe`): echoed.
        plan (`ConversionPlan`): echoed as a table.
        config (`MoRConfig`): of the new model.
    """
    base_model = recipe.base_model or source.base_model
    tags = ["custom_code", "varidepth", "mixture-of-recursions", config.backbone]
    routing = {
        "expert_choice": f"routers decide at each of up to {config.num_recursions} recursions which tokens go on",
        "token_choice": f"a router gives every token 1 to {config.num_recursions} recursions",
        "none": f"every token runs all {config.num_recursions} recursions",
    }[config.routing]
    unique, shared = config.prelude_layers, config.num_shared_layers
    description = (
        f"{unique} unique layer(s), {shared} shared ones (`{config.sharing}`), and {config.coda_layers} "
        f"unique layer(s) at the end; {routing}."
    )
    state = "Layers were put to a use that they were not trained for: train the model before you use it."
    if config.num_recursions == 1:
        description = f"{config.num_physical_layers} layers, each with weights of its own and one place in the model."
        state = "Train the model before you use it, unless nothing but the format of the source was changed."
    healed = any("official" in note for note in plan.notes)
    text = _fill(
        "mor_card.md",
        title=folder_title(source.name, "MoR"),
        source_link=_link(base_model, source.name),
        description=description,
        state=("The weights are those of the source, stored without duplicates." if healed else state),
        plan=plan.table(),
        recipe=recipe.to_yaml(),
    )
    _save(folder, text, base_model, source.license, tags)


def write_unrolled_card(folder: Path, source: "SourceCheckpoint", config: PreTrainedConfig) -> None:
    """Writes the README.md of an unrolled checkpoint; `config` is the vanilla one."""
    repeated = getattr(source.config, "num_recursions", 1) > 1
    text = _fill(
        "unrolled_card.md",
        title=folder_title(source.name, "unrolled"),
        source_link=_link(source.base_model, source.name),
        backbone=config.model_type,
        description=f"{config.num_hidden_layers} layers{', of which the repeated ones are copies' * repeated}.",
    )
    _save(folder, text, source.base_model, source.license, ["varidepth", config.model_type])


def folder_title(source: str, suffix: str) -> str:
    """Title of a card: the last part of the source's name with a suffix."""
    return f"{source.rsplit('/', 1)[-1].removesuffix('.gguf')}-{suffix}"


def _link(base_model: str | None, name: str) -> str:
    return f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{name}`"


def _fill(template: str, **values: str) -> str:
    from varidepth import __version__

    text = (files(__package__) / template).read_text(encoding="utf-8")
    return Template(text).substitute(version=__version__, **values)


def _save(folder: Path, text: str, base_model: str | None, license_: dict[str, str], tags: list[str]) -> None:
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        **license_,  # type: ignore[arg-type]
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    (folder / "README.md").write_text(card.content, encoding="utf-8")
