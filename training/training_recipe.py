"""A training recipe: everything that decides what a run trains, on what, how and how long, as a YAML file."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from ..analysis.training_cost import PRECISIONS
from ..configuration.config_basics import check_choice
from ..conversion.recipe_reading import check_key, read_mapping, shipped_names, typed_value
from .text_stream import PACKINGS


SCHEDULES = ("cosine", "wsd", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class ModelPart:
    """Either a model from scratch (`architecture`, `config`, `tokenizer`) or a checkpoint (`source`).

    Attributes:
        architecture: `mor`, `mod`, `jrt`, or a family of transformers such as `llama`.
        config: fields of its configuration; token ids that are not given are those of the tokenizer.
        tokenizer: folder or Hub id; that of the source where there is one.
        source: folder or Hub id of a checkpoint.
        revision: of a Hub source.
        conversion: what to make of the source first: a recipe of `varidepth convert` by name, file or fields.
        start_routers: begin with routers that know what each recursion gains for a token, see `router_start`; those
            of a conversion let all tokens in, and training would choose among them by their position.
        attention: attention implementation, such as `sdpa` or `flash_attention_2`.
    """

    architecture: str | None = None
    config: dict = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None
    source: str | None = None
    revision: str | None = None
    conversion: str | dict | None = None
    start_routers: bool = False
    attention: str | None = None


@dataclasses.dataclass(frozen=True)
class DataPart:
    """What is read.

    Attributes:
        text: file, folder or dataset id (see `text_source.open_source`); without it the `pydoc` topics.
        config, split, column: of a dataset.
        packing: of `TextStream`; by default `documents`, and `joined` for JRT-RNN, which cannot keep them apart.
        shuffle_buffer: rows that are shuffled together.
        eval_text, eval_config, eval_split: what the loss is measured on at the end; the rest as for `text`.
        eval_tokens: at most so many of them.
    """

    text: str | None = None
    config: str | None = None
    split: str = "train"
    column: str = "text"
    packing: str | None = None
    shuffle_buffer: int = 1024
    eval_text: str | None = None
    eval_config: str | None = None
    eval_split: str = "train"
    eval_tokens: int = 262_144


@dataclasses.dataclass(frozen=True)
class OptimizerPart:
    """AdamW. Norms and biases are not decayed.

    Attributes:
        learning_rate: at its highest.
        betas: two numbers.
        epsilon: of AdamW.
        weight_decay: of AdamW.
        max_grad_norm: to which gradients are clipped.
    """

    learning_rate: float | int
    betas: list = dataclasses.field(default_factory=lambda: [0.9, 0.95])
    epsilon: float = 1e-8
    weight_decay: float | int = 0.1
    max_grad_norm: float | int = 1.0


@dataclasses.dataclass(frozen=True)
class SchedulePart:
    """The learning rate.

    Attributes:
        kind: `cosine`; `wsd`, a trapezoid of warm-up, constant rate and decay; `linear`; or `constant`.
        warmup: steps, or a share of all steps below 1.
        decay: of `wsd`: steps or share of the linear decay at the end.
        floor: the rate at the end, as a share of the highest.
    """

    kind: str = "cosine"
    warmup: float | int = 0.01
    decay: float | int = 0.2
    floor: float | int = 0.0


@dataclasses.dataclass(frozen=True)
class TrainingPart:
    """How much, how often, and where to.

    Attributes:
        output: folder of checkpoints and of the model at the end.
        seq_len: tokens per row.
        batch_tokens: of one optimizer step, over all processes.
        rows: of one forward pass of a process; the rest of a batch is accumulated.
        steps, tokens: how long; exactly one of them.
        precision: `fp32`, `bf16` (autocast over fp32 weights) or `pure_bf16`.
        gradient_checkpointing: less memory, a third more FLOPs.
        seed: of weights, shuffling and masks.
        save_steps: between checkpoints.
        keep_checkpoints: the newest so many.
        eval_steps: between evaluations; only at the end by default.
        log_steps: between logs.
        log_routing: log what the routers do.
    """

    output: str
    seq_len: int
    batch_tokens: int
    rows: int = 1
    steps: int | None = None
    tokens: int | None = None
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    seed: int = 0
    save_steps: int = 1000
    keep_checkpoints: int = 2
    eval_steps: int | None = None
    log_steps: int = 10
    log_routing: bool = True


_PARTS: dict[str, type] = {
    "model": ModelPart,
    "data": DataPart,
    "optimizer": OptimizerPart,
    "schedule": SchedulePart,
    "training": TrainingPart,
}
# fields of TrainingArguments that a part of the recipe decides
_DECIDED = {
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "gradient_checkpointing_kwargs",
    "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16", "fp16", "seed", "save_steps", "save_strategy",
    "save_total_limit", "eval_steps", "eval_strategy", "logging_steps", "gradient_checkpointing",
    "dataloader_num_workers", "ignore_data_skip", "resume_from_checkpoint", "remove_unused_columns",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainingRecipe:
    """
    Attributes:
        model, data, optimizer, schedule, training: parts, each a mapping in YAML.
        arguments: further `TrainingArguments`.

    Raises:
        ValueError: for unknown keys, values out of range, and what does not go together.
    """

    model: ModelPart
    data: DataPart
    optimizer: OptimizerPart
    schedule: SchedulePart
    training: TrainingPart
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        model, training = self.model, self.training
        if (model.architecture is None) == (model.source is None):
            raise ValueError(
                f"`model.architecture` is {model.architecture!r} and `model.source` {model.source!r}: give exactly "
                "one, an architecture to train from scratch or a checkpoint to go on with."
            )
        for field in ("config", "tokenizer"):
            if model.source is not None and getattr(model, field):
                raise ValueError(f"`model.{field}` is given beside `model.source`, which has its own: leave it out.")
        for field in ("conversion", "revision", "start_routers"):
            if model.source is None and getattr(model, field):
                raise ValueError(f"`model.{field}` is given, but belongs to a `model.source`: leave it out.")
        if model.source is None and model.tokenizer is None:
            raise ValueError("`model.tokenizer` is missing: give the folder or Hub id of a tokenizer.")
        if (training.steps is None) == (training.tokens is None):
            raise ValueError(
                f"`training.steps` is {training.steps} and `training.tokens` {training.tokens}: give exactly one of "
                "them, as the length of the run."
            )
        check_choice("schedule.kind", self.schedule.kind, SCHEDULES)
        check_choice("training.precision", training.precision, tuple(PRECISIONS))
        if self.data.packing is not None:
            check_choice("data.packing", self.data.packing, PACKINGS)
        self._check_numbers()
        for key in self.arguments:
            if key in _DECIDED:
                raise ValueError(f"`arguments.{key}` is decided by another part of the recipe: set it there.")
            check_key(key, {field.name for field in dataclasses.fields(TrainingArguments)}, "TrainingArguments")

    def _check_numbers(self) -> None:
        for field, least in (
            ("training.seq_len", 2), ("training.batch_tokens", 1), ("training.rows", 1), ("training.steps", 1),
            ("training.tokens", 1), ("training.save_steps", 1), ("training.keep_checkpoints", 1),
            ("training.eval_steps", 1), ("training.log_steps", 1), ("data.shuffle_buffer", 0), ("data.eval_tokens", 1),
            ("schedule.warmup", 0), ("schedule.decay", 0), ("schedule.floor", 0), ("optimizer.weight_decay", 0),
        ):  # fmt: skip
            part, name = field.split(".")
            value = getattr(getattr(self, part), name)
            if value is not None and value < least:
                raise ValueError(f"`{field}` is {value}, but must be at least {least}.")
        if not self.optimizer.learning_rate > 0:
            raise ValueError(f"`optimizer.learning_rate` is {self.optimizer.learning_rate}, but must be above 0.")
        betas = self.optimizer.betas
        if len(betas) != 2 or not all(isinstance(beta, float | int) and 0 <= beta < 1 for beta in betas):
            raise ValueError(f"`optimizer.betas` is {betas}, but must be two numbers from 0 to below 1.")
        if self.schedule.floor > 1:
            raise ValueError(f"`schedule.floor` is {self.schedule.floor}, but must be a share of the highest rate.")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.training.steps is not None:
            return self.training.steps
        return max(1, round((self.training.tokens or 0) / self.training.batch_tokens))

    def accumulation(self, processes: int) -> int:
        """Forward passes of each process in a step.

        Raises:
            ValueError: if the batch does not divide.
        """
        one = self.training.seq_len * self.training.rows * processes
        if self.training.batch_tokens % one:
            raise ValueError(
                f"`training.batch_tokens` is {self.training.batch_tokens}, but must be a multiple of the {one} tokens "
                f"of one pass (seq_len {self.training.seq_len} x rows {self.training.rows} x {processes} processes): "
                "change one of them."
            )
        return self.training.batch_tokens // one

    @classmethod
    def make(cls, content: Mapping[str, Any], changes: Sequence[str] = ()) -> TrainingRecipe:
        """A recipe from nested mappings, with changes such as `optimizer.learning_rate=1e-4` laid over them.

        Raises:
            ValueError: as the class does, and for a change that cannot be read.
        """
        tree = {key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()}
        for change in changes:
            _lay_over(tree, change)
        for key in tree:
            check_key(key, {*_PARTS, "arguments"}, "a training recipe")
        parts = {name: _part(name, kind, tree.get(name) or {}) for name, kind in _PARTS.items()}
        arguments = typed_value("arguments", tree.get("arguments") or {}, dict)
        return cls(**parts, arguments=arguments)

    @classmethod
    def load(cls, path: str | Path, changes: Sequence[str] = ()) -> TrainingRecipe:
        """Reads a YAML file, or a recipe that comes with the package by its name without ending.

        Raises:
            ValueError: if the file is missing or no YAML mapping, and as `make` does.
        """
        return cls.make(read_mapping(path, files(__package__) / "recipes"), changes)

    def without_paths(self) -> TrainingRecipe:
        """The recipe with names in place of the paths of this machine, which have no place in what is published."""

        def named(part: Any, *fields: str) -> Any:
            values = {field: getattr(part, field) for field in fields}
            local = {name: Path(value).name for name, value in values.items() if value and Path(value).exists()}
            return dataclasses.replace(part, **local)

        return dataclasses.replace(
            self,
            model=named(self.model, "source", "tokenizer"),
            data=named(self.data, "text", "eval_text"),
            training=dataclasses.replace(self.training, output=Path(self.training.output).name),
        )

    def to_yaml(self) -> str:
        """The recipe as a YAML file that `load` reads back; what is at its default is left out."""
        content = {name: _given(getattr(self, name)) for name in _PARTS}
        content |= {"arguments": self.arguments}
        return yaml.safe_dump({key: value for key, value in content.items() if value}, sort_keys=False)


def shipped_training_recipes() -> list[str]:
    """Names of the training recipes that come with the package."""
    return shipped_names(files(__package__) / "recipes")


def _part(name: str, kind: type, content: Any) -> Any:
    if not isinstance(content, Mapping):
        raise ValueError(f"`{name}` is {content!r}, but must be a mapping of fields.")
    types = typing.get_type_hints(kind)
    values = {}
    for key, value in content.items():
        check_key(str(key), types, f"`{name}`")
        values[key] = typed_value(f"{name}.{key}", value, types[key])
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ValueError(f"`{name}.{field.name}` is missing: every training recipe must say it.")
    return kind(**values)


def _given(part: Any) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    content = {}
    for field in dataclasses.fields(part):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if getattr(part, field.name) != default:
            content[field.name] = getattr(part, field.name)
    return content


def _lay_over(tree: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) < 2:
        raise ValueError(f"`--set {change}` cannot be read: give PART.FIELD=VALUE, such as training.steps=100.")
    node = tree
    for key in keys[:-1]:
        if not isinstance(node.get(key), Mapping):
            node[key] = {}
        node[key] = dict(node[key])
        node = node[key]
    try:
        node[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"`--set {change}` has no value that can be read as YAML: quote it.") from None
