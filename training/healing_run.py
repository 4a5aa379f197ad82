"""A whole healing: fitted start, distillation, routing after depth, calibration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from .healing import CapacityAnnealing, HealingTrainer, why_not_annealed
from .hidden_matching import MATCHED_STATES
from .precision import bfloat16_is_faster
from .progress import TrainingProgress
from .run_setup import (
    ROUTER_TOKENS,
    hold_precision,
    of_first_process,
    quiet_arguments,
    refuse_several_gpus,
    refuse_sharding,
    world_size,
)
from .sampled_rows import sample_rows
from .schedules import Schedule
from .text_stream import StreamCallback, TextStream
from .time_limit import TimeLimitCallback
from .training_checkpoints import checkpoint_to_resume, train_from


STARTS = ("fitted", "as_converted")


@dataclass(frozen=True)
class HealingSettings:
    """
    Args:
        minutes, tokens: how long; exactly one of them.
        start:
            `fitted` (see `fit_shared_layers`) or `as_converted`; by default fitted where the model can be, and
            `Healed.not_fitted` says why where it cannot.
        fit_tokens: of the text, for the fitted start; the rows that the source has written are added to them.
        seq_len, batch_size, accumulation: rows of tokens per forward pass, and passes per step.
        learning_rate: share of its size by which a parameter moves per step at most (`relative_groups`).
        distillation_weight, temperature: of `DistillationTrainer`.
        hidden_weight, hidden_states: of `HealingTrainer`; the weight may be a function of the progress.
        routing_begin, routing_end: of `CapacityAnnealing`.
        train_embeddings: also the embeddings and the head, which are the source's own and know words that a short text
            never shows.
        sampled_tokens:
            What the source writes itself before the training (`sample_rows`), 0 for nothing: a short text shows little
            of what the source knows.
        sampled_rows: share of the rows of the training that are taken from there.
        save_steps: steps between checkpoints; 0 for none.
        seed: of the order of the text.

    Raises:
        ValueError: for a number out of range.
    """

    minutes: float | None = None
    tokens: int | None = None
    start: str | None = None
    fit_tokens: int = 8192
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
    sampled_tokens: int = 8192
    sampled_rows: float = 0.25
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
            ("save_steps", 0), ("sampled_tokens", 0), ("sampled_rows", 0), ("seed", 0), ("hidden_weight", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not callable(value) and value < least:
                raise ValueError(f"`{name}` is {value}, but must be at least {least}.")
        for name in ("minutes", "learning_rate", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}, but must be a finite number above 0.")

        if self.sampled_rows >= 1:
            raise ValueError(f"`sampled_rows` is {self.sampled_rows}, but must be a share below 1.")
        if not 0 <= self.routing_begin <= self.routing_end <= 1:
            raise ValueError(
                f"`routing_begin` is {self.routing_begin} and `routing_end` {self.routing_end}, but must be shares of "
                "the training with 0 <= routing_begin <= routing_end <= 1."
            )
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"`distillation_weight` is {self.distillation_weight}, but must be a share from 0 to 1.")

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
        not_started: why routers learn from where conversion left them; `None` if they were started, or there are none.
        steps, tokens: of the training, resumed ones included.
        calibration: of the routers; `None` for a model whose tokens all run everything.
        log: the trainer's log.
    """

    fitted: list[FittedLayer]
    not_fitted: str | None
    not_started: str | None
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
    """Heals a converted model in place; it is left in eval mode and in fp32, with its routers calibrated.

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
        ValueError: for models and texts that do not fit, for a folder with checkpoints that are not to be resumed, and
            for processes that divide the weights.
    """
    newest = checkpoint_to_resume(Path(folder), resume)
    refuse_sharding("Healing")
    args = _arguments(settings, folder, newest)
    refuse_several_gpus(args)
    not_fitted = why_not_fitted(model, source)
    if settings.start == "fitted" and not_fitted is not None:
        raise ValueError(f"{not_fitted}; heal without a fitted start.")
    options = {"shuffle_buffer": 1024, "seed": settings.seed, **(text_options or {})}
    stream = TextStream(text, tokenizer, settings.seq_len, packing="documents", **options)
    sample = TextStream(text, tokenizer, settings.seq_len, packing="joined", epochs=1, **options)
    count = math.ceil(max(settings.fit_tokens, ROUTER_TOKENS) / settings.seq_len)
    rows = torch.stack([row["input_ids"] for row in islice(sample, count)])
    # a step moves a weight by less than bf16 can tell apart
    nn.Module.to(model, args.device, torch.float32)
    nn.Module.to(source, args.device)
    sampled = sample_rows(
        source,
        math.ceil(settings.sampled_tokens / settings.seq_len),
        settings.seq_len,
        vocab_size=min(len(tokenizer), model.config.vocab_size),
        seed=settings.seed,
    )
    if len(sampled):
        stream.mix_in(sampled, settings.sampled_rows)
    fitted: list[FittedLayer] = []
    if newest is None and settings.start != "as_converted" and not_fitted is None:
        shown = rows[: math.ceil(settings.fit_tokens / settings.seq_len)]
        fitted = fit_shared_layers(model, source, torch.cat([shown, sampled]).split(4))
    router_rows = rows[: max(ROUTER_TOKENS // settings.seq_len, 1)].split(4)
    routed = getattr(model.config, "routing", None) == "expert_choice" and min(model.config.capacities) < 1
    not_started = why_not_annealed(model.config) if routed else None
    with _frozen(model, settings):
        trainer = _make_trainer(model, source, stream, settings, args, callbacks, show)
        annealing = None
        if routed and not_started is None:
            annealing = CapacityAnnealing(router_rows, begin=settings.routing_begin, end=settings.routing_end)
            annealing.attach(trainer)
            not_started = annealing.not_started
        train_from(trainer, newest)
    if annealing is not None:
        # a training that was over before it was resumed has not ended here
        annealing.finish()
    if not settings.save_steps:
        with suppress(OSError):
            Path(folder).rmdir()
    steps = trainer.state.global_step
    return Healed(
        fitted=fitted,
        not_fitted=not_fitted if settings.start is None else None,
        not_started=not_started,
        steps=steps,
        tokens=steps * settings.tokens_per_step * args.world_size,
        calibration=calibrate(model.eval(), router_rows) if routed else None,
        log=trainer.state.log_history,
    )


@contextmanager
def _frozen(model: PreTrainedModel, settings: HealingSettings) -> Iterator[None]:
    """Embeddings and head without a gradient, unless they shall be trained."""
    modules = [] if settings.train_embeddings else [model.get_input_embeddings(), model.get_output_embeddings()]
    trained = {parameter for module in modules for parameter in module.parameters() if parameter.requires_grad}
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.eval()


def _make_trainer(
    model: PreTrainedModel,
    source: PreTrainedModel,
    stream: TextStream,
    settings: HealingSettings,
    args: TrainingArguments,
    callbacks: Sequence[Any],
    show: bool,
) -> HealingTrainer:
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
        callbacks=list(callbacks),
        args=args,
    )
    StreamCallback(stream).attach(trainer)
    tokens_per_step = settings.tokens_per_step * args.world_size
    if limit is None:
        TrainingProgress(tokens_per_step, show=show).attach(trainer)
        return trainer
    limit.tokens_per_step = tokens_per_step
    trainer.lr_scheduler = limit.schedule(trainer.create_optimizer())
    limit.attach(trainer)
    return trainer


def _arguments(settings: HealingSettings, folder: str | Path, newest: Path | None) -> TrainingArguments:
    steps = 10**7  # with a limit in time, they never end the training
    if settings.tokens is not None:
        steps = math.ceil(settings.tokens / (settings.tokens_per_step * world_size()))
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=0.05,
        logging_steps=10,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        seed=settings.seed,
        **quiet_arguments(),
    )
    # measured once: by one process, and not again when training is resumed
    args.bf16 = of_first_process(_trained_in_bfloat16(newest), args)
    return hold_precision(args)


def _trained_in_bfloat16(newest: Path | None) -> bool:
    if newest is None:
        return bfloat16_is_faster()
    return torch.load(newest / "training_args.bin", weights_only=False).bf16
