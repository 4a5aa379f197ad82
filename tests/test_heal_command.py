"""`varidepth heal` and the run behind it: complete checkpoints, exact resume, what the user is told."""

import json

import pytest
import torch
from real_text import save_source, text_blocks, text_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TrainerCallback

from varidepth.cli.main import main
from varidepth.conversion.convert import convert
from varidepth.training.healing_run import HealingSettings, draw_rows, heal
from varidepth.training.text_blocks import load_documents


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A source, its conversion and a text."""
    folder = tmp_path_factory.mktemp("heal")
    save_source(folder / "source")
    convert(folder / "source", folder / "mor", num_recursions=2, quiet=True)
    (folder / "text.txt").write_text("\n\n".join(load_documents()[:6]), encoding="utf-8")
    return folder


SHORT = ["--seq-len", "48", "--batch-size", "4", "--fit-tokens", "2048"]


def kl_from_source(folder, source, ids):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        p, q = (torch.log_softmax(m(ids).logits, -1) for m in (source, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_heals_and_writes_a_complete_checkpoint(folders, tmp_path, capsys):
    output = tmp_path / "healed"
    command = ["heal", str(folders / "mor"), str(folders / "text.txt"), "--source", str(folders / "source")]
    assert main([*command, "-o", str(output), "--tokens", "3840", *SHORT, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens"] == 3840 and figures["steps"] == 20
    assert figures["log"][-1]["kl"] < figures["log"][0]["kl"]
    assert [layer["layer"] for layer in figures["fitted"]] == [1, 2]
    assert 0 < figures["calibration"]["compute"] < 1

    source = LlamaForCausalLM.from_pretrained(folders / "source").eval()
    ids = text_blocks().blocks[-8:]
    assert kl_from_source(output, source, ids) < 0.8 * kl_from_source(folders / "mor", source, ids)
    assert {path.name for path in (folders / "mor").iterdir()} <= {path.name for path in output.iterdir()}
    card = (output / "README.md").read_text()
    assert "## Healing" in card and "3840 tokens in 20 steps" in card and "has been measured.**" not in card
    assert card.index("## Healing") < card.index("## References")
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=4).shape[1] > 1
    assert not list(tmp_path.glob(".healed*"))


def test_says_in_short_what_it_did(folders, tmp_path, capsys):
    command = ["heal", str(folders / "mor"), str(folders / "text.txt"), "--source", str(folders / "source")]
    settings = ["--start", "as_converted", "--minutes", "0.01", "--quiet"]
    assert main([*command, "-o", str(tmp_path / "healed"), *settings, *SHORT]) == 0
    said = capsys.readouterr().out
    assert "fitted" not in said and "trained" in said and "compute" in said


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def test_resumes_to_the_last_bit(folders, tmp_path):
    """Stopped in the midst of the routing's beginning, with half of the rows drawn."""
    text = load_documents()[:6]
    settings = HealingSettings(
        tokens=48 * 4 * 12, seq_len=48, batch_size=4, fit_tokens=1024, save_steps=7, vocabulary_rows=0.5
    )
    source = LlamaForCausalLM.from_pretrained(folders / "source").eval()

    def run(folder, **kwargs):
        model = AutoModelForCausalLM.from_pretrained(folders / "mor")
        healed = heal(model, source, text, text_tokenizer(), settings, folder, show=False, **kwargs)
        return model, healed

    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "parts", callbacks=[StopAt(7)])
    again, healed = run(tmp_path / "parts", resume=True)
    assert healed.steps == 12 and not healed.fitted
    for (name, expected), found in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert whole.config.router_thresholds == again.config.router_thresholds
    # a checkpoint of the training loads by itself
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "checkpoint-7").config.num_recursions == 2


def test_rows_are_drawn_alike_each_time():
    ids = torch.arange(400).view(8, 50)
    settings = HealingSettings(tokens=1, vocabulary_rows=0.5)
    drawn = draw_rows(ids, 1000, settings)
    assert torch.equal(drawn, draw_rows(ids, 1000, settings))
    changed = (drawn != ids).any(dim=1)
    assert 0 < changed.sum() < 8 and drawn[changed].max() < 1000
    assert torch.equal(draw_rows(ids, 1000, HealingSettings(tokens=1, vocabulary_rows=0)), ids)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tokens", "0"], "`tokens` is 0, but must be at least 1"),
        (["--minutes", "nan"], "`minutes` is nan, but must be a finite number above 0"),
        (["--tokens", "9", "--vocabulary-rows", "1"], "must be a share below 1"),
        (["--tokens", "9", "--learning-rate", "-1"], "`learning_rate` is -1.0"),
        ([], "One of the arguments --minutes --tokens is required"),
    ],
)
def test_bad_settings_are_one_sentence(flags, said, folders, tmp_path, capsys):
    command = ["heal", str(folders / "mor"), str(folders / "text.txt"), "--source", str(folders / "source")]
    try:
        status = main([*command, "-o", str(tmp_path / "healed"), *flags])
    except SystemExit as error:
        status = error.code
    assert status == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_missing_text_leaves_nothing_behind(folders, tmp_path, capsys):
    command = ["heal", str(folders / "mor"), str(tmp_path / "no.txt"), "--source", str(folders / "source")]
    assert main([*command, "-o", str(tmp_path / "healed"), "--tokens", "9"]) == 2
    assert "no.txt" in capsys.readouterr().err and not list(tmp_path.iterdir())
