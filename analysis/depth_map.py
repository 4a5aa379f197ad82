"""Depth of every token of a text: how many recursions (MoR) or routed layers (MoD) the routers gave it."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cost import passes_of


@dataclass(frozen=True)
class MappedToken:
    """One token of a text.

    Attributes:
        text: the characters it stands for; empty if it ends inside a character that an earlier token shows.
        depth: passes of `config.routed_passes` that it entered.
        special: it is a special token of the tokenizer, `text` being its name.
    """

    text: str
    depth: int
    special: bool = False


@dataclass(frozen=True)
class DepthMap:
    """The tokens of a text with their depths.

    Attributes:
        tokens: in order of the text.
        max_depth: passes of a token that skips nothing.
        title: what was mapped, for headings.
    """

    tokens: tuple[MappedToken, ...]
    max_depth: int
    title: str = ""

    @property
    def histogram(self) -> list[int]:
        """Number of tokens at depth 0 .. max_depth."""
        counts = [0] * (self.max_depth + 1)
        for token in self.tokens:
            counts[token.depth] += 1
        return counts

    @property
    def mean_depth(self) -> float:
        return sum(token.depth for token in self.tokens) / len(self.tokens)


def depth_map(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    add_special_tokens: bool = True,
    chunk_size: int = 1024,
    title: str = "",
) -> DepthMap:
    """Runs the routers of `model` over `text`.

    Args:
        model (`PreTrainedModel`): a model with `output_routing`; it is put into eval mode for the call.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        text (`str`): any text that is not empty.
        add_special_tokens (`bool`): whether the tokenizer adds its BOS and EOS tokens.
        chunk_size (`int`): a longer text is read in chunks of this many tokens through the cache, which gives the same
            depths; the non-causal rule "topk" needs the whole text in one call.
        title (`str`): heading of the map.

    Raises:
        ValueError: for an empty text or a model whose tokens all have the same depth by construction.
    """
    config = model.config
    passes = passes_of(config)
    if all(routed_pass.always for routed_pass in passes):
        kind = f"{config.model_type!r} model" + (f" with routing={config.routing!r}" if passes else "")
        raise ValueError(
            f"A {kind} gives every token the same depth; give a model with routed layers and capacities below "
            "1, which `varidepth convert` makes of a vanilla one."
        )
    ids, texts, specials = tokenize(tokenizer, text, add_special_tokens)
    if not ids:
        raise ValueError("The text has no tokens; give a text that is not empty.")
    if getattr(config, "inference_rule", None) == "topk":
        chunk_size = len(ids)
    depths = _depths(model, ids, chunk_size)
    tokens = tuple(MappedToken(t, d, s) for t, d, s in zip(texts, depths, specials, strict=True))
    return DepthMap(tokens, len(passes), title)


def _depths(model: Any, ids: list[int], chunk_size: int) -> list[int]:
    was_training, cache = model.training, None
    model.eval()
    depths: list[int] = []
    try:
        for start in range(0, len(ids), chunk_size):
            columns = torch.tensor([ids[start : start + chunk_size]], device=model.device)
            more = len(ids) > chunk_size
            # the logits of one position suffice: a head over a long text is most of the memory
            head = {"logits_to_keep": 1} if model.get_output_embeddings() is not None else {}
            with torch.no_grad():
                output = model(columns, cache=cache, use_cache=more, output_routing=True, **head)
            cache = output.cache if more else None
            depths += output.token_depth[0].tolist()
    finally:
        model.train(was_training)
    return depths


def tokenize(tokenizer: Any, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[str], list[bool]]:
    """Token ids, the piece of `text` each stands for, and whether it is special.

    Byte-level tokenizers split characters: the first token of a character shows it, the others show nothing.
    Characters that no token covers (whitespace that a tokenizer drops) are shown by the token after them.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(
        text, add_special_tokens=add_special_tokens, return_offsets_mapping=fast, verbose=False, truncation=False
    )
    ids = list(encoded["input_ids"])
    special_ids = set(getattr(tokenizer, "all_special_ids", ()))
    specials = [token in special_ids for token in ids]
    names = tokenizer.convert_ids_to_tokens(ids)
    if not fast:
        pieces = [tokenizer.convert_tokens_to_string([name]) for name in names]
        return ids, [n if s else p for n, p, s in zip(names, pieces, specials, strict=True)], specials
    texts, done = [], 0
    for name, special, (start, stop) in zip(names, specials, encoded["offset_mapping"], strict=True):
        if special and start == stop:
            texts.append(name)
            continue
        texts.append(name if special else text[done:stop])
        done = max(done, stop)
    return ids, texts, specials


def visible(text: str) -> str:
    """`text` without characters that would move the cursor or run as a terminal command."""
    shown = []
    for char in text:
        if char in "\n\t":
            shown.append(char)
        elif unicodedata.category(char) in ("Cc", "Cs") or char in "\u2028\u2029":
            # control characters have pictures of their own at U+2400
            shown.append(chr(0x2400 + ord(char)) if ord(char) < 0x20 else "\N{REPLACEMENT CHARACTER}")
        elif char in BIDI_CONTROLS:
            shown.append("\N{MIDDLE DOT}")
        else:
            shown.append(char)
    return "".join(shown)


LINE_BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
BIDI_CONTROLS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def lines_of(tokens: Sequence[MappedToken]) -> list[list[MappedToken]]:
    """The tokens line by line. A token that ends lines in its middle is cut there; each piece keeps its depth.

    A newline is shown as `LINE_BREAK` at the end of its line.
    """
    lines: list[list[MappedToken]] = [[]]
    for token in tokens:
        *ended, rest = visible(token.text).split("\n")
        for part in ended:
            lines[-1].append(MappedToken(part + LINE_BREAK, token.depth, token.special))
            lines.append([])
        if rest or not ended:
            lines[-1].append(MappedToken(rest, token.depth, token.special))
    return lines if lines[-1] or len(lines) == 1 else lines[:-1]


def wrapped(line: list[MappedToken], width: int) -> list[list[MappedToken]]:
    """Breaks a line between tokens, at spaces where it can, so that no row is wider than `width` cells.

    A token that is wider than a row is cut.
    """
    rows: list[list[MappedToken]] = [[]]
    used = 0
    for token in line:
        text = token.text.replace("\t", "    ")
        # a character takes at most two cells
        step = max(len(text), 1) if cell_width(text) <= width else max(width // 2, 1)
        for start in range(0, max(len(text), 1), step):
            piece = MappedToken(text[start : start + step], token.depth, token.special)
            size = cell_width(piece.text)
            if rows[-1] and used + size > width:
                rows.append(_end_of_word(rows[-1], piece, width // 3))
                used = sum(cell_width(one.text) for one in rows[-1])
            rows[-1].append(piece)
            used += size
    return rows


def _end_of_word(row: list[MappedToken], following: MappedToken, most: int) -> list[MappedToken]:
    """Takes the beginning of a word, of at most `most` cells, off the end of `row` if `following` goes on with it."""
    moved = cell_width(following.text)
    if following.text[:1].isspace():
        return []
    for start in range(len(row) - 1, 0, -1):
        moved += cell_width(row[start].text)
        if moved > most:
            break
        if row[start].text[:1].isspace():
            taken = row[start:]
            del row[start:]
            return taken
    return []


def direction(text: str) -> str:
    """`R` for text written from right to left, `L` from left to right, by its first character that says; else ``."""
    for char in text:
        kind = unicodedata.bidirectional(char)
        if kind in ("R", "AL", "AN"):
            return "R"
        if kind == "L":
            return "L"
    return ""


def visual_order(row: list[MappedToken]) -> list[MappedToken]:
    """The tokens of a row from left to right on the page; words keep their order within runs of one direction."""
    kinds = [direction(token.text) for token in row]
    base = next(filter(None, kinds), "L")
    if "R" not in kinds:
        return row
    for i, kind in enumerate(kinds):
        if not kind:
            # what has no direction belongs to both neighbours if they agree, else to the row
            before = kinds[i - 1] if i else base
            after = next(filter(None, kinds[i + 1 :]), base)
            kinds[i] = before if before == after else base
    runs: list[list[MappedToken]] = []
    for i, token in enumerate(row):
        if not i or kinds[i] != kinds[i - 1]:
            runs.append([])
        runs[-1].append(token)
        if i + 1 == len(row) or kinds[i + 1] != kinds[i]:
            runs[-1] = runs[-1][::-1] if kinds[i] == "R" else runs[-1]
    return [token for run in (runs[::-1] if base == "R" else runs) for token in run]


def cell_width(text: str) -> int:
    """Columns that `text` takes in a terminal."""
    width = 0
    for char in text:
        if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
            continue
        width += 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1
    return width


# from nearly nothing to full depth: light to dark in even steps of lightness, told apart by the colour-blind
_RAMP = ((255, 246, 214), (253, 209, 122), (240, 143, 98), (203, 79, 110), (138, 48, 130), (72, 32, 118))


def depth_colour(depth: int, max_depth: int) -> tuple[int, int, int]:
    """Background of a token at `depth`, as red, green and blue."""
    place = depth / max(max_depth, 1) * (len(_RAMP) - 1)
    low = min(int(place), len(_RAMP) - 2)
    part = place - low
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
    return red, green, blue


def ink_colour(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has more contrast with `background` (at least 4.5 to 1, WCAG 2 level AA)."""
    linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 1.05 * 0.05 else (255, 255, 255)


def legend_depths(max_depth: int, most: int = 9) -> list[int]:
    """Depths worth naming in a legend: all, or evenly spaced ones if there are many."""
    if max_depth < most:
        return list(range(max_depth + 1))
    return sorted({round(i * max_depth / (most - 1)) for i in range(most)})
