"""Training for a given time: a callback that stops, shows progress, and a learning rate that follows the clock."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .progress import TrainingProgress


class TimeLimitCallback(TrainingProgress):
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
        super().__init__(show=progress)
        self.seconds = 60.0 * minutes
        self.warmup = warmup
        self.floor = floor

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

    def done(self) -> tuple[float, float | None]:
        return self.fraction, self.seconds - self.elapsed

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        elapsed = self.elapsed
        over = elapsed + elapsed / self.steps > self.seconds
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # clocks differ between processes, and all must stop at the same step
            decision = torch.tensor([over], dtype=torch.uint8, device=args.device)
            torch.distributed.broadcast(decision, src=0)
            over = bool(decision.item())
        if over:
            control.should_training_stop = True
