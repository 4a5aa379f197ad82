"""Text sources, the split by document, and blocks of tokens."""

import json

import pytest
import torch

from varidepth.training.text_blocks import load_documents, split_documents, token_blocks


class Characters:
    """A tokenizer whose tokens are code points."""

    eos_token_id = 0

    def __call__(self, texts, **kwargs):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


DOCUMENTS = [f"document {i} " * (i + 3) for i in range(40)]


def test_default_is_the_prose_that_python_carries():
    documents = load_documents()
    assert len(documents) > 50 and documents == load_documents()
    assert any("assert" in text for text in documents)


def test_sources(tmp_path):
    text = "\n\n".join(f"paragraph {i}. " * 40 for i in range(60))
    (tmp_path / "book.txt").write_text(text)
    cut = load_documents(tmp_path / "book.txt")
    assert len(cut) > 3 and "".join("".join(cut).split()) == "".join(text.split())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": d}) + "\n" for d in DOCUMENTS))
    assert load_documents(tmp_path / "rows.jsonl", text_column="body") == [d.strip() for d in DOCUMENTS]
    (tmp_path / "folder").mkdir()
    for i, document in enumerate(DOCUMENTS[:3]):
        (tmp_path / "folder" / f"{i}.txt").write_text(document)
    assert load_documents(tmp_path / "folder") == [d.strip() for d in DOCUMENTS[:3]]
    assert load_documents(DOCUMENTS) == [d.strip() for d in DOCUMENTS]


def test_lines_of_jsonl_end_at_newlines_only(tmp_path):
    texts = ["one\u2028still one", "two\x85 and\u2029", "three"]
    rows = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "rows.jsonl").write_bytes(rows.encode())
    assert load_documents(tmp_path / "rows.jsonl") == [text.strip() for text in texts]


def test_split_is_by_document_and_repeatable():
    train, rest = split_documents(DOCUMENTS, held_out=0.2, seed=3)
    assert not set(train) & set(rest) and sorted(train + rest) == sorted(DOCUMENTS)
    share = sum(map(len, rest)) / sum(map(len, DOCUMENTS))
    assert 0.15 < share < 0.3
    assert (train, rest) == split_documents(DOCUMENTS, held_out=0.2, seed=3)
    assert (train, rest) != split_documents(DOCUMENTS, held_out=0.2, seed=4)


def test_blocks_keep_the_stream():
    blocks = token_blocks(["abcde", "fgh"], Characters(), 5)
    assert blocks.blocks.tolist() == [[97, 98, 99, 100, 101], [0, 102, 103, 104, 0]]
    assert len(blocks) == 2 and blocks.num_tokens == 10
    item = blocks[1]
    assert torch.equal(item["input_ids"], item["labels"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: load_documents(p / "empty.txt"), "No text"),
        (lambda p: load_documents(p / "binary.txt"), "not UTF-8"),
        (lambda p: load_documents(p / "mixed"), r"1\.txt is not UTF-8"),
        (lambda p: load_documents(p / "number.jsonl"), r"Line 2 of .*number\.jsonl holds no text: .* a string under"),
        (lambda p: load_documents(p / "null.jsonl"), r"Line 1 of .*null\.jsonl holds no text"),
        (lambda p: load_documents(["text", 7]), "Document 2 of the list is of type int"),
        (lambda p: load_documents(p / "bad.jsonl"), "Line 2"),
        (lambda p: load_documents(p / "bad.jsonl", text_column="other"), "Line 1"),
        (lambda p: load_documents(str(p / "nowhere.txt")), "no file or folder"),
        (lambda p: split_documents(["one"]), "at least two"),
        (lambda p: split_documents(["one", "two"], held_out=1.5), "between 0 and 1"),
        (lambda p: token_blocks(["short"], Characters(), 100), "less than one block"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, make, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.txt").write_text(" \n\n ")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "0.txt").write_text("fine")
    (tmp_path / "mixed" / "1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "number.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n')
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"title": 1}\n')
    with pytest.raises(ValueError, match=message) as caught:
        make(tmp_path)
    assert "\n\n" not in str(caught.value)
