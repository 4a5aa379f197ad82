"""Values that change in the course of training, as functions of the share of it that is over."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


# what takes a number takes a function of the progress (0 to 1) as well
Schedule = float | Callable[[float], float]


@dataclass(frozen=True)
class Ramp:
    """From one value to another along half a cosine, between two points of training; constant before and after.

    Args:
        first, last: the values.
        begin, end: shares of training, 0 to 1, where the way begins and ends; equal for a step.

    Raises:
        ValueError: unless `0 <= begin <= end <= 1`.
    """

    first: float
    last: float
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(
                f"The ramp goes from {self.begin} to {self.end}, but must lie within training: give shares with "
                "0 <= begin <= end <= 1."
            )

    def __call__(self, progress: float) -> float:
        """The value when `progress` of the training is over."""
        if progress >= self.end:
            return self.last
        if progress <= self.begin:
            return self.first
        way = (progress - self.begin) / (self.end - self.begin)
        return self.last + (self.first - self.last) * 0.5 * (1 + math.cos(math.pi * way))


def value_at(schedule: Schedule, progress: float) -> float:
    """The value of a schedule, or the number itself."""
    return schedule(progress) if callable(schedule) else float(schedule)
