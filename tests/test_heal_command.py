"""`varidepth heal` and the run behind it: complete checkpoints, exact resume, what the user is told."""

import json
import time

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
    convert(folder / "source", folder / "mod", to="mod", capacity=0.5, routing_unit="attention", quiet=True)
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


def test_says_why_it_did_not_fit(folders, tmp_path, capsys):
    command = ["heal", str(folders / "mod"), str(folders / "text.txt"), "--source", str(folders / "source")]
    command += ["--tokens", "192", *SHORT]
    assert main([*command, "-o", str(tmp_path / "healed")]) == 0
    assert "not fitted  The model is a 'mod' without repeated layers" in capsys.readouterr().out
    assert main([*command, "-o", str(tmp_path / "other"), "--start", "fitted"]) == 2
    assert "heal without a fitted start" in capsys.readouterr().err and not (tmp_path / "other").exists()


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.mark.parametrize("kind", ["mor", "mod"])
@pytest.mark.parametrize("stop", [6, 7])
def test_resumes_to_the_last_bit(kind, stop, folders, tmp_path):
    """Stopped before or behind the step in which routers start, with half of the rows drawn."""
    text = load_documents()[:6]
    settings = HealingSettings(
        tokens=48 * 4 * 12, seq_len=48, batch_size=4, fit_tokens=1024, save_steps=stop, vocabulary_rows=0.5,
        routing_begin=0.5,
    )  # fmt: skip
    source = LlamaForCausalLM.from_pretrained(folders / "source").eval()

    def run(folder, **kwargs):
        model = AutoModelForCausalLM.from_pretrained(folders / kind)
        healed = heal(model, source, text, text_tokenizer(), settings, folder, show=False, **kwargs)
        return model, healed

    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "parts", callbacks=[StopAt(stop)])
    with pytest.raises(ValueError, match=f"checkpoint-{stop} of another run"):
        run(tmp_path / "parts")
    again, healed = run(tmp_path / "parts", resume=True)
    assert healed.steps == 12 and not healed.fitted
    for (name, expected), found in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert whole.config.capacities == again.config.capacities
    assert whole.config.router_thresholds == again.config.router_thresholds
    # a checkpoint of the training loads by itself
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / f"checkpoint-{stop}").config.model_type == kind


def test_a_resumed_clock_goes_on(folders, tmp_path):
    source = LlamaForCausalLM.from_pretrained(folders / "source").eval()
    settings = HealingSettings(minutes=0.2, seq_len=48, batch_size=4, start="as_converted", save_steps=4)

    def run(**kwargs):
        model = AutoModelForCausalLM.from_pretrained(folders / "mor")
        text = load_documents()[:6]
        return heal(model, source, text, text_tokenizer(), settings, tmp_path / "training", show=False, **kwargs)

    run(callbacks=[StopAt(4)])
    state = json.loads((tmp_path / "training" / "checkpoint-4" / "trainer_state.json").read_text())
    spent = state["stateful_callbacks"]["TimeLimitCallback"]["attributes"]["seconds"]
    assert 0 < spent < 12
    begin = time.monotonic()
    assert run(resume=True).steps > 4
    # sampling, loading and calibration take their time beside the training
    trained = json.loads(max((tmp_path / "training").glob("checkpoint-*/trainer_state.json"), key=_step).read_text())
    seconds = trained["stateful_callbacks"]["TimeLimitCallback"]["attributes"]["seconds"]
    assert spent < seconds <= 12 and time.monotonic() - begin > seconds - spent


def _step(path):
    return int(path.parent.name.removeprefix("checkpoint-"))


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
