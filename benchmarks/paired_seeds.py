"""Means over seeds, and the comparison of two arms that were trained from the same ones."""

import math
import statistics
from collections.abc import Sequence


# t at 97.5 %, by degrees of freedom; of more seeds a little too wide
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def mean_interval(values: Sequence[float], digits: int = 4) -> str:
    """Mean over the seeds, with its 95 % interval where there are two seeds or more."""
    mean, half = _mean_and_half(values)
    return f"{mean:.{digits}f}" + ("" if half is None else f" ({mean - half:.{digits}f} to {mean + half:.{digits}f})")


def paired_difference(first: Sequence[float], second: Sequence[float]) -> str:
    """Mean of second minus first over the seeds, with its 95 % interval where there are two seeds or more."""
    mean, half = _mean_and_half([b - a for a, b in zip(first, second, strict=True)])
    if half is None:
        return f"{mean:+.4f}"
    return f"{mean:+.4f} (95 % interval {mean - half:+.4f} to {mean + half:+.4f})"


def _mean_and_half(values: Sequence[float]) -> tuple[float, float | None]:
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return mean, None
    return mean, STUDENT[min(n - 1, max(STUDENT))] * statistics.stdev(values) / math.sqrt(n)
