"""What healing adds to the card of a converted checkpoint."""

import re
from pathlib import Path

from .card import UNMEASURED, fill_card


def add_healing(folder: Path, trained: str, settings: str, calibration: str | None) -> None:
    """Adds a section to the README.md of a checkpoint, which gets one if it has none.

    Args:
        folder (`Path`): the healed checkpoint.
        trained: what was done, as a sentence without its end.
        settings: YAML text, echoed.
        calibration: of the routers, as a table of text.
    """
    path = folder / "README.md"
    card = path.read_text("utf-8") if path.is_file() else f"# {folder.name}\n"
    table = f"\n```\n{calibration}\n```\n" if calibration else ""
    section = fill_card("healed_section.md", trained=trained, settings=settings, calibration=table)
    before, references, after = card.partition("\n## References")
    # with what the conversion says of its state, which healing has changed
    unmeasured = re.compile(re.escape(UNMEASURED) + r"[^\n]*(\n[^\n]+)*")
    before = unmeasured.sub("See Healing below for what is known of its quality.", before)
    path.write_text(before + section.rstrip("\n") + "\n" + references + after, encoding="utf-8")
