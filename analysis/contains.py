"""The metric of recall tasks: is a gold string in what was generated?"""

import re
from collections.abc import Sequence


def contains(text: str, answers: str | Sequence[str]) -> bool:
    """Whether any of `answers` occurs in `text`, letter case aside (JRT, arXiv 2407.05483, for SWDE, FDA, NQ, ...).

    Args:
        text (`str`): what the model generated.
        answers (`str` or a sequence of `str`): one gold string, or several of which one suffices.

    Raises:
        ValueError: no gold string, or an empty one, which every text contains.
    """
    gold = [answers] if isinstance(answers, str) else list(answers)
    if not gold or not all(gold):
        raise ValueError(
            f"`answers` is {answers!r}, but must be non-empty strings, at least one; give the gold answer."
        )
    return any(re.search(re.escape(one), text, flags=re.IGNORECASE) for one in gold)
