"""Streaming text: rows hold every token once, documents stay apart, and every state goes on with the next token."""

import itertools
import json
import tracemalloc

import datasets
import huggingface_hub
import pyarrow
import pytest
import torch
from pyarrow import parquet
from real_text import VOCABULARY, text_tokenizer
from tiny_jrt import SIZES as JRT_SIZES
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from varidepth import JRTConfig, JRTForCausalLM, MoRConfig, MoRForCausalLM
from varidepth.training import text_source
from varidepth.training.jrt_collator import JRTCollator
from varidepth.training.text_blocks import load_documents
from varidepth.training.text_source import open_source
from varidepth.training.text_stream import StreamCallback, TextStream


EOS = text_tokenizer().eos_token_id
DOCUMENTS = [text[: 300 + 211 * (i % 7)] for i, text in enumerate(load_documents()[:40])]


def make(source, seq_len=32, **options) -> TextStream:
    return TextStream(source, text_tokenizer(), seq_len, **options)


def ids_of(rows) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in rows]


def tokens_of(documents) -> list[list[int]]:
    return [ids + [EOS] for ids in text_tokenizer()(list(documents), add_special_tokens=False)["input_ids"]]


def write_jsonl(path, documents, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in documents))


def write_parquet(folder, documents, files=6):
    folder.mkdir()
    for i in range(files):
        rows = {"body": documents[i::files], "number": list(range(len(documents[i::files])))}
        parquet.write_table(pyarrow.table(rows), folder / f"{i}.parquet")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same kind of text in every form, with the options that it needs."""
    tmp_path = tmp_path_factory.mktemp("text")
    write_jsonl(tmp_path / "rows.jsonl", DOCUMENTS)
    write_parquet(tmp_path / "parquet", DOCUMENTS)
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(DOCUMENTS[:9]):
        (tmp_path / "folder" / f"{i}.txt").write_text(text)
    (tmp_path / "book.txt").write_text("\n\n".join(DOCUMENTS))
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", DOCUMENTS[:20])
    write_jsonl(tmp_path / "hub" / "other.jsonl", DOCUMENTS[20:])
    (tmp_path / "hub" / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        "  - split: held_out\n    path: other.jsonl\n---\n"
    )
    return {
        "list": (DOCUMENTS, {}),
        "jsonl": (tmp_path / "rows.jsonl", {}),
        "parquet": (tmp_path / "parquet", {"column": "body"}),
        "parquet file": (str(tmp_path / "parquet" / "1.parquet"), {"column": "body"}),
        "folder": (str(tmp_path / "folder"), {}),
        "book": (tmp_path / "book.txt", {}),
        "books": ([tmp_path / "book.txt", tmp_path / "rows.jsonl", tmp_path / "folder" / "1.txt"], {}),
        "hub": (tmp_path / "hub", {"config": "small"}),
        "dataset": (datasets.Dataset.from_dict({"text": DOCUMENTS}), {}),
    }


FORMS = ["list", "jsonl", "parquet", "parquet file", "folder", "book", "books", "hub", "dataset"]


@pytest.mark.parametrize(
    ("form", "packing"),
    [*((form, "documents") for form in FORMS), ("jsonl", "joined"), ("book", "separate"), ("parquet", "separate")],
)
def test_every_state_goes_on_with_the_next_token(sources, form, packing):
    source, options = sources[form]
    options = options | {"packing": packing, "shuffle_buffer": 16, "seed": 3}
    whole = list(itertools.islice(make(source, **options), 180))
    assert len(whole) == 180
    for used in (0, 15, 17, 141):
        stream = make(source, **options)
        iterator = iter(stream)
        list(itertools.islice(iterator, used + 5))  # a loader is ahead of training
        state = json.loads(json.dumps(stream.state_dict(used)))
        other = make(source, **options)
        other.load_state_dict(state)
        assert other.state_dict() == state
        rest = list(itertools.islice(other, 180 - used))
        assert ids_of(rest) == ids_of(whole[used:])
        assert other.state_dict()["rows"] == 180


def test_packed_rows_hold_every_token_once_and_keep_documents_apart():
    stream = make(DOCUMENTS, epochs=1)
    rows = list(stream)
    joined = [token for ids in tokens_of(DOCUMENTS) for token in ids]
    flat = [token for ids in ids_of(rows) for token in ids]
    assert flat == joined[: len(flat)] and len(joined) - len(flat) < 32
    follows_end = [True] + [token == EOS for token in flat[:-1]]
    for row, begins in zip(rows, zip(*[iter(follows_end)] * 32, strict=True), strict=True):
        positions = row["position_ids"].tolist()
        expected, place = [], 0
        for index, begin in enumerate(begins):
            place = 0 if begin or index == 0 else place + 1
            expected.append(place)
        assert positions == expected
        first = [index for index, begin in enumerate(begins) if begin and index]
        assert [i for i, label in enumerate(row["labels"].tolist()) if label == -100] == first


def test_other_packings():
    joined = list(make(DOCUMENTS, packing="joined", epochs=1))
    assert all(set(row) == {"input_ids", "labels"} and len(row["input_ids"]) == 32 for row in joined)
    assert all(torch.equal(row["input_ids"], row["labels"]) for row in joined)
    apart = ids_of(make(DOCUMENTS, packing="separate", epochs=1))
    expected = [ids[i : i + 32] for ids in tokens_of(DOCUMENTS) for i in range(0, len(ids), 32)]
    assert apart == [ids for ids in expected if len(ids) > 1]


def test_shuffling_moves_rows_within_a_buffer_and_differs_by_epoch_and_seed(tmp_path):
    plain = ids_of(make(DOCUMENTS, epochs=1, packing="joined"))
    write_jsonl(tmp_path / "rows.jsonl", DOCUMENTS)  # one file, whose order stays
    options = {"epochs": 2, "packing": "joined", "shuffle_buffer": 16}
    both = ids_of(make(tmp_path / "rows.jsonl", seed=1, **options))
    first, second = both[: len(plain)], both[len(plain) :]
    assert first != plain and sorted(first) == sorted(plain)
    for start in range(0, len(plain) - 16, 16):
        assert sorted(first[start : start + 16]) == sorted(plain[start : start + 16])
    assert second[:16] != first[:16]
    assert both == ids_of(make(tmp_path / "rows.jsonl", seed=1, **options))
    assert both != ids_of(make(tmp_path / "rows.jsonl", seed=2, **options))


def test_files_and_shards_change_places_in_each_epoch(sources):
    for form in ("folder", "parquet"):
        source, options = sources[form]
        options = options | {"packing": "separate", "seq_len": 4000, "shuffle_buffer": 1}
        count = len(ids_of(make(source, epochs=1, **options)))
        rows = ids_of(make(source, epochs=2, **options))
        assert sorted(rows[:count]) == sorted(rows[count:]) and rows[:count] != rows[count:]


def test_files_are_read_by_turns_in_proportion_to_their_size(tmp_path):
    sizes = {"a": 400_000, "b": 200_000, "c": 100_000}
    for name, size in sizes.items():
        line = f"{name} " * 30 + "\n\n"
        (tmp_path / f"{name}.txt").write_text(line * (size // len(line)))
    for i in range(8):
        write_jsonl(tmp_path / f"small-{i}.jsonl", [f"d{i} " * 200])
    source = open_source(tmp_path, seed=1)
    kinds, small = [], []
    for piece in source.pieces():
        (small if piece.text.startswith("d") else kinds).append(piece.text.split()[0])
        place = len(kinds)
        if piece.text.startswith("d"):
            small[-1] = place
    length = len(kinds)
    for part in (kinds[: length // 2], kinds[length // 2 :]):
        assert [part.count(name) / len(part) for name in "abc"] == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.1)
    # small files stand anywhere
    assert len(small) == 8 and min(small) < length / 3 and max(small) > length * 2 / 3
    # without shuffling one is read after the other
    source = open_source(tmp_path)
    kinds = [piece.text.split()[0] for piece in source.pieces()]
    assert kinds == sorted(kinds)


def test_turns_go_on_behind_any_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(text_source, "_TURN", 400)
    for name, count in (("a", 30), ("b", 12), ("c", 5)):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{i} " * 40 for i in range(count)])
    whole = list(open_source(tmp_path, seed=4).pieces())
    names = [piece.text[0] for piece in whole]
    assert len(set(whole)) == len(whole) == 47 and sum(a != b for a, b in itertools.pairwise(names)) > 10
    for count in range(len(whole)):
        source, other = open_source(tmp_path, seed=4), open_source(tmp_path, seed=4)
        taken = list(itertools.islice(source.pieces(), count))
        other.begin(0, json.loads(json.dumps(source.state_dict())))
        assert taken + list(other.pieces()) == whole


def test_config_and_split_of_a_dataset(sources, monkeypatch):
    folder = sources["hub"][0]
    monkeypatch.chdir(folder.parent)
    rows = ids_of(make("hub", config="small", split="held_out", packing="separate", seq_len=4000, epochs=1))
    assert rows == tokens_of(DOCUMENTS[20:])


def test_a_long_text_is_one_document_read_in_pieces(tmp_path):
    text = "\n\n".join(DOCUMENTS) + "é" * 40_000
    (tmp_path / "book.txt").write_text(text)
    (row,) = ids_of(make(tmp_path / "book.txt", 10**6, packing="separate", epochs=1))
    assert row.count(EOS) == 1 and text_tokenizer().decode(row[:-1]) == text
    positions = [row["position_ids"][0].item() for row in make(tmp_path / "book.txt", epochs=1)]
    assert set(positions) == {0}


def test_memory_does_not_grow_with_the_text(tmp_path):
    def peak(copies: int) -> int:
        write_jsonl(tmp_path / "rows.jsonl", DOCUMENTS * copies)
        stream = make(tmp_path / "rows.jsonl", 128, epochs=1)
        tracemalloc.start()
        count = sum(1 for _ in stream)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count > 50 * copies
        return highest

    assert peak(10) < 1.3 * peak(2)


def test_other_rows_are_mixed_in_by_their_number():
    given = torch.arange(32).repeat(3, 1) + torch.tensor([[0], [1], [2]])

    def mixed(share=0.5, **options):
        stream = make(DOCUMENTS[:12], epochs=2, shuffle_buffer=8, seed=2, **options)
        stream.mix_in(given, share)
        return stream

    plain, rows = list(make(DOCUMENTS[:12], epochs=2, shuffle_buffer=8, seed=2)), list(mixed())
    new = [any(torch.equal(row["input_ids"], g) for g in given) for row in rows]
    assert 0.3 < sum(new) / len(new) < 0.7 and len(plain) == len(rows)
    # each epoch leaves out others, so that a text which is read again shows all of itself
    assert new[: len(new) // 2] != new[len(new) // 2 : 2 * (len(new) // 2)]
    for row, old, exchanged in zip(rows, plain, new, strict=True):
        if exchanged:
            assert torch.equal(row["labels"], row["input_ids"]) and row["input_ids"].dtype == torch.long
            assert torch.equal(row["position_ids"], torch.arange(32))
        else:
            assert all(torch.equal(value, old[name]) for name, value in row.items())
    resumed, first = mixed(), mixed()
    list(itertools.islice(first, 11))
    resumed.load_state_dict(first.state_dict(11))
    assert ids_of(resumed) == ids_of(rows)[11:]
    assert ids_of(mixed(share=0.0)) == ids_of(plain)


def test_workers_are_refused_and_batches_collated():
    stream = make(DOCUMENTS)
    with pytest.raises(ValueError, match="dataloader_num_workers"):
        next(iter(DataLoader(stream, num_workers=1, collate_fn=stream.collate)))
    batch = next(iter(DataLoader(stream, batch_size=3, collate_fn=stream.collate)))
    assert set(batch) == {"input_ids", "labels", "position_ids"} and batch["input_ids"].shape == (3, 32)
    apart = make(["one two three", "four"], packing="separate", epochs=1)
    batch = apart.collate(list(apart))
    assert batch["attention_mask"].sum(1).tolist() == [len(ids) for ids in tokens_of(["one two three", "four"])]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: make(p / "nowhere.txt"), "no file or folder"),
        (lambda p: make("no/such-dataset"), "cannot load it"),
        (lambda p: make(p / "rows.jsonl", column="body"), "Line 1 of .* under the key 'body'"),
        (lambda p: make(p / "bad.jsonl"), "Line 3 of"),
        (lambda p: make(p / "table", column="text"), r"no column 'text', only \['body', 'number'\]"),
        (lambda p: make(p / "table", column="number"), "holds a int"),
        (lambda p: make(p / "empty.txt"), "no token"),
        (lambda p: make([]), "no token"),
        (lambda p: make(p / "nothing"), "holds no text"),
        (lambda p: make(p / "binary.txt"), "not UTF-8"),
        (lambda p: make(["short"], 100, epochs=1), "less than one row of 100"),
        (lambda p: make(7), "is a int"),
        (lambda p: make(["text"], packing="tight"), "`packing` is 'tight'"),
        (lambda p: make(["text"], 1), "seq_len=1"),
        (lambda p: make(["text"], epochs=0), "epochs=0"),
        (lambda p: make(["text"], shuffle_buffer=-1), "shuffle_buffer=-1"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, monkeypatch, call, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write_jsonl(tmp_path / "rows.jsonl", DOCUMENTS[:3])
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n\n{"text": 7}\n')
    write_parquet(tmp_path / "table", DOCUMENTS[:8])
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=message) as caught:
        next(iter(call(tmp_path)))
    assert "\n" not in str(caught.value)


class Halt(TrainerCallback):
    """Ends a run as a lost machine would, behind a checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Losses(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.seen.append((state.global_step, logs["loss"]))


def trainer_for(folder, architecture: str, *, attached=True, halt=None):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY + 1, "hidden_size": 32, "intermediate_size": 48}
    if architecture == "jrt":
        fields = JRT_SIZES | sizes | {"mask_token_id": VOCABULARY, "prefix_length": 12}
        model = JRTForCausalLM(JRTConfig(**fields))
        collator = JRTCollator.from_model_config(model.config, seed=0)
    else:
        sizes |= {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = MoRForCausalLM(MoRConfig(**sizes, num_recursions=2))
        collator = None
    stream = make(DOCUMENTS, packing="joined" if architecture == "jrt" else "documents", shuffle_buffer=8, seed=5)
    losses = Losses()
    args = TrainingArguments(
        str(folder),
        max_steps=10,
        save_steps=4,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=stream,
        data_collator=collator or (None if attached else stream.collate),
        callbacks=[losses, *([Halt(halt)] if halt else [])],
    )
    if attached:
        StreamCallback(stream).attach(trainer)
    return trainer, losses


@pytest.mark.parametrize("architecture", ["mor", "jrt"])
def test_trainer_resumes_with_the_next_token(tmp_path, architecture):
    trainer, losses = trainer_for(tmp_path / "whole", architecture)
    trainer.train()
    # in a run that stops behind its checkpoint, and in another process from then on
    halted, _ = trainer_for(tmp_path / "halted", architecture, halt=5)
    halted.train()
    resumed, rest = trainer_for(tmp_path / "halted", architecture)
    texts = []
    resumed.train_dataset.collate = texts.append  # not called where the collator is another's
    if architecture == "mor":
        resumed.data_collator = lambda rows: texts.extend(rows) or TextStream.collate(resumed.train_dataset, rows)
    resumed.train(resume_from_checkpoint=True)
    assert [step for step, _ in rest.seen] == list(range(5, 11))
    assert rest.seen == losses.seen[4:]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    if architecture == "mor":
        # nothing is read again: 6 steps of 4 rows, and what the loader takes ahead
        assert len(texts) <= 28


def test_trainer_alone_reads_again_to_the_same_end(tmp_path):
    trainer, losses = trainer_for(tmp_path / "whole", "mor", attached=False)
    trainer.train()
    trainer_for(tmp_path / "halted", "mor", attached=False, halt=5)[0].train()
    resumed, rest = trainer_for(tmp_path / "halted", "mor", attached=False)
    resumed.train(resume_from_checkpoint=True)
    assert rest.seen == losses.seen[4:]
    unknown, _ = trainer_for(tmp_path / "halted", "mor")
    with pytest.raises(ValueError, match="made without a StreamCallback"):
        unknown.train(resume_from_checkpoint=True)


def test_documents_stay_apart_with_the_collator_that_trainer_makes(tmp_path):
    trainer, _ = trainer_for(tmp_path, "mor", attached=False)
    trainer.data_collator = DataCollatorWithPadding(text_tokenizer())
    StreamCallback(trainer.train_dataset).attach(trainer)
    batches = iter(trainer.get_train_dataloader())
    batch = next(batch for batch in batches if (batch["position_ids"][:, 1:] == 0).any())
    assert "attention_mask" not in batch and "position_ids" in batch
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        row, before = (batch["position_ids"][:, 1:] == 0).nonzero()[-1].tolist()
        start = before + 1
        changed = batch["input_ids"].clone()
        changed[row, :start] = 7
        other = model(input_ids=changed, position_ids=batch["position_ids"]).logits
    assert torch.allclose(logits[row, start:], other[row, start:], atol=1e-6)
