"""One line of progress: steps, tokens, loss, tokens per second and time left."""

from __future__ import annotations

import time
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


class TrainingProgress(TrainerCallback):
    """Shows how far training is, on standard error; for runs of a known number of steps or of tokens.

        TrainingProgress(tokens_per_step=8 * 2048).attach(trainer)

    Subclasses that measure progress by something else say so in `done`.

    Args:
        tokens_per_step: of all processes; without it tokens and their speed are not shown.
        show: whether to show the line; what it says is measured all the same.
    """

    def __init__(self, tokens_per_step: int | None = None, *, show: bool = True):
        self.tokens_per_step = tokens_per_step
        self.show = show
        # steps of this call of train(), without those before a resume
        self.steps = 0
        self.loss: float | None = None
        self._begin: float | None = None
        self._first_step = self._all_steps = 0
        self._bar: tqdm | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since training began; 0 before."""
        return 0.0 if self._begin is None else time.monotonic() - self._begin

    @property
    def tokens_per_second(self) -> float | None:
        """Mean since training began or went on; `None` where it is not known."""
        if not self.tokens_per_step or not self.steps:
            return None
        return self.steps * self.tokens_per_step / max(self.elapsed, 1e-9)

    def done(self) -> tuple[float, float | None]:
        """Share of the training that is over, 0 to 1, and the seconds that are left, `None` if not known."""
        finished = self._first_step + self.steps
        left = (self._all_steps - finished) * self.elapsed / self.steps if self.steps else None
        return finished / max(self._all_steps, 1), left

    def attach(self, trainer: Trainer) -> None:
        """Adds this callback to a trainer and takes its own progress bar and printed logs away."""
        for other in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(other)
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        self._begin = time.monotonic()
        self.steps, self._first_step, self._all_steps = 0, state.global_step, state.max_steps
        if self.show and state.is_world_process_zero:
            self._bar = tqdm(total=1.0, bar_format="training {percentage:3.0f}%|{bar:24}| {desc}")
            self._write()

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self.steps += 1
        self._write()

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])
            self._write()

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        if self._bar is not None:
            self._write()
            self._bar.close()
            self._bar = None

    def _write(self) -> None:
        if self._bar is None:
            return
        share, left = self.done()
        finished = self._first_step + self.steps
        parts = [f"{finished} steps"]
        if self.tokens_per_step:
            parts.append(f"{short(finished * self.tokens_per_step)} tokens")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.tokens_per_second:
            parts.append(f"{short(self.tokens_per_second)} tokens/s")
        if left is not None:
            parts.append(f"{clock(left)} left")
        self._bar.n = min(share, 1.0)
        self._bar.set_description_str(", ".join(parts), refresh=True)


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def short(count: float) -> str:
    """`950`, `12k`, `1.5M`, `19.8B`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count / 1e3:.0f}k" if count >= 1e4 else f"{count:.0f}"
