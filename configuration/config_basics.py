"""What the configurations of all architectures share."""

import difflib
import os
from pathlib import Path
from typing import Any


def check_choice(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises a `ValueError` that names the field, the value and what is allowed."""
    if value not in allowed:
        guess = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {guess[0]!r}?" if guess else "."
        raise ValueError(f"`{field}` is {value!r}, but must be one of {', '.join(map(repr, allowed))}{hint}")


class CodeKeepingConfig:
    """Mixed into a configuration whose checkpoints carry their own code."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As in transformers; drops an `auto_map` whose code files do not lie in the folder."""
        auto_map = getattr(self, "auto_map", None)
        references = [reference for reference in (auto_map or {}).values() if isinstance(reference, str)]
        files = [f"{reference.split('--')[-1].split('.')[0]}.py" for reference in references]
        if not all(Path(save_directory, file).is_file() for file in files):
            self.auto_map = {}
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            if auto_map:
                self.auto_map = auto_map
