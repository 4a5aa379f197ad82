"""Held-out loss against a loop over tokens, and the commands that run a checkpoint."""

import json
import math
import shutil

import pytest
import torch
from generation_reference import SIZES
from prefix_reader import PrefixReader, tiny_jrt, token_nats
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from varidepth import MoDConfig, MoDForCausalLM, MoRConfig, MoRForCausalLM
from varidepth.analysis.perplexity import held_out_loss, routing_gap
from varidepth.cli.main import main


WORDS = "the cat sat on a mat and dog did not see it in time for tea".split()
SPANS = ((0, 23), (5, 9), (3, 1))
DOCUMENTS = [" ".join(WORDS[i % 15] for i in range(start, start + length)) for start, length in SPANS]


def make_tokenizer(**special) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", **special)


def make_model(kind: str):
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(WORDS) + 3}
    if kind == "vanilla":
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
    if kind == "mod":
        model = MoDForCausalLM(MoDConfig(num_hidden_layers=4, capacity=0.5, gate="sigmoid", **sizes))
        torch.nn.init.normal_(model.model.routers.weight)
        return model
    routing = {"capacities": [0.8, 0.5]} if kind == "mor" else {"routing": kind}
    return MoRForCausalLM(MoRConfig(num_hidden_layers=4, **sizes, **routing))


@torch.no_grad()
def slow_loss(model, tokenizer, documents, window, start) -> tuple[float, int]:
    """Every token from the tokens before it in its window, one forward pass each."""
    nats, count = 0.0, 0
    for text in documents:
        tokens = [*start, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for place in range(1, len(tokens)):
            first = (place - 1) // (window - 1) * (window - 1)
            logits = model(torch.tensor([tokens[first:place]])).logits[0, -1]
            nats -= float(logits.log_softmax(-1)[tokens[place]])
            count += 1
    return nats, count


@pytest.mark.parametrize("kind", ["vanilla", "mor", "token_choice", "none", "mod"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_loss_equals_a_loop_over_tokens(kind, batch_size):
    model, tokenizer = make_model(kind), make_tokenizer(bos_token="<s>", pad_token="<pad>")
    model.train()
    loss = held_out_loss(model, tokenizer, DOCUMENTS, window=7, batch_size=batch_size)
    assert model.training
    model.eval()
    nats, count = slow_loss(model, tokenizer, DOCUMENTS, 7, [tokenizer.bos_token_id])
    assert (loss.tokens, loss.documents) == (count, 3) == (33, 3)
    assert loss.nats == pytest.approx(nats, rel=1e-5)
    assert loss.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert loss.nats_per_token == pytest.approx(nats / 33, rel=1e-5)
    assert loss.nats_per_byte == loss.nats / loss.bytes
    assert loss.perplexity == math.exp(loss.nats_per_token)


def test_eos_starts_a_document_without_bos_and_nothing_without_either():
    model = make_model("vanilla").eval()
    with_eos = held_out_loss(model, make_tokenizer(eos_token="<s>"), DOCUMENTS, window=64)
    with_bos = held_out_loss(model, make_tokenizer(bos_token="<s>"), DOCUMENTS, window=64)
    assert with_eos == with_bos
    bare = held_out_loss(model, make_tokenizer(), DOCUMENTS, window=64)
    # nothing predicts the first word of a document, and one of the documents has no other
    assert (bare.tokens, bare.documents) == (30, 2)
    assert bare.bytes == sum(len(text) - len(text.split()[0]) for text in DOCUMENTS[:2])


def test_reading_stops_at_the_limit():
    model, tokenizer = make_model("vanilla").eval(), make_tokenizer(bos_token="<s>")
    loss = held_out_loss(model, tokenizer, DOCUMENTS, window=7, batch_size=1, max_tokens=8)
    assert (loss.tokens, loss.documents) == (12, 1)
    assert loss.bytes == round(len(DOCUMENTS[0]) * 12 / 23)


@pytest.mark.parametrize("prefix_length", [0, 1, 3, 5])
def test_a_prefix_is_read_and_not_scored(prefix_length):
    tokenizer = make_tokenizer(bos_token="<s>")
    reader, causal = PrefixReader(len(WORDS) + 3, 64), PrefixReader(len(WORDS) + 3, 0)
    loss = held_out_loss(reader, tokenizer, DOCUMENTS, window=7, batch_size=3, prefix_length=prefix_length)
    first, nats, count, size = max(prefix_length, 1), 0.0, 0, 0.0
    for text in DOCUMENTS:
        tokens = [1, *tokenizer(text)["input_ids"]]
        windows = [tokens[start : start + 7] for start in range(0, len(tokens) - 1, 6)]
        nats += sum(reader.nats(window, first) for window in windows)
        scored = sum(max(len(window) - first, 0) for window in windows)
        count, size = count + scored, size + len(text) * scored / (len(tokens) - 1)
    assert (loss.tokens, loss.bytes) == (count, round(size))
    assert loss.nats == pytest.approx(nats, rel=1e-5)
    assert {length for lengths in reader.seen_prefixes for length in lengths} == {prefix_length}
    # a causal model is scored on the same tokens
    assert held_out_loss(causal, tokenizer, DOCUMENTS, window=7, batch_size=3, prefix_length=prefix_length) == loss


@pytest.mark.parametrize("prefix_length", [0, 1, 4])
def test_a_jrt_rnn_is_scored_without_having_seen_the_targets(prefix_length):
    model, tokenizer = tiny_jrt(len(WORDS) + 3, prefix_length=64), make_tokenizer(bos_token="<s>")
    loss = held_out_loss(model, tokenizer, DOCUMENTS, window=7, batch_size=4, prefix_length=prefix_length)
    rows = [[1, *tokenizer(text)["input_ids"]] for text in DOCUMENTS]
    windows = [row[start : start + 7] for row in rows for start in range(0, len(row) - 1, 6)]
    first = max(prefix_length, 1)
    assert loss.tokens == sum(max(len(window) - first, 0) for window in windows)
    expected = sum(token_nats(model, window, first, prefix_length) for window in windows)
    assert loss.nats == pytest.approx(expected, rel=1e-5)


def test_a_model_that_reads_a_prefix_must_be_told_it():
    reader, tokenizer = PrefixReader(len(WORDS) + 3, 64), make_tokenizer(bos_token="<s>")
    with pytest.raises(ValueError, match="No `prefix_length` .* up to 64 tokens .* give the `prefix_length`"):
        held_out_loss(reader, tokenizer, DOCUMENTS)
    with pytest.raises(ValueError, match="`prefix_length` is -1, but must be at least 0"):
        held_out_loss(reader, tokenizer, DOCUMENTS, prefix_length=-1)
    for window, prefix_length in ((7, 7), (64, 24)):
        with pytest.raises(ValueError, match=f"no token behind a prefix of {prefix_length} tokens"):
            held_out_loss(reader, tokenizer, DOCUMENTS, window=window, prefix_length=prefix_length)
    assert held_out_loss(reader, tokenizer, DOCUMENTS, window=64, prefix_length=23).tokens == 1


@pytest.mark.parametrize("documents", ["", [], " \n\t", ["", "  "]])
def test_empty_text_is_refused(documents):
    with pytest.raises(ValueError, match="The text is empty .* give a text with some words"):
        held_out_loss(make_model("vanilla"), make_tokenizer(bos_token="<s>"), documents)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"window": 1}, "at least 2 tokens"), ({"batch_size": 0}, "at least 1"), ({"max_tokens": 0}, "at least 1")],
)
def test_sizes_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        held_out_loss(make_model("vanilla"), make_tokenizer(bos_token="<s>"), DOCUMENTS, **arguments)


@pytest.mark.parametrize("kind", ["mor", "mod"])
def test_the_gap_is_that_of_two_losses_on_the_same_windows(kind):
    model, tokenizer = make_model(kind).eval(), make_tokenizer(bos_token="<s>")
    gap = routing_gap(model, tokenizer, iter(DOCUMENTS), window=7)
    assert gap.causal == held_out_loss(model, tokenizer, DOCUMENTS, window=7)
    assert model.config.inference_rule == "threshold"
    model.config.inference_rule = "topk"
    assert gap.topk == held_out_loss(model, tokenizer, DOCUMENTS, window=7) != gap.causal
    assert gap.nats_per_token == gap.topk.nats_per_token - gap.causal.nats_per_token
    with pytest.raises(ValueError, match="between top-k and a causal rule"):
        routing_gap(model, tokenizer, DOCUMENTS)
    with pytest.raises(ValueError, match="'routing': None"):
        routing_gap(make_model("vanilla"), tokenizer, DOCUMENTS)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A MoD whose curve goes from nobody in the routed layers to everyone."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-mod"
    model = make_model("mod")
    model.config.compute_curve = [
        {"compute": 0.5, "thresholds": [1.0, 1.0]},
        {"compute": 1.0, "thresholds": [0.0, 0.0]},
    ]
    model.save_pretrained(folder)
    make_tokenizer(bos_token="<s>", pad_token="<pad>").save_pretrained(folder)
    return folder


def test_the_operating_point_of_a_calibrated_model(calibrated, checkpoint, tmp_path, capsys):
    text, vanilla = tmp_path / "text.txt", tmp_path / "vanilla"
    text.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    losses, maps = {}, {}
    for compute in (None, 0.5, 1.0):
        point = [] if compute is None else ["--compute", str(compute)]
        assert main(["perplexity", str(calibrated), str(text), "--json", *point]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["compute"] == compute
        losses[compute] = figures["nats_per_token"]
        assert main(["depth-map", str(calibrated), "the cat sat on a mat", *point]) == 0
        maps[compute] = capsys.readouterr().out
    assert len(set(losses.values())) == 3
    assert "mean depth 0.00 of 2" in maps[0.5] and "mean depth 2.00 of 2" in maps[1.0]
    assert main(["perplexity", str(calibrated), str(text), "--compute", "1"]) == 0
    assert "compute     1 of all tokens in all layers" in capsys.readouterr().out

    make_model("vanilla").save_pretrained(vanilla)
    make_tokenizer(bos_token="<s>").save_pretrained(vanilla)
    for folder, compute, message in (
        (calibrated, "0.3", "goes from 0.5 to 1"),
        (checkpoint, "0.8", "no calibrated `compute_curve`; run `varidepth calibrate`"),
        (vanilla, "0.8", "a 'llama' model, whose tokens all run every layer; leave it out"),
    ):
        for arguments in (["perplexity", str(folder), str(text)], ["depth-map", str(folder), "the cat"]):
            assert main([*arguments, "--compute", compute]) == 2
            said = capsys.readouterr().err
            assert said.startswith("varidepth: ") and said.count("\n") == 1 and message in said, said


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-mor"
    make_model("mor").save_pretrained(folder)
    make_tokenizer(bos_token="<s>", pad_token="<pad>").save_pretrained(folder)
    return folder


def test_perplexity_command(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    assert main(["perplexity", str(checkpoint), str(text), "--json", "--window", "16"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens"] == 33 and figures["perplexity"] == pytest.approx(math.exp(figures["nats_per_token"]))
    assert figures["inference_rule"] == "threshold"
    assert main(["perplexity", str(checkpoint), str(text)]) == 0
    assert "33 tokens" in capsys.readouterr().out
    behind = ["--window", "7", "--prefix-length", "4"]
    assert main(["perplexity", str(checkpoint), str(text), "--json", *behind]) == 0
    figures = json.loads(capsys.readouterr().out)
    # load_documents joins the three texts: 33 words behind a start token, in five windows of 7 and one of 4
    assert (figures["prefix_length"], figures["tokens"]) == (4, 15)
    assert main(["perplexity", str(checkpoint), str(text), *behind]) == 0
    assert "prefix      the first 4 tokens of each window" in capsys.readouterr().out


def test_perplexity_command_on_a_jrt_rnn(tmp_path, capsys):
    folder, text = tmp_path / "tiny-jrt", tmp_path / "text.txt"
    tiny_jrt(len(WORDS) + 3, prefix_length=64).save_pretrained(folder)
    make_tokenizer(bos_token="<s>", pad_token="<pad>").save_pretrained(folder)
    text.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    assert main(["perplexity", str(folder), str(text)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("varidepth: No `prefix_length`") and said.count("\n") == 1
    assert main(["perplexity", str(folder), str(text), "--json", "--prefix-length", "30"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["prefix_length"], figures["tokens"], figures["inference_rule"]) == (30, 4, None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda w: w.pop("model.layers.1.self_attn.q_proj.weight"),
            "lacks the weight model.layers.1.self_attn.q_proj",
        ),
        (
            lambda w: w.update({"model.layers.9.x": w["model.norm.weight"].clone()}),
            "holds the weight model.layers.9.x, which",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(3)}),
            "has in another size the weight model.norm.weight, which",
        ),
    ],
)
def test_weights_of_another_model_are_refused(spoil, message, checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "spoilt")
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text(DOCUMENTS[0], encoding="utf-8")
    for arguments in (["perplexity", str(folder), str(text)], ["depth-map", str(folder), "the cat"]):
        assert main(arguments) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("varidepth: The checkpoint spoilt ") and message in said


def test_depth_map_command(checkpoint, tmp_path, capsys):
    page = tmp_path / "map.html"
    assert main(["depth-map", str(checkpoint), "the", "cat sat"]) == 0
    assert "mean depth" in capsys.readouterr().out
    assert main(["depth-map", str(checkpoint), "the cat sat", "-o", str(page), "--title", "A <title>"]) == 0
    assert "A &lt;title&gt;" in page.read_text(encoding="utf-8")
    assert f"wrote {page}" in capsys.readouterr().err


def test_commands_refuse_bad_input_in_one_sentence(checkpoint, tmp_path, capsys):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    vanilla = tmp_path / "vanilla"
    make_model("vanilla").save_pretrained(vanilla)
    model = str(checkpoint)
    make_tokenizer(bos_token="<s>").save_pretrained(vanilla)
    recursive = tmp_path / "recursive"
    make_model("none").save_pretrained(recursive)
    make_tokenizer(bos_token="<s>").save_pretrained(recursive)
    cases = [
        (["depth-map", str(recursive), "text"], "A 'mor' model with routing='none' gives every token the same depth"),
        (["perplexity", model, str(tmp_path / "none.txt")], "does not exist; give a text file"),
        (["perplexity", model, str(empty)], "give a text file"),
        (["perplexity", model, str(binary)], "not UTF-8"),
        (["perplexity", str(tmp_path / "nowhere" / "at" / "all"), str(binary)], ""),
        (["depth-map", model], "either as arguments or with --file"),
        (["depth-map", model, " "], "The text is empty"),
        (["depth-map", model, "--file", str(binary)], "not UTF-8"),
        (["depth-map", model, "--file", str(tmp_path / "none.txt")], "cannot be read"),
        (["depth-map", model, "text", "-o", str(tmp_path / "map.pdf")], "ending in .html or .png"),
        (["depth-map", str(vanilla), "text"], "gives every token the same depth"),
        (["depth-map", str(tmp_path / "nowhere"), "text"], ""),
    ]
    capsys.readouterr()
    for arguments, message in cases:
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert said.startswith("varidepth: ") and said.count("\n") == 1 and message in said, said
    assert not (tmp_path / "map.pdf").exists()
