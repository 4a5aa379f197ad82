"""Model cards: templates filled with what a conversion knows, and metadata that the Hub accepts."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.configuration_utils import PreTrainedConfig

from ..configuration.configuration_jrt import JRTConfig
from ..configuration.routed_config import RoutedConfig


if TYPE_CHECKING:
    from ..conversion.plan import ConversionPlan
    from ..conversion.recipe import Recipe
    from ..conversion.source_checkpoint import SourceCheckpoint

UNMEASURED = "**Nothing about the quality of this checkpoint has been measured.**"


def write_card(
    folder: Path,
    source: "SourceCheckpoint",
    recipe: "Recipe",
    plan: "ConversionPlan",
    config: RoutedConfig | JRTConfig,
) -> None:
    """Writes the README.md of a converted checkpoint.

    Args:
        folder (`Path`): the new checkpoint.
        source (`SourceCheckpoint`): what it was made of; its license is copied where it is known.
        recipe (`Recipe`): echoed.
        plan (`ConversionPlan`): echoed as a table.
        config: of the new model.
    """
    base_model = recipe.base_model or source.base_model
    kind = _KINDS[config.model_type](config, recipe, plan)
    text = fill_card(
        "converted_card.md",
        unmeasured=UNMEASURED,
        title=folder_title(source.name, kind.suffix),
        architecture=kind.name,
        source_link=link_to(base_model, source.name),
        description=kind.description,
        state=kind.state,
        limits=kind.limits,
        references="\n".join(f"- {title}, [arXiv {i}](https://arxiv.org/abs/{i})" for title, i in kind.references),
        plan=plan.table(),
        recipe=recipe.to_yaml(),
    )
    family = [config.backbone] if isinstance(config, RoutedConfig) else []
    save_card(folder, text, base_model, source.license, ["custom_code", "varidepth", kind.tag, *family])


@dataclass(frozen=True)
class _Kind:
    """What a card says of an architecture: title, arXiv number and so on of the papers in `references`."""

    name: str
    suffix: str
    tag: str
    description: str
    state: str
    limits: str
    references: tuple[tuple[str, str], ...]


def _recursions(config: Any, recipe: "Recipe", plan: "ConversionPlan") -> _Kind:
    n = config.num_recursions
    routing = {
        "expert_choice": f"routers decide at each of up to {n} recursions which tokens go on",
        "token_choice": f"a router gives every token 1 to {n} recursions",
        "none": f"every token runs all {n} recursions",
    }[config.routing]
    description = (
        f"{config.prelude_layers} unique layer(s), {config.num_shared_layers} shared ones (`{config.sharing}`), and "
        f"{config.coda_layers} unique layer(s) at the end; {routing}."
    )
    state = "Layers were put to a use that they were not trained for: train the model before you use it."
    if n == 1:
        description = f"{config.num_physical_layers} layers, each with weights of its own and one place in the model."
        state = "Train the model before you use it, unless nothing but the format of the source was changed."
    if any("official" in note for note in plan.notes):
        state = "The weights are those of the source, stored without duplicates."
    return _Kind(
        name="Mixture-of-Recursions (MoR)",
        suffix="MoR",
        tag="mixture-of-recursions",
        description=description,
        state=state,
        limits=_ATTENTION_LIMIT if config.routing != "none" else "Those of the source.",
        references=(
            (
                "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level Computation",
                "2507.10524",
            ),
            ("Relaxed Recursive Transformers", "2410.20672"),
        ),
    )


def _depths(config: Any, recipe: "Recipe", plan: "ConversionPlan") -> _Kind:
    unit = {"block": "them", "attention": "their attention", "mlp": "their MLP"}[config.routing_unit]
    description = (
        f"{config.num_hidden_layers} layers, of which {len(config.routed_layers)} are routed: tokens pass by {unit} "
        f"where {'chance' if config.routing == 'stochastic' else 'a router'} says so."
    )
    if recipe.router_init == "on":
        state = (
            "Its routers let every token through, so that it computes what its source computes and saves nothing; "
            "train or calibrate them (`varidepth calibrate`) to skip work."
        )
    else:
        state = "It was not trained to pass by layers: train the model before you use it."
    limits = (
        f"In training a routed layer takes a share of {_shares(config)} of the tokens. Outside of training each "
        f"token is decided on by itself (`inference_rule` {config.inference_rule!r}), so the share is what the "
        f"routers make of it. {_ATTENTION_LIMIT}"
    )
    return _Kind(
        name="Mixture-of-Depths (MoD)",
        suffix="MoD",
        tag="mixture-of-depths",
        description=description,
        state=state,
        limits=limits,
        references=(
            (
                "Mixture-of-Depths: Dynamically allocating compute in transformer-based language models",
                "2404.02258",
            ),
            ("Router-Tuning: A Simple and Effective Approach for Enabling Dynamic-Depth", "2410.13184"),
        ),
    )


def _prefixes(config: Any, recipe: "Recipe", plan: "ConversionPlan") -> _Kind:
    count = Counter(config.layer_types)
    description = (
        f"{count['linear_attention']} layers of linear attention, {count['sliding_attention']} of attention within a "
        f"window of {config.sliding_window} tokens, and {count['conv']} gated short convolutions; "
    )
    n = config.prefix_length
    state = "The weights are those of the source, under other names."
    if n == 0:
        description += "causal, with a memory of constant size."
        limits = "Those of the source."
    else:
        description += (
            f"linear attention reads the first {n} tokens of a prompt non-causally, and then has a memory of constant "
            "size."
        )
        state += (
            f" A prompt of fewer than {n} tokens is treated by `short_prompt={config.short_prompt!r}`. The published "
            'numbers were measured with such prompts padded to that length: pass `short_prompt="left_pad"` to '
            '`from_pretrained` to reproduce them, or `"read_twice"` for those of 512-token documents.'
        )
        limits = (
            "Every token of the prefix is seen by the others of it, so a likelihood of tokens inside the prefix "
            "means nothing: score the tokens behind it."
        )
    return _Kind(
        name="JRT-RNN (Just Read Twice)" if n else "Based, the causal baseline of JRT-RNN,",
        suffix="varidepth",
        tag="jrt",
        description=description,
        state=state,
        limits=limits,
        references=(
            ("Just read twice: closing the recall gap for recurrent language models", "2407.05483"),
            ("Simple linear attention language models balance the recall-throughput tradeoff", "2402.18668"),
        ),
    )


_KINDS: dict[str, Callable[[Any, "Recipe", "ConversionPlan"], _Kind]] = {
    "mor": _recursions,
    "mod": _depths,
    "jrt": _prefixes,
}
_ATTENTION_LIMIT = 'Routed layers need `attn_implementation` "sdpa" or "eager".'


def _shares(config: Any) -> str:
    return ", ".join(f"{share:g}" for share in dict.fromkeys(config.capacities))


def write_unrolled_card(folder: Path, source: "SourceCheckpoint", config: PreTrainedConfig) -> None:
    """Writes the README.md of an unrolled checkpoint; `config` is the vanilla one."""
    repeated = getattr(source.config, "num_recursions", 1) > 1
    text = fill_card(
        "unrolled_card.md",
        unmeasured=UNMEASURED,
        title=folder_title(source.name, "unrolled"),
        source_link=link_to(source.base_model, source.name),
        backbone=config.model_type,
        description=f"{config.num_hidden_layers} layers{', of which the repeated ones are copies' * repeated}.",
    )
    save_card(folder, text, source.base_model, source.license, ["varidepth", config.model_type])


def folder_title(source: str, suffix: str) -> str:
    """Title of a card: the last part of the source's name with a suffix."""
    return f"{source.rsplit('/', 1)[-1].removesuffix('.gguf')}-{suffix}"


def link_to(base_model: str | None, name: str) -> str:
    """A link to a model on the Hub, or the name of one that is not there."""
    return f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{name}`"


def fill_card(template: str, **values: str) -> str:
    """The text of a template of this folder."""
    from varidepth import __version__

    text = (files(__package__) / template).read_text(encoding="utf-8")
    return Template(text).substitute(version=__version__, **values)


def save_card(folder: Path, text: str, base_model: str | None, license_: dict[str, str], tags: list[str]) -> None:
    """Writes README.md with metadata for the Hub."""
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        **license_,  # type: ignore[arg-type]
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    (folder / "README.md").write_text(card.content, encoding="utf-8")
