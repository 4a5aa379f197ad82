"""What a training run will be, told before it starts: size, FLOPs, memory, tokens, steps, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..analysis.cost import count_parameters
from ..analysis.counts import ParameterCount
from ..analysis.training_cost import TrainingMemory, run_flops, training_memory
from ..configuration.backbone_config import BACKBONES, MOE_BACKBONES
from ..configuration.config_basics import check_choice
from ..conversion.convert import convert
from ..conversion.planned_cost import figure, format_columns
from ..conversion.recipe_fields import CONFIGS
from .run_setup import world_size
from .training_recipe import TrainingRecipe


@dataclass(frozen=True)
class TrainingPlan:
    """The figures of a run.

    Attributes:
        recipe: of the run.
        config: of the model.
        parameters: of the model.
        processes: that train together.
        accumulation: forward passes of each in a step.
        tokens: of the whole run.
        flops: of the whole run, forward and backward.
        memory: of one process, if nothing is sharded.
        checkpoint_bytes: weights, and optimizer states beside them, of one checkpoint.
    """

    recipe: TrainingRecipe
    config: Any
    parameters: ParameterCount
    processes: int
    accumulation: int
    tokens: int
    flops: float
    memory: TrainingMemory
    checkpoint_bytes: float

    def table(self) -> str:
        """The plan as text for a terminal."""
        training, data, schedule = self.recipe.training, self.recipe.data, self.recipe.schedule
        memory = self.memory
        parts = "weights {}, gradients {}, optimizer {}, activations {}, logits {}".format(
            *(gib(value) for value in (memory.weights, memory.gradients, memory.optimizer, memory.activations)),
            gib(memory.logits),
        )
        count = self.recipe.steps // training.save_steps
        kept = min(count, training.keep_checkpoints)
        length = f"{self.recipe.steps} of {figure(training.batch_tokens)} tokens"
        rows = f"{training.rows} x {training.seq_len} tokens, {self.accumulation} per step and process"
        name = self.recipe.model.source or self.recipe.model.architecture
        begin = "from scratch" if self.recipe.model.source is None else "from a checkpoint"
        if self.recipe.model.conversion is not None:
            begin = f"converted to {self.config.model_type}"
        table = [
            ("model", f"{name}, {begin}"),
            ("parameters", f"{figure(self.parameters.total)}, {figure(self.parameters.non_embedding)} not embedding"),
            ("text", f"{data.text or 'the pydoc topics'}, rows {packing_of(self.recipe, self.config)}"),
            ("tokens", f"{figure(self.tokens)}, {self.tokens / self.parameters.total:.1f} per parameter"),
            ("steps", length),
            ("forward passes", rows),
            ("processes", str(self.processes)),
            ("learning rate", f"{self.recipe.optimizer.learning_rate:g}, {schedule.kind}"),
            ("precision", training.precision + ", gradient checkpointing" * training.gradient_checkpointing),
            ("FLOPs per token", f"{figure(self.flops / self.tokens)}, forward and backward"),
            ("FLOPs", f"{self.flops:.3g}"),
            ("memory", f"{gib(memory.total)} per process, unsharded, about: {parts}"),
            ("checkpoints", f"{count}, of which {kept} are kept, {gib(self.checkpoint_bytes)} each"),
            ("output", Path(training.output).name),
        ]
        return "\n".join(format_columns(table))


def plan_training(recipe: TrainingRecipe, processes: int | None = None) -> TrainingPlan:
    """The plan of a recipe; of weights and texts nothing is read.

    Args:
        recipe: of the run.
        processes: that train together; by default as many as the launcher says.

    Raises:
        ValueError: for a model that cannot be built, or a batch that does not divide.
    """
    processes = world_size() if processes is None else processes
    training = recipe.training
    config = model_config(recipe)
    packing_of(recipe, config)
    accumulation = recipe.accumulation(processes)
    count = count_parameters(config)
    rows = recipe.steps * training.batch_tokens // training.seq_len
    flops = run_flops(
        config,
        training.seq_len,
        rows,
        recipe.steps * accumulation,
        gradient_checkpointing=training.gradient_checkpointing,
    )
    memory = training_memory(
        config,
        training.rows,
        training.seq_len,
        precision=training.precision,
        gradient_checkpointing=training.gradient_checkpointing,
    )
    return TrainingPlan(
        recipe=recipe,
        config=config,
        parameters=count,
        processes=processes,
        accumulation=accumulation,
        tokens=recipe.steps * training.batch_tokens,
        flops=flops,
        memory=memory,
        checkpoint_bytes=memory.gradients + memory.optimizer,
    )


def model_config(recipe: TrainingRecipe) -> Any:
    """The configuration of the model that a recipe trains, without the token ids of its tokenizer.

    Raises:
        ValueError: for an unknown architecture, fields that do not fit, or a source that cannot be read.
    """
    model = recipe.model
    if model.source is None:
        check_choice("model.architecture", model.architecture, (*CONFIGS, *BACKBONES, *MOE_BACKBONES))
        config_class = CONFIGS.get(str(model.architecture)) or CONFIG_MAPPING[str(model.architecture)]
        try:
            return config_class(**model.config)
        except ValueError:
            raise
        except Exception as error:  # transformers' own checks raise errors of other kinds, of several lines
            raise ValueError(f"`model.config` does not fit: {' '.join(str(error).split())}") from error
    if model.conversion is not None:
        return convert(model.source, None, model.conversion, revision=model.revision, dry_run=True, quiet=True).config
    try:
        return AutoConfig.from_pretrained(model.source, revision=model.revision)
    except Exception as error:
        raise ValueError(
            f"`model.source` is {model.source!r}, but no configuration can be read there "
            f"({' '.join(str(error).split())[:200]}): give the folder or Hub id of a checkpoint."
        ) from error


def packing_of(recipe: TrainingRecipe, config: Any) -> str:
    """How documents are put into rows; raises a `ValueError` if the model cannot read them so."""
    if recipe.data.packing is None:
        return "joined" if config.model_type == "jrt" else "documents"
    if recipe.data.packing == "documents" and config.model_type == "jrt":
        raise ValueError(
            "`data.packing` is 'documents', but JRT-RNN cannot keep the documents of a row apart: use 'joined', as in "
            "its paper, or 'separate'."
        )
    return recipe.data.packing


def gib(count: float) -> str:
    """Bytes for people: `1.5 GiB`, `30 MiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
