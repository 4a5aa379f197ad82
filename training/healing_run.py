"""A whole healing: fitted start, distillation, routing after depth, calibration, and a checkpoint that is complete."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..configuration.config_basics import check_choice
from .calibration import Calibration, calibrate
from .fitted_start import FittedLayer, fit_shared_layers, why_not_fitted
from .healing import CapacityAnnealing, HealingTrainer
from .hidden_matching import MATCHED_STATES
from .precision import bfloat16_is_faster
from .progress import TrainingProgress
from .schedules import Schedule
from .sharding import FullPrecisionRouters
from .text_stream import StreamCallback, TextStream
from .time_limit import TimeLimitCallback
from .training_checkpoints import checkpoint_to_resume


STARTS = ("fitted", "as_converted")
# so many rows of the text show how the layers act, start the routers and calibrate them
_ROUTER_TOKENS = 8192


@dataclass(frozen=True)
class HealingSettings:
    """
    Args:
        minutes, tokens: how long; exactly one of them.
        start:
            `fitted` (see `fit_shared_layers`) or `as_converted`; by default fitted where the model can be, and
            `Healed.not_fitted` says why where it cannot.
        fit_tokens: of the text, for the fitted start.
        seq_len, batch_size, accumulation: rows of tokens per forward pass, and passes per step.
        learning_rate: share of its size by which a parameter moves per step at most (`relative_groups`).
        distillation_weight, temperature: of `DistillationTrainer`.
        hidden_weight, hidden_states: of `HealingTrainer`; the weight may be a function of the progress.
        routing_begin, routing_end: of `CapacityAnnealing`.
        train_embeddings: also the embeddings and the head, which are the source's own and know words that a short text
            never shows.
        vocabulary_rows:
            Share of the rows whose tokens are drawn evenly from the vocabulary: a teacher can be asked about anything,
            and a short text shows few of the words that the source knows.
        save_steps: steps between checkpoints; 0 for none.
        seed: of the order of the text.

    Raises:
        ValueError: for a number out of range.
    """

    minutes: float | None = None
    tokens: int | None = None
    start: str | None = None
    fit_tokens: int = 16384
    seq_len: int = 256
    batch_size: int = 2
    accumulation: int = 1
    learning_rate: float = 2e-3
    distillation_weight: float = 1.0
    temperature: float = 1.0
    hidden_weight: Schedule = 30.0
    hidden_states: str = "all"
    routing_begin: float = 0.5
    routing_end: float = 0.8
    train_embeddings: bool = False
    vocabulary_rows: float = 0.15
    save_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.tokens is None):
            raise ValueError(
                f"`minutes` is {self.minutes} and `tokens` {self.tokens}: give exactly one of them, as the length of "
                "the training."
            )
        if self.start is not None:
            check_choice("start", self.start, STARTS)
        check_choice("hidden_states", self.hidden_states, MATCHED_STATES)
        for name, least in (
            ("tokens", 1), ("fit_tokens", 2), ("seq_len", 2), ("batch_size", 1), ("accumulation", 1),
            ("save_steps", 0), ("vocabulary_rows", 0), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not callable(value) and value < least:
                raise ValueError(f"`{name}` is {value}, but must be at least {least}.")
        for name in ("minutes", "learning_rate", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}, but must be a finite number above 0.")

        if self.vocabulary_rows >= 1:
            raise ValueError(f"`vocabulary_rows` is {self.vocabulary_rows}, but must be a share below 1.")

    @property
    def tokens_per_step(self) -> int:
        """Of one process."""
        return self.seq_len * self.batch_size * self.accumulation


@dataclass
class Healed:
    """What a healing did.

    Attributes:
        fitted: the layers of the fitted start.
        not_fitted: why there was none; `None` if there was, or it was not wanted.
        steps, tokens: of the training, resumed ones included.
        calibration: of the routers; `None` for a model whose tokens all run everything.
        log: the trainer's log.
    """

    fitted: list[FittedLayer]
    not_fitted: str | None
    steps: int
    tokens: int
    calibration: Calibration | None
    log: list[dict[str, Any]]


def heal(
    model: PreTrainedModel,
    source: PreTrainedModel,
    text: Any,
    tokenizer: Any,
    settings: HealingSettings,
    folder: str | Path,
    *,
    text_options: Mapping[str, Any] | None = None,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    show: bool = True,
) -> Healed:
    """Heals a converted model in place; it is left in eval mode, with its routers calibrated.

    Args:
        model (`PreTrainedModel`): a MoR or MoD, as conversion made it.
        source (`PreTrainedModel`): what it was made of.
        text: what `TextStream` reads.
        tokenizer: of both.
        settings (`HealingSettings`)
        folder: for checkpoints of the training.
        text_options: `config`, `split` and `column` of the text, where it has them.
        resume: go on behind the newest complete checkpoint in `folder`; begin anew if there is none.
        callbacks: further ones.
        show: whether to show a line of progress.

    Raises:
        ValueError: for models and texts that do not fit, and for a folder with checkpoints that are not to be resumed.
    """
    newest = checkpoint_to_resume(Path(folder), resume)

    def read(packing: str, epochs: int | None) -> TextStream:
        return TextStream(
            text, tokenizer, settings.seq_len, packing=packing, shuffle_buffer=1024, seed=settings.seed, epochs=epochs,
            **(text_options or {}),
        )  # fmt: skip

    sample = islice(read("joined", 1), math.ceil(settings.fit_tokens / settings.seq_len))
    rows = torch.stack([row["input_ids"] for row in sample])
    not_fitted = why_not_fitted(model, source) if settings.start is None else None
    fitted: list[FittedLayer] = []
    if newest is None and settings.start != "as_converted" and not_fitted is None:
        fitted = fit_shared_layers(model, source, draw_rows(rows, model.config.vocab_size, settings).split(4))
    trained = {p: p.requires_grad for module in _embeddings(model) for p in module.parameters()}
    for parameter in trained:
        parameter.requires_grad_(settings.train_embeddings)
    stream = read("documents", None)
    limit = None if settings.minutes is None else TimeLimitCallback(settings.minutes, progress=show)
    trainer = HealingTrainer(
        model=model,
        teacher=source,
        train_dataset=stream,
        hidden_weight=settings.hidden_weight,
        hidden_states=settings.hidden_states,
        distillation_weight=settings.distillation_weight,
        temperature=settings.temperature,
        clock=None if limit is None else lambda: limit.fraction,
        callbacks=[FullPrecisionRouters(), *callbacks],
        args=_arguments(settings, folder),
    )
    StreamCallback(stream).attach(trainer)
    trainer.data_collator = VocabularyRows(trainer.data_collator, model.config.vocab_size, settings)
    routed = getattr(model.config, "routing", None) == "expert_choice" and min(model.config.capacities) < 1
    router_rows = rows[: max(_ROUTER_TOKENS // settings.seq_len, 1)].split(4)
    if routed:
        CapacityAnnealing(trainer, router_rows, begin=settings.routing_begin, end=settings.routing_end).attach()
    if limit is not None:
        limit.tokens_per_step = settings.tokens_per_step * trainer.args.world_size
        trainer.lr_scheduler = limit.schedule(trainer.create_optimizer())
        limit.attach(trainer)
    else:
        TrainingProgress(settings.tokens_per_step * trainer.args.world_size, show=show).attach(trainer)
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    for parameter, before in trained.items():
        parameter.requires_grad_(before)
    model.eval()
    steps = trainer.state.global_step
    tokens = steps * settings.tokens_per_step * trainer.args.world_size
    calibration = calibrate(model, router_rows) if routed else None
    return Healed(fitted, not_fitted, steps, tokens, calibration, trainer.state.log_history)


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


class VocabularyRows:
    """A data collator that draws the tokens of some rows from the whole vocabulary, always the same of the same batch.

    Args:
        collate: makes the batch.
        vocabulary: number of tokens.
        settings: `vocabulary_rows` and `seed`.
    """

    def __init__(self, collate: Callable[[Any], dict[str, torch.Tensor]], vocabulary: int, settings: HealingSettings):
        self.collate = collate
        self.vocabulary = vocabulary
        self.settings = settings

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        batch = self.collate(rows)
        drawn = draw_rows(batch["input_ids"], self.vocabulary, self.settings)
        batch["labels"] = torch.where(drawn == batch["input_ids"], batch["labels"], drawn)
        batch["input_ids"] = drawn
        return batch


def draw_rows(ids: torch.Tensor, vocabulary: int, settings: HealingSettings) -> torch.Tensor:
    """The rows, `(batch, seq_len)`, of which each has been drawn anew by the chance `settings.vocabulary_rows`."""
    # seeded by the batch, so that it comes out alike after a resume
    generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + int(ids.long().sum())) % 2**31)
    chosen = torch.rand(len(ids), 1, generator=generator) < settings.vocabulary_rows
    return torch.where(chosen, torch.randint(vocabulary, ids.shape, generator=generator), ids)


def _arguments(settings: HealingSettings, folder: str | Path) -> TrainingArguments:
    accelerated = torch.accelerator.is_available()
    per_step = settings.tokens_per_step
    # with a limit in time, steps never end the training
    steps = 10**7 if settings.tokens is None else max(1, math.ceil(settings.tokens / per_step))
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=0.05,
        bf16=bfloat16_is_faster(),
        use_cpu=not accelerated,
        logging_steps=10,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=accelerated,
        seed=settings.seed,
    )
