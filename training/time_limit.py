"""Training for a given time: a callback that stops, shows progress, and a learning rate that follows the clock."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


class TimeLimitCallback(TrainerCallback):
    """Stops training after `minutes` and shows one progress bar whose unit is time, with loss and time left.

    The step that would pass the limit is not begun: its length is foreseen from the mean of the steps so far. At least
    one step is made. Give `TrainingArguments` a `max_steps` that is never reached, and take the schedule of this
    callback, since the number of steps is not known beforehand:

        limit = TimeLimitCallback(minutes=4)
        trainer = Trainer(..., optimizers=(optimizer, limit.schedule(optimizer)))
        limit.attach(trainer)

    Args:
        minutes: wall-clock time from the begin of `trainer.train()`, above 0.
        warmup: share of the time in which the learning rate rises linearly from 0.
        floor: share of the learning rate at the end of the cosine.
        progress: whether to show the bar, on standard error.

    Raises:
        ValueError: `minutes` is not above 0.
    """

    def __init__(self, minutes: float, *, warmup: float = 0.05, floor: float = 0.1, progress: bool = True):
        if not minutes > 0:
            raise ValueError(f"minutes={minutes} leaves no time to train: give a number above 0.")
        self.seconds = 60.0 * minutes
        self.warmup = warmup
        self.floor = floor
        self.progress = progress
        self.steps = 0
        self.tokens_per_step: int | None = None
        self._begin: float | None = None
        self._loss: float | None = None
        self._bar: tqdm | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since training began; 0 before."""
        return 0.0 if self._begin is None else time.monotonic() - self._begin

    @property
    def fraction(self) -> float:
        """Share of the time that is over, 0 to 1."""
        return min(1.0, self.elapsed / self.seconds)

    def factor(self, _step: int = 0) -> float:
        """What the learning rate is multiplied by now: linear warm-up, then a cosine down to `floor`."""
        if self.fraction < self.warmup:
            # never exactly 0, or the first step would be lost
            return max(self.fraction / self.warmup, 0.05)
        progress = (self.fraction - self.warmup) / (1 - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def schedule(self, optimizer: Optimizer) -> LambdaLR:
        """A learning-rate schedule over the time limit, for `Trainer(optimizers=(optimizer, schedule))`."""
        return LambdaLR(optimizer, self.factor)

    def attach(self, trainer: Trainer) -> None:
        """Adds this callback to a trainer and takes its own progress bar and printed logs away."""
        for other in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(other)
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        self._begin = time.monotonic()
        self.steps = 0
        if self.progress and state.is_world_process_zero:
            self._bar = tqdm(
                total=self.seconds,
                desc=f"{_clock(self.seconds)} left",
                bar_format="training {percentage:3.0f}%|{bar:24}| {desc}",
            )

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self.steps += 1
        elapsed = self.elapsed
        over = elapsed + elapsed / self.steps > self.seconds
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # clocks differ between processes, and all must stop at the same step
            decision = torch.tensor([over], dtype=torch.uint8, device=args.device)
            torch.distributed.broadcast(decision, src=0)
            over = bool(decision.item())
        if over:
            control.should_training_stop = True
        self._show(elapsed)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._loss = float(logs["loss"])
            self._show(self.elapsed)

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        if self._bar is not None:
            self._show(self.seconds if control.should_training_stop else self.elapsed)
            self._bar.close()
            self._bar = None

    def _show(self, elapsed: float) -> None:
        if self._bar is None:
            return
        parts = [f"{self.steps} steps"]
        if self.tokens_per_step:
            parts.append(f"{self.steps * self.tokens_per_step / 1000:.0f}k tokens")
        if self._loss is not None:
            parts.append(f"loss {self._loss:.3f}")
        parts.append(f"{_clock(max(0.0, self.seconds - elapsed))} left")
        self._bar.n = min(elapsed, self.seconds)
        self._bar.set_description_str(", ".join(parts), refresh=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
