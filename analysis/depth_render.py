"""A `DepthMap` as text for a terminal and as an HTML page, and the way into a file."""

import html
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from .depth_map import (
    DepthMap,
    MappedToken,
    cell_width,
    depth_colour,
    direction,
    ink_colour,
    legend_depths,
    lines_of,
    wrapped,
)
from .depth_picture import render_png, require_matplotlib, summary


DEPTH_MEANING = "how many recursions (MoR) or routed layers (MoD) it enters"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def wants_colour(stream: TextIO) -> bool:
    """Colour only on a terminal that can show it, and never with NO_COLOR set (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(getattr(stream, "isatty", lambda: False)())


def render_terminal(mapped: DepthMap, *, colour: bool | None = None, width: int = 100, stream: Any = None) -> str:
    """The map as text: coloured backgrounds, or the depth of each token below it.

    Args:
        mapped: what to show.
        colour (`bool`, *optional*): by default whether `stream` is a terminal and NO_COLOR is not set.
        width (`int`): columns; lines are broken between tokens.
        stream: where the text will go, standard output by default.
    """
    colour = wants_colour(stream or sys.stdout) if colour is None else colour
    lines = [row for line in lines_of(mapped.tokens) for row in wrapped(line, width)]
    body = [_colour_line(line, mapped.max_depth) if colour else _plain_line(line) for line in lines]
    return "\n".join([*body, "", *_terminal_legend(mapped, colour)])


def _paint(text: str, depth: int, max_depth: int) -> str:
    background = depth_colour(depth, max_depth)
    ink = ink_colour(background)
    codes = ";".join(map(str, (48, 2, *background, 38, 2, *ink)))
    return f"\x1b[{codes}m{text}\x1b[0m"


def _colour_line(line: list[MappedToken], max_depth: int) -> str:
    return "".join(_paint(token.text.replace("\t", "    "), token.depth, max_depth) for token in line if token.text)


def _digit(depth: int) -> str:
    return DIGITS[depth] if depth < len(DIGITS) else "+"


def _plain_line(line: list[MappedToken]) -> str:
    """Two lines: the tokens, and under the first visible character of each its depth."""
    if any(direction(token.text) == "R" for token in line):
        # a terminal reorders such a line, so nothing can stand below it
        return " ".join(f"{token.text.strip() or repr(token.text)}/{_digit(token.depth)}" for token in line)
    text, marks = "", ""
    for token in line:
        piece = token.text.replace("\t", "    ")
        lead = len(piece) - len(piece.lstrip(" "))
        at = lead if lead < len(piece) else 0
        size = cell_width(piece)
        text += piece
        marks += (" " * at + _digit(token.depth)).ljust(size)[:size] if size else ""
    return f"{text}\n{marks}".rstrip()


def _terminal_legend(mapped: DepthMap, colour: bool) -> list[str]:
    lines = [summary(mapped)]
    histogram, most = mapped.histogram, max(mapped.histogram)
    for depth in range(mapped.max_depth + 1):
        count = histogram[depth]
        if not count and depth not in legend_depths(mapped.max_depth):
            continue
        mark = _paint(f" {depth:>2} ", depth, mapped.max_depth) if colour else f"{depth:>3} "
        name = f" = {_digit(depth)}" if not colour and depth > 9 else ""
        bar = "#" * round(30 * count / most)
        lines.append(f"{mark}{name} {100 * count / len(mapped.tokens):5.1f} % {bar}".rstrip())
    if not colour:
        lines.append(f"Each token has its depth below it: {DEPTH_MEANING}.")
    return lines


_STYLE = """
:root { color-scheme: light dark; --page: #fcfbf9; --ink: #1b1920; --soft: #6b6775; --card: #ffffff; --line: #e4e0ea; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0e0d11; --ink: #eceaf0; --soft: #a29dad; --card: #151319; --line: #37323f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
.summary { color: var(--soft); margin: 0 0 1.25rem; }
table { border-collapse: collapse; margin: 0 0 1.5rem; font-variant-numeric: tabular-nums; font-size: .875rem; }
td, th { padding: .15rem .6rem .15rem 0; text-align: right; font-weight: normal; }
th { color: var(--soft); }
td.swatch b { display: inline-block; min-width: 2.2em; padding: 0 .4em; text-align: center; border-radius: .3em; }
td.bar { text-align: left; width: 16rem; }
td.bar i { display: block; height: .6rem; border-radius: .3rem; background: var(--soft); min-width: 1px; }
.text { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1.1rem 1.25rem;
  font: .95rem/2 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.text p { margin: 0; white-space: pre-wrap; min-height: 2em; }
.text span { padding: .18em 0; border-radius: .2em; box-shadow: inset 1px 0 0 rgb(128 128 128 / .35);
  -webkit-box-decoration-break: clone; box-decoration-break: clone; position: relative; }
.text span.special { font-style: italic; }
.text span:hover { outline: 2px solid var(--ink); z-index: 1; }
.text span:hover::after { content: attr(data-tip); position: absolute; left: 0; bottom: calc(100% + .35em);
  padding: .1em .55em; border-radius: .35em; background: var(--ink); color: var(--page); font: .78rem/1.7 system-ui,
  sans-serif; white-space: nowrap; font-style: normal; pointer-events: none; direction: ltr; }
footer { color: var(--soft); font-size: .85rem; margin-top: 1rem; }
"""


def render_html(mapped: DepthMap) -> str:
    """The map as one HTML page without scripts or outside files; hovering over a token shows its depth."""
    css = []
    for depth in range(mapped.max_depth + 1):
        background = depth_colour(depth, mapped.max_depth)
        red, green, blue = ink_colour(background)
        css.append(f".d{depth} {{ background: rgb{background}; color: rgb({red}, {green}, {blue}); }}")
    paragraphs = []
    position = 0
    for line in lines_of(mapped.tokens):
        spans = []
        for token in line:
            spans.append(_span(token, position, mapped.max_depth))
            position += 1
        paragraphs.append(f'<p dir="auto">{"".join(spans)}</p>')
    title = html.escape(mapped.title or "Depth per token")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}{chr(10).join(css)}\n</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f'<p class="summary">{summary(mapped)}</p>\n{_html_legend(mapped)}\n'
        f'<main class="text">\n{chr(10).join(paragraphs)}\n</main>\n'
        f"<footer>Depth: {DEPTH_MEANING}. Hover over a token to read its own.</footer>\n</body>\n</html>\n"
    )


def _span(token: MappedToken, position: int, max_depth: int) -> str:
    kind = f"d{token.depth} special" if token.special else f"d{token.depth}"
    # a token that ends inside a character would be invisible
    text = html.escape(token.text) or "\N{MIDDLE DOT}"
    return f'<span class="{kind}" data-tip="depth {token.depth} of {max_depth}">{text}</span>'


def _html_legend(mapped: DepthMap) -> str:
    histogram, most, total = mapped.histogram, max(mapped.histogram), len(mapped.tokens)
    named = set(legend_depths(mapped.max_depth))
    rows = []
    for depth, count in enumerate(histogram):
        if count or depth in named:
            rows.append(
                f'<tr><td class="swatch"><b class="d{depth}">{depth}</b></td><td>{count}</td>'
                f"<td>{100 * count / total:.1f} %</td>"
                f'<td class="bar"><i style="width: {100 * count / most:.1f}%"></i></td></tr>'
            )
    head = "<tr><th>depth</th><th>tokens</th><th>share</th><th></th></tr>"
    return f"<table>\n{head}\n{chr(10).join(rows)}\n</table>"


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path, if a map can be written there.

    Raises:
        ValueError: for an ending other than .html and .png, PNG without matplotlib, or a folder that does not exist.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm", ".png"):
        raise ValueError(f"The depth map cannot be written to {str(path)!r}; give a file ending in .html or .png.")
    if not target.parent.is_dir():
        raise ValueError(f"The folder {str(target.parent)!r} does not exist; make it first.")
    if target.suffix.lower() == ".png":
        require_matplotlib()
    return target


def write_depth_map(mapped: DepthMap, path: str | os.PathLike[str]) -> Path:
    """Writes the map as HTML or PNG, by the ending of `path`; the file appears whole or not at all.

    Raises:
        ValueError: as `check_target`.
    """
    target = check_target(path)
    png = target.suffix.lower() == ".png"
    content = render_png(mapped) if png else render_html(mapped).encode("utf-8", errors="replace")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target
