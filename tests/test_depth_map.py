"""Depth maps: tokens to text, and the terminal, HTML and PNG forms of awkward texts."""

import html.parser
import io
import os
import struct
import zlib
from types import SimpleNamespace

import pytest
import torch
from tiny_families import tiny_mod
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from varidepth.analysis.depth_map import (
    DepthMap,
    MappedToken,
    cell_width,
    depth_colour,
    depth_map,
    ink_colour,
    lines_of,
    tokenize,
    visible,
    visual_order,
    wrapped,
)
from varidepth.analysis.depth_render import render_html, render_terminal, wants_colour, write_depth_map
from varidepth.configuration.routed_config import RoutedPass


TEXTS = {
    "prose": "The cat sat on the mat, and the dog did not.",
    "lines": "one\n\n  two\r\n\tthree\n",
    "markup": "<b>&amp; $x$ ```{}```</b>",
    "bytes": "naïve ½ 日本語 👩‍👩‍👧 e\u0301",
    "right to left": "שלום עולם, mixed with مرحبا بالعالم.",
    "controls": "\x1b[31mred\x1b[0m \u202eback\u202c \x00\x07 \u2028 end",
    "special": "<s>start<|endoftext|>",
    "long word": "x" * 500,
}


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([TEXTS["prose"]] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", bos_token="<s>")


class DepthByPosition:
    """A model whose token at column t has depth 1 + t mod 3, whatever is in the cache."""

    def __init__(self, **fields):
        passes = [RoutedPass((slot,), 1 / (slot + 1), always=slot == 0) for slot in range(3)]
        self.config = SimpleNamespace(model_type="mor", routed_passes=passes, **fields)
        self.device, self.training, self.calls = torch.device("cpu"), True, []

    def get_output_embeddings(self):
        return None

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode

    def __call__(self, ids, cache=None, use_cache=False, output_routing=False):
        assert output_routing and not self.training
        seen = cache or 0
        self.calls.append(ids.shape[1])
        columns = torch.arange(seen, seen + ids.shape[1])[None]
        return SimpleNamespace(token_depth=1 + columns % 3, cache=seen + ids.shape[1])


def mapped(text: str, tokenizer, most: int = 3) -> DepthMap:
    _, texts, specials = tokenize(tokenizer, text)
    tokens = (MappedToken(t, i % (most + 1), s) for i, (t, s) in enumerate(zip(texts, specials, strict=True)))
    return DepthMap(tuple(tokens), most)


@pytest.mark.parametrize("name", TEXTS)
def test_the_pieces_of_a_text_are_the_text(name, tokenizer):
    ids, texts, specials = tokenize(tokenizer, TEXTS[name])
    assert "".join(texts) == TEXTS[name]
    assert len(ids) == len(texts) == len(specials)
    assert sum(specials) == (2 if name == "special" else 0)


def test_a_tokenizer_without_offsets_shows_its_own_pieces(tokenizer):
    slow = SimpleNamespace(
        is_fast=False,
        all_special_ids=[1],
        convert_ids_to_tokens=tokenizer.convert_ids_to_tokens,
        convert_tokens_to_string=tokenizer.convert_tokens_to_string,
    )

    class Slow:
        def __getattr__(self, name):
            return getattr(slow, name)

        def __call__(self, text, return_offsets_mapping, **kwargs):
            assert not return_offsets_mapping
            return tokenizer(text, **kwargs)

    _, texts, specials = tokenize(Slow(), "<s>The cat")
    assert texts[0] == "<s>" and specials[0] and "".join(texts[1:]) == "The cat"


def test_depths_come_from_the_model_and_its_mode_is_restored(tokenizer):
    model = DepthByPosition()
    result = depth_map(model, tokenizer, TEXTS["prose"], title="a title")
    assert [token.depth for token in result.tokens] == [1 + i % 3 for i in range(len(result.tokens))]
    assert (result.max_depth, result.title, model.training) == (3, "a title", True)
    assert sum(result.histogram) == len(result.tokens)
    assert result.mean_depth == pytest.approx(sum(t.depth for t in result.tokens) / len(result.tokens))


def test_a_long_text_is_read_in_chunks_but_topk_in_one(tokenizer):
    chunked, whole = DepthByPosition(inference_rule="threshold"), DepthByPosition(inference_rule="topk")
    results = [depth_map(model, tokenizer, TEXTS["prose"] * 3, chunk_size=16) for model in (chunked, whole)]
    assert results[0] == results[1]
    assert len(chunked.calls) > 2 and max(chunked.calls) == 16 and len(whole.calls) == 1


def test_an_empty_text_and_a_vanilla_model_are_refused(tokenizer):
    with pytest.raises(ValueError, match="The text has no tokens"):
        depth_map(DepthByPosition(), tokenizer, "")
    vanilla = SimpleNamespace(config=SimpleNamespace(model_type="llama"))
    with pytest.raises(ValueError, match="'llama' model gives every token the same depth"):
        depth_map(vanilla, tokenizer, "text")
    full = tiny_mod(capacity=1.0)
    with pytest.raises(ValueError, match="'mod' model with routing='expert_choice' gives every token the same depth"):
        depth_map(full, tokenizer, "text")


@pytest.mark.parametrize("fields", [{}, {"routing_unit": "attention"}, {"routing": "stochastic"}])
@torch.no_grad()
def test_the_depth_of_a_token_is_how_many_routed_layers_it_enters(fields, tokenizer):
    model = tiny_mod(num_hidden_layers=6, **fields)
    model.resize_token_embeddings(300)
    ids, _, _ = tokenize(tokenizer, TEXTS["prose"])
    whole = model(torch.tensor([ids]), output_routing=True).routing_mask[0]
    result = depth_map(model, tokenizer, TEXTS["prose"], chunk_size=7)
    assert [token.depth for token in result.tokens] == whole.sum(-1).tolist()
    assert result.max_depth == 3 and len({token.depth for token in result.tokens}) > 1


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("colour", [True, False])
def test_terminal(name, colour, tokenizer):
    text = render_terminal(mapped(TEXTS[name], tokenizer), colour=colour, width=40)
    # nothing of the text reaches the terminal as a command
    assert text.count("\x1b[") == text.count("\x1b") == (2 * text.count("\x1b[48;2;") if colour else 0)
    assert not set(text) & set("\x00\x07\u202e\u2028\r")
    assert "tokens, mean depth" in text
    if not colour:
        assert all(cell_width(line) <= 40 for line in text.splitlines()[:-6] if "/" not in line)


def test_plain_text_has_the_depth_below_each_token():
    tokens = [MappedToken("The", 1), MappedToken(" cat", 2), MappedToken("s", 3), MappedToken("\n", 1)]
    first, second = render_terminal(DepthMap(tuple(tokens), 3), colour=False).splitlines()[:2]
    assert (first, second) == ("The cats↵", "1   2  31")


def test_colour_needs_a_terminal_and_no_no_color(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour(Terminal()) and not wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tips, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta",):
            self.open.append(tag)
        if tag == "span":
            self.tips.append(dict(attrs)["data-tip"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "span" in self.open:
            self.text += data


@pytest.mark.parametrize("name", TEXTS)
def test_html_is_well_formed_self_contained_and_has_every_token(name, tokenizer):
    result = mapped(TEXTS[name], tokenizer)
    page, reader = render_html(result), Reader()
    reader.feed(page)
    assert not reader.open and "http" not in page and "<script" not in page
    assert len(reader.tips) >= len(result.tokens)
    shown = reader.text.replace("↵", "").replace("·", "")
    expected = visible(TEXTS[name]).replace("\n", "").replace("·", "")
    assert shown == expected


def png_size(content: bytes) -> tuple[int, int]:
    """Width and height, after checking every chunk."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        body = content[at + 4 : at + 8 + size]
        assert zlib.crc32(body) == struct.unpack(">I", content[at + 8 + size : at + 12 + size])[0]
        kinds.append(kind)
        at += 12 + size
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND"
    return struct.unpack(">II", content[16:24])


def test_png_of_awkward_texts(tokenizer, recwarn):
    picture = pytest.importorskip("varidepth.analysis.depth_picture")
    pytest.importorskip("matplotlib")
    result = mapped("\n".join(TEXTS.values()), tokenizer)
    width, height = png_size(picture.render_png(result))
    assert width > 800 and height > 400
    assert not [one for one in recwarn if "lyph" in str(one.message)]
    cut = png_size(picture.render_png(mapped("word \n" * 400, tokenizer), max_lines=5))
    assert cut[1] < height


def test_png_without_matplotlib_says_what_to_install(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install varidepth\[plot\]"):
        write_depth_map(mapped("text", tokenizer), tmp_path / "map.png")
    assert os.listdir(tmp_path) == []


def test_files_are_whole_or_absent(tokenizer, tmp_path, monkeypatch):
    result = mapped("text", tokenizer)
    path = write_depth_map(result, tmp_path / "map.html")
    assert path.read_text(encoding="utf-8") == render_html(result)
    with pytest.raises(ValueError, match="ending in .html or .png"):
        write_depth_map(result, tmp_path / "map.gif")
    with pytest.raises(ValueError, match="does not exist; make it first"):
        write_depth_map(result, tmp_path / "nowhere" / "map.html")

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_depth_map(result, tmp_path / "other.html")
    assert os.listdir(tmp_path) == ["map.html"]


def test_lines_break_at_spaces_and_keep_every_token(tokenizer):
    (line,) = lines_of(mapped(TEXTS["prose"], tokenizer).tokens)
    rows = wrapped(line, 12)
    assert [token for row in rows for token in row] == line
    assert all(sum(cell_width(token.text) for token in row) <= 12 for row in rows)
    assert all(row[0].text.startswith(" ") for row in rows[1:])


def test_right_to_left_rows_are_laid_out_in_reading_order():
    words = ["שלום", " ", "one", " two", " ", "עולם"]
    row = [MappedToken(word, 1) for word in words]
    assert [token.text for token in visual_order(row)] == ["עולם", " ", "one", " two", " ", "שלום"]
    latin = ["a ", "שלום", " ", "עולם", " b"]
    order = [token.text for token in visual_order([MappedToken(word, 1) for word in latin])]
    assert order == ["a ", "עולם", " ", "שלום", " b"]


@pytest.mark.parametrize("most", [1, 3, 60])
def test_text_is_readable_on_every_depth(most):
    def luminance(colour):
        linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    values = []
    for depth in range(most + 1):
        background = depth_colour(depth, most)
        light, dark = sorted((luminance(background), luminance(ink_colour(background))), reverse=True)
        # WCAG AA for text
        assert (light + 0.05) / (dark + 0.05) >= 4.5
        values.append(luminance(background))
    assert values == sorted(values, reverse=True)
