"""Training for a given time: a callback that stops, shows progress, and a learning rate that follows the clock."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .progress import TrainingProgress
from .training_checkpoints import KeptCallback


class TimeLimitCallback(KeptCallback, TrainingProgress):
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
        # of the runs that this one resumes, and of all behind the last step, by the clock of the first process
        self._before = self._spent = 0.0

    @property
    def fraction(self) -> float:
        """Share of the time that was over at the end of the last step, 0 to 1: the same for all processes."""
        return min(1.0, self._spent / self.seconds)

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        self._before = self._spent = 0.0
        super().on_train_begin(args, state, control, **kwargs)

    def keep(self) -> dict[str, Any]:
        return {"seconds": self._spent}

    def restore(self, kept: dict[str, Any] | None, step: int) -> None:
        if kept is None:
            raise ValueError(
                f"The checkpoint of step {step} does not say how long its training took, as it was made without a "
                "time limit: resume without one, or start anew."
            )
        self._before = self._spent = kept["seconds"]

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
        return self.fraction, self.seconds - self._spent

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        elapsed = self.elapsed
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # clocks differ between processes, and all must do the same at the same step
            shared = torch.tensor([elapsed], device=args.device)
            torch.distributed.broadcast(shared, src=0)
            elapsed = float(shared)
        self._spent = self._before + elapsed
        super().on_step_end(args, state, control, **kwargs)
        if self._spent + elapsed / self.steps > self.seconds:
            control.should_training_stop = True
