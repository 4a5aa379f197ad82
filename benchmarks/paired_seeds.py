"""Comparison of two arms that were trained from the same seeds."""

import math
import statistics
from collections.abc import Sequence


STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # t at 97.5 %, by degrees of freedom


def paired_difference(first: Sequence[float], second: Sequence[float]) -> str:
    """Mean of second minus first over the seeds, with its 95 % interval where there are two seeds or more."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return f"{mean:+.4f}"
    half = STUDENT.get(n - 1, 2.0) * statistics.stdev(differences) / math.sqrt(n)
    return f"{mean:+.4f} (95 % interval {mean - half:+.4f} to {mean + half:+.4f})"
