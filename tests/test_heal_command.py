"""`varidepth heal` and the run behind it: complete checkpoints, exact resume, what the user is told."""

import json

import pytest
import torch
from real_text import save_source, text_blocks, text_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TrainerCallback
from two_processes import VARIDEPTH, run_two

from varidepth.cli.main import main
from varidepth.conversion.convert import convert
from varidepth.conversion.recipe import shipped_recipes
from varidepth.training import healing_run, precision
from varidepth.training.healing_run import HealingSettings, heal
from varidepth.training.progress import TrainingProgress
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


@pytest.fixture(autouse=True)
def few_tokens_for_routers(monkeypatch):
    monkeypatch.setattr(healing_run, "ROUTER_TOKENS", 960)


SHORT = ["--seq-len", "48", "--batch-size", "4", "--fit-tokens", "2048", "--sampled-tokens", "960"]


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
    # all tokens at full depth in the first half, routed ones in the second
    assert [entry["step"] for entry in figures["log"]] == [10, 20]
    assert [layer["layer"] for layer in figures["fitted"]] == [1, 2]
    assert 0 < figures["calibration"]["compute"] < 1

    source = LlamaForCausalLM.from_pretrained(folders / "source").eval()
    ids = text_blocks().blocks[-8:]
    assert kl_from_source(output, source, ids) < 0.8 * kl_from_source(folders / "mor", source, ids)
    assert {path.name for path in (folders / "mor").iterdir()} <= {path.name for path in output.iterdir()}
    card = (output / "README.md").read_text()
    assert "## Healing" in card and "on 3840 tokens" in card and "has been measured.**" not in card
    assert "train the model before you use it" not in card and "of `text.txt` in 20 steps" in card
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


def test_weights_keep_the_type_that_they_had(folders, tmp_path):
    """Trained in fp32, where a step is not lost, and stored as before, what recursions add too; routers in fp32."""
    fields = {"recursion_rank": 2, "recursion_norms": True, "dtype": "bfloat16"}
    convert(folders / "source", tmp_path / "mor", num_recursions=2, quiet=True, **fields)
    command = ["heal", str(tmp_path / "mor"), str(folders / "text.txt"), "--source", str(folders / "source")]
    assert main([*command, "-o", str(tmp_path / "healed"), "--tokens", "384", *SHORT]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("mor", "healed"))
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    assert after["model.routers.weight"].dtype == torch.float32
    assert json.loads((tmp_path / "healed" / "config.json").read_text())["dtype"] == "bfloat16"
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert any("mlp.up_proj" in name for name in moved) and any("down_proj_up" in name for name in moved)
    assert not (tmp_path / "healed-training").exists()


LEARNS = "routers     learned from where conversion left them: "


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("mor_middle_cycle", "compute"),
        ("mor_paper", LEARNS + "routing is 'expert_choice', router_type 'linear' and router_bias False"),
        ("mor_token_choice", "trained"),
        ("recursive_sequence", "trained"),
        ("mod_attention", "compute"),
        ("mod_paper", LEARNS + "`gate` is 'raw'"),
        ("mod_block_annealed", LEARNS + "capacity_warmup_steps is 1000"),
    ],
)
def test_what_every_recipe_makes_is_healed(recipe, said, folders, tmp_path, capsys):
    convert(folders / "source", tmp_path / "made", recipe, quiet=True)
    command = ["heal", str(tmp_path / "made"), str(folders / "text.txt"), "--source", str(folders / "source")]
    assert main([*command, "-o", str(tmp_path / "healed"), "--tokens", "1536", *SHORT]) == 0
    printed = capsys.readouterr().out
    assert said in printed and (LEARNS in printed) == said.startswith(LEARNS)


def test_all_shipped_recipes_are_tried():
    tried = {arguments[0] for arguments in test_what_every_recipe_makes_is_healed.pytestmark[0].args[1]}
    assert tried == set(shipped_recipes())


@pytest.mark.parametrize("flags", [[], ["--train-embeddings"]])
def test_embeddings_stay_the_sources_unless_they_are_trained(flags, folders, tmp_path):
    command = ["heal", str(folders / "mor"), str(folders / "text.txt"), "--source", str(folders / "source")]
    assert main([*command, "-o", str(tmp_path / "healed"), "--tokens", "384", *SHORT, *flags]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (folders / "mor", tmp_path / "healed"))
    name = "model.embed_tokens.weight"
    assert torch.equal(before[name], after[name]) != bool(flags)


def test_an_interrupted_healing_goes_on(folders, tmp_path, capsys, monkeypatch):
    command = ["heal", str(folders / "mor"), str(folders / "text.txt"), "--source", str(folders / "source")]
    command += ["-o", str(tmp_path / "healed"), "--tokens", "1152", *SHORT]

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "on_step_begin", stop, raising=False)
    assert main(command) == 130
    assert "interrupted, nothing was kept" in capsys.readouterr().err
    keeps = ["--save-steps", "2", "--work", str(tmp_path / "work")]
    assert main([*command, *keeps]) == 130
    assert "checkpoint-4 is complete, go on behind it with --resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert not (tmp_path / "healed").exists()
    assert main([*command, *keeps, "--resume"]) == 0
    assert "1152 tokens in 6 steps" in capsys.readouterr().out
    assert main([*command, "--work", str(tmp_path / "other")]) == 2
    assert "overwrite" in capsys.readouterr().err
    assert main([*command, "--work", str(tmp_path / "other"), "--overwrite"]) == 0


@pytest.mark.parametrize("faster", [True, False])
def test_precision_is_measured_once(faster, folders, tmp_path, monkeypatch):
    """A resumed training computes as the one that it goes on with, whatever is faster by now."""
    settings = HealingSettings(
        tokens=48 * 4 * 3, seq_len=48, batch_size=4, start="as_converted", sampled_tokens=0, save_steps=2
    )
    source = LlamaForCausalLM.from_pretrained(folders / "source").eval()
    used = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            used.append(args.bf16)
            assert args.mixed_precision == ("bf16" if args.bf16 else "no")

    def run(resume):
        seconds = {torch.bfloat16: 1.0, torch.float32: 2.0 if faster != resume else 0.5}
        monkeypatch.setattr(precision, "_seconds", seconds.get)
        model = AutoModelForCausalLM.from_pretrained(folders / "mor")
        text, callbacks = load_documents()[:6], [Look(), StopAt(2)]
        heal(model, source, text, text_tokenizer(), settings, tmp_path, resume=resume, callbacks=callbacks, show=False)

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no" if faster else "bf16")
    run(False)
    run(True)
    assert used == [faster] * 3


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
        tokens=48 * 4 * 12, seq_len=48, batch_size=4, fit_tokens=1024, save_steps=stop, sampled_tokens=480,
        sampled_rows=0.5,
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
    # one that was over is loaded, and not trained further
    once_more, healed = run(tmp_path / "parts", resume=True)
    assert healed.steps == 12 and once_more.config.capacities == whole.config.capacities
    for (name, expected), found in zip(whole.named_parameters(), once_more.parameters(), strict=True):
        assert torch.equal(found, expected), name
    # a checkpoint of the training loads by itself
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / f"checkpoint-{stop}").config.model_type == kind


def test_two_processes_heal_as_one(folders, tmp_path, monkeypatch):
    """The same rows make the same steps, and both start the same routers."""
    monkeypatch.undo()
    common = ["heal", str(folders / "mor"), str(folders / "text.txt"), "--source", str(folders / "source"), "--json"]
    common += ["--seq-len", "48", "--fit-tokens", "1024", "--sampled-tokens", "480", "--quiet"]
    assert main([*common, "-o", str(tmp_path / "one"), "--tokens", "1536", "--batch-size", "4"]) == 0
    command = [*VARIDEPTH, *common, "-o", str(tmp_path / "two"), "--tokens", "1536", "--batch-size", "2"]
    printed = run_two(tmp_path / "log.txt", *command)
    assert printed.count('"steps": 8') == 1
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    before = load_file(folders / "mor" / "model.safetensors")
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() <= 1e-2 * (tensor - before[name]).norm() + 1e-6, name


def test_weights_that_are_divided_are_refused(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    command = ["heal", str(folders / "mor"), str(folders / "text.txt"), "--source", str(folders / "source")]
    assert main([*command, "-o", str(tmp_path / "healed"), "--tokens", "9"]) == 2
    assert "which FSDP divides among processes" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_resumed_clock_goes_on(folders, tmp_path):
    source = LlamaForCausalLM.from_pretrained(folders / "source").eval()
    settings = HealingSettings(minutes=0.2, seq_len=48, batch_size=4, start="as_converted", save_steps=4)

    def run(**kwargs):
        model = AutoModelForCausalLM.from_pretrained(folders / "mor")
        text = load_documents()[:6]
        return heal(model, source, text, text_tokenizer(), settings, tmp_path / "training", show=False, **kwargs)

    run(callbacks=[StopAt(4)])
    path = tmp_path / "training" / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    kept = state["stateful_callbacks"]["TimeLimitCallback"]["attributes"]
    assert 0 < kept["seconds"] < 12
    # as if the time were nearly over
    kept["seconds"] = 11.99
    path.write_text(json.dumps(state))
    assert run(resume=True).steps == 5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tokens", "0"], "`tokens` is 0, but must be at least 1"),
        (["--minutes", "nan"], "`minutes` is nan, but must be a finite number above 0"),
        (["--tokens", "9", "--sampled-rows", "1"], "must be a share below 1"),
        (["--tokens", "9", "--learning-rate", "-1"], "`learning_rate` is -1.0"),
        (["--tokens", "9", "--hidden-weight", "-1"], "`hidden_weight` is -1.0, but must be at least 0"),
        (["--tokens", "9", "--distillation-weight", "2"], "must be a share from 0 to 1"),
        (["--tokens", "9", "--routing-begin", "0.9"], "`routing_begin` is 0.9 and `routing_end` 0.8"),
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
