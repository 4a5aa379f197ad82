"""A `DepthMap` as a PNG picture, drawn with matplotlib (the extra `plot`)."""

import io
import logging
import warnings
from typing import Any

from .depth_map import (
    DepthMap,
    MappedToken,
    cell_width,
    depth_colour,
    direction,
    ink_colour,
    legend_depths,
    lines_of,
    visual_order,
    wrapped,
)


PAGE, INK, SOFT = "#fcfbf9", "#1b1920", "#6b6775"

# matplotlib carries the DejaVu fonts; the others are used for characters that those lack, where they are installed
_FONTS = (
    "DejaVu Sans Mono",
    "Noto Sans Mono CJK SC",
    "Noto Sans Mono CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "DejaVu Sans",
    "Arial Unicode MS",
    "Segoe UI Symbol",
)
# width of every character of DejaVu Sans Mono, in ems
_ADVANCE = 1233 / 2048
_DPI = 144
# whole pixels, so that the characters of a line stay in their cells
_CELL = 12 / _DPI
_FONT_SIZE = 72 * _CELL / _ADVANCE
_LINE = 0.245
_MARGIN = 0.32


def summary(mapped: DepthMap) -> str:
    """One line about the whole map."""
    return f"{len(mapped.tokens)} tokens, mean depth {mapped.mean_depth:.2f} of {mapped.max_depth}"


def require_matplotlib() -> None:
    """Raises a `ValueError` without matplotlib, which is the extra `plot`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "A PNG picture needs matplotlib; install it with `pip install varidepth[plot]`, or write an .html file."
        ) from error


def render_png(mapped: DepthMap, *, width: int = 92, max_lines: int = 120) -> bytes:
    """The map as a PNG picture: the text on backgrounds coloured by depth, with a legend.

    Args:
        mapped: what to draw.
        width (`int`): characters per line.
        max_lines (`int`): a longer text is cut there and the picture says how much is missing.

    Raises:
        ValueError: without matplotlib.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for line in lines_of(mapped.tokens) for row in wrapped(line, width)]
    hidden = sum(len(row) for row in rows[max_lines:])
    rows = rows[:max_lines]
    named = [depth for depth, n in enumerate(mapped.histogram) if n or depth in legend_depths(mapped.max_depth)]
    top = _MARGIN + 0.74 + 0.2 * len(named)
    size = (2 * _MARGIN + _CELL * width, top + _LINE * (len(rows) + bool(hidden)) + _MARGIN)
    buffer, logger = io.BytesIO(), logging.getLogger("matplotlib")
    level = logger.level
    # the user's own style must not move characters; a character that no font has is drawn as a box
    with matplotlib.rc_context({"text.hinting": "none", "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")
        logger.setLevel(logging.ERROR)
        try:
            figure = Figure(figsize=size, dpi=_DPI, facecolor=PAGE)
            FigureCanvasAgg(figure)
            page = _Page(figure, size)
            page.legend(mapped, named)
            for number, row in enumerate(rows):
                page.row(row, top + _LINE * (number + 0.5), mapped.max_depth, width)
            if hidden:
                page.write(_MARGIN, top + _LINE * (len(rows) + 0.5), f"... {hidden} more tokens", 8.5, SOFT)
            figure.savefig(buffer, format="png", metadata={"Software": "varidepth"})
        finally:
            logger.setLevel(level)
    return buffer.getvalue()


class _Page:
    """A figure measured in inches from its upper left corner."""

    def __init__(self, figure: Any, size: tuple[float, float]) -> None:
        from matplotlib import font_manager

        installed = {font.name for font in font_manager.fontManager.ttflist}
        self.fonts = [name for name in _FONTS if name in installed] or ["monospace"]
        self.axes = figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, size[0])
        self.axes.set_ylim(size[1], 0)
        self.axes.axis("off")

    def write(self, x: float, y: float, text: str, points: float, colour: Any, **style: Any) -> None:
        # "$" would start a formula
        text = text.replace("$", r"\$")
        style = {"va": "center", **style}
        self.axes.text(x, y, text, fontsize=points, family=self.fonts, color=colour, **style)

    def boxes(self, boxes: list[tuple[float, float, float, float]], colours: list[Any]) -> None:
        """Filled rectangles (left, top, right, bottom)."""
        from matplotlib.collections import PolyCollection

        corners = [((left, top), (right, top), (right, low), (left, low)) for left, top, right, low in boxes]
        self.axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="none"), autolim=False)

    def legend(self, mapped: DepthMap, named: list[int]) -> None:
        self.write(_MARGIN, _MARGIN + 0.05, mapped.title or "Depth per token", 11.5, INK, weight="bold")
        self.write(_MARGIN, _MARGIN + 0.31, summary(mapped), 8.5, SOFT)
        most = max(mapped.histogram)
        boxes, colours = [], []
        for number, depth in enumerate(named):
            y, count = _MARGIN + 0.58 + 0.2 * number, mapped.histogram[depth]
            background = depth_colour(depth, mapped.max_depth)
            boxes.append((_MARGIN, y - 0.085, _MARGIN + 0.34, y + 0.085))
            boxes.append((_MARGIN + 1.2, y - 0.04, _MARGIN + 1.2 + 2.6 * count / most, y + 0.04))
            colours += [_unit(background), SOFT]
            self.write(_MARGIN + 0.17, y, str(depth), 7.5, _unit(ink_colour(background)), ha="center")
            self.write(_MARGIN + 1.08, y, f"{100 * count / len(mapped.tokens):.1f} %", 7.5, SOFT, ha="right")
        self.boxes(boxes, colours)

    def row(self, row: list[MappedToken], y: float, max_depth: int, width: int) -> None:
        used = sum(cell_width(token.text) for token in row)
        from_right = next(filter(None, (direction(token.text) for token in row)), "L") == "R"
        column = width - used if from_right else 0
        boxes, colours = [], []
        # simple tokens of one ink share one line of text with gaps, which draws ten times faster than each alone
        inks: dict[tuple[tuple[int, int, int], bool], list[str]] = {}
        for token in visual_order(row):
            cells = cell_width(token.text)
            if not cells:
                continue
            x, background = _MARGIN + _CELL * column, depth_colour(token.depth, max_depth)
            boxes.append((x + 0.007, y - 0.1, x + _CELL * cells - 0.007, y + 0.1))
            colours.append(_unit(background))
            ink = ink_colour(background)
            if token.text.isascii():
                line = inks.setdefault((ink, token.special), [" "] * width)
                line[column : column + cells] = token.text
            else:
                self.write(x, y + 0.055, token.text, _FONT_SIZE, _unit(ink), va="baseline")
            column += cells
        self.boxes(boxes, colours)
        for (ink, special), characters in inks.items():
            style = "italic" if special else "normal"
            text = "".join(characters).rstrip()
            self.write(_MARGIN, y + 0.055, text, _FONT_SIZE, _unit(ink), va="baseline", style=style)


def _unit(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = colour
    return red / 255, green / 255, blue / 255
