"""`varidepth train`: a plan first, then a complete checkpoint, and resumed runs that end as those that ran through."""

import json
import re

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from real_text import VOCABULARY, save_source, text_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_processes import VARIDEPTH, run_two

from varidepth.cli.main import main
from varidepth.training.progress import TrainingProgress
from varidepth.training.training_checkpoints import last_checkpoint
from varidepth.training.training_recipe import TrainingRecipe
from varidepth.training.training_run import make_trainer


SIZES = {"vocab_size": VOCABULARY + 4, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
CONFIGS = {
    "mor": {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 6, "num_recursions": 2, "capacities": [1.0, 0.5]},
    "mod": {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 4, "capacity": 0.5, "gate": "sigmoid"},
    "jrt": {**SIZES, "num_hidden_layers": 4, "prefix_length": 12, "mask_token_id": VOCABULARY, "feature_dim": 4},
    "llama": {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 2},
}


def write_recipe(folder, architecture="mor", **training):
    text_tokenizer().save_pretrained(folder / "tokenizer")
    held_out = folder / "held-out.txt"
    held_out.write_text("The quick brown fox jumps over the lazy dog, and so on. " * 40)
    recipe = {
        "model": {
            "architecture": architecture,
            "tokenizer": str(folder / "tokenizer"),
            "config": CONFIGS[architecture],
        },
        "data": {"shuffle_buffer": 16, "eval_text": str(held_out), "eval_tokens": 128},
        "optimizer": {"learning_rate": 1.0e-2},
        "schedule": {"kind": "wsd", "warmup": 2, "decay": 0.25},
        "training": {
            "output": str(folder / "out"),
            "seq_len": 32,
            "batch_tokens": 256,
            "rows": 2,
            "steps": 8,
            "precision": "fp32",
            "save_steps": 3,
            "log_steps": 1,
            **training,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def losses(folder) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_run_prints_its_plan_and_leaves_a_complete_checkpoint(tmp_path, capsys, architecture):
    recipe = write_recipe(tmp_path, architecture)
    assert main(["train", str(recipe), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for words in ("parameters", "FLOPs per token", "memory", "8 of 256 tokens", "2, of which 2 are kept", "2048"):
        assert words in plan
    assert not (tmp_path / "out").exists() and str(tmp_path) not in plan
    assert main(["train", str(recipe)]) == 0
    captured = capsys.readouterr()
    assert plan in captured.out and "8 steps, 2048 tokens, training loss" in captured.out
    assert "evaluation loss" in captured.out
    assert "tokens/s" in captured.err and "left" in captured.err and "8 steps" in captured.err
    seen = losses(tmp_path / "out")
    assert len(seen) == 8 and seen[-1] < seen[0]
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-6"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.config.model_type == architecture and model.config.eos_token_id == tokenizer.eos_token_id
        ids = tokenizer("An assert statement", return_tensors="pt")
        assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| tokens | 2,048 |" in card and "learning_rate: 0.01" in card and str(tmp_path) not in card
    assert TrainingRecipe.load(tmp_path / "out" / "varidepth_training.yaml").steps == 8
    if architecture != "llama":
        assert (tmp_path / "out" / "checkpoint-6" / f"modeling_{architecture}.py").is_file()


@pytest.mark.parametrize("architecture", ["mor", "jrt"])
def test_a_resumed_run_ends_as_one_that_ran_through(tmp_path, capsys, architecture):
    recipe = str(write_recipe(tmp_path, architecture, keep_checkpoints=3))
    assert main(["train", recipe, "-o", str(tmp_path / "whole"), "--quiet"]) == 0
    # a run that is lost behind step 7, and the checkpoint of step 6 half written
    broken = make_trainer(TrainingRecipe.load(recipe), show=False)[0]
    broken.args.max_steps = 7
    broken.train()
    (tmp_path / "out" / "checkpoint-7").mkdir(exist_ok=True)
    for file in ("checkpoint-7", "checkpoint-6"):
        (tmp_path / "out" / file / "trainer_state.json").unlink(missing_ok=True)
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-3"
    assert main(["train", recipe]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", recipe, "--resume", "--quiet"]) == 0
    whole, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_a_converted_checkpoint_is_trained_on(tmp_path, capsys):
    source = save_source(tmp_path / "source")
    changes = [
        f"model.source={source}", "data.text=null", "data.config=null", "training.seq_len=32", "training.rows=8",
        "training.batch_tokens=256", "training.tokens=768", "training.precision=fp32",
    ]  # fmt: skip
    flags = [flag for change in changes for flag in ("--set", change)]
    assert main(["train", "mor_from_smollm2", "-o", str(tmp_path / "out"), *flags]) == 0
    assert "converted to mor" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "mor" and model.config.num_recursions == 2
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "converted")
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    # the routers did not begin with the zeros of a conversion
    assert not start.model.routers.weight.any() and model.model.routers.weight.std() > 0.1


@pytest.mark.parametrize("conversion", ["mor_middle_cycle", "null"])
def test_terms_of_use_are_inherited(tmp_path, conversion):
    source = save_source(tmp_path / "source")
    (source / "LICENSE").write_text("Be kind.")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    recipe = write_recipe(tmp_path, "llama", steps=1)
    parts = yaml.safe_load(recipe.read_text())
    parts["model"] = {"source": str(source), "conversion": yaml.safe_load(conversion)}
    recipe.write_text(yaml.safe_dump(parts))
    assert main(["train", str(recipe), "--quiet"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and ", from `source` on" in card and str(tmp_path) not in card
    assert ("trust_remote_code" in card) == (conversion != "null")
    assert (tmp_path / "out" / "LICENSE").read_text() == "Be kind."


def test_a_number_may_name_the_output(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, "llama", steps=1)
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe), "-o", "2024", "--quiet"]) == 0
    assert (tmp_path / "2024" / "config.json").is_file()


def test_an_incomplete_source_is_refused(tmp_path, capsys):
    source = save_source(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights.pop("model.layers.3.mlp.up_proj.weight")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tmp_path, "llama", steps=1)
    parts = yaml.safe_load(recipe.read_text())
    parts["model"] = {"source": str(source)}
    recipe.write_text(yaml.safe_dump(parts))
    assert main(["train", str(recipe), "--quiet"]) == 2
    assert "lacks the weight model.layers.3.mlp.up_proj.weight" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    recipe = str(write_recipe(tmp_path))

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "on_step_end", stop)
    assert main(["train", recipe, "--quiet"]) == 130
    assert "interrupted, nothing was kept" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(TrainingProgress, "on_train_end", stop)
    assert main(["train", recipe, "--quiet"]) == 130
    assert "checkpoint-8 is complete, go on behind it with --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.config.vocab_size=50", "but the tokenizer has"),
        ("data.text=/no/such/file.txt", "no file or folder"),
        ("training.batch_tokens=100", "must be a multiple"),
        ("model.tokenizer=/nowhere", "No tokenizer"),
        ("schedule.kind=linear", None),
    ],
)
def test_what_does_not_fit_is_said_before_training(tmp_path, capsys, change, message):
    recipe = write_recipe(tmp_path, steps=1)
    status = main(["train", str(recipe), "--set", change, "--quiet"])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == ((2, 1) if message else (0, 0))
    assert message is None or message in error


@pytest.mark.parametrize(
    "changes",
    [
        ["schedule.kind=cosine", "training.gradient_checkpointing=true"],
        ["schedule.kind=constant", "training.eval_steps=2"],
        ["training.precision=bf16", "training.log_routing=false"],
        ["training.precision=pure_bf16", "model.attention=eager"],
        ["arguments.torch_empty_cache_steps=3"],
    ],
)
def test_other_fields_of_a_recipe_run(changes, tmp_path, monkeypatch):
    """Under a launcher's file that names another precision, which does not count."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    recipe = write_recipe(tmp_path, steps=2)
    trainer = make_trainer(TrainingRecipe.load(recipe, changes), show=False)[0]
    assert trainer.accelerator.mixed_precision == ("bf16" if "training.precision=bf16" in changes else "no")
    assert trainer.args.torch_empty_cache_steps == (3 if "arguments" in changes[0] else None)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.undo()
    assert main(["train", str(recipe), "--quiet", *(flag for change in changes for flag in ("--set", change))]) == 0


@pytest.mark.parametrize("argument", ["per_device_eval_batch_size=3", "gradient_checkpointing_kwargs={}"])
def test_arguments_that_a_recipe_decides_are_refused(argument, tmp_path, capsys):
    recipe = write_recipe(tmp_path, steps=1)
    assert main(["train", str(recipe), "--quiet", "--set", f"arguments.{argument}"]) == 2
    assert argument.partition("=")[0] in capsys.readouterr().err


def test_two_processes_share_the_rows(tmp_path):
    recipe = write_recipe(tmp_path, steps=3)
    assert main(["train", str(recipe), "-o", str(tmp_path / "one"), "--quiet"]) == 0
    printed = run_two(tmp_path / "log.txt", *VARIDEPTH, "train", str(recipe), "-o", str(tmp_path / "two"))
    assert re.search(r"^processes +2$", printed, flags=re.M) and printed.count("training loss") == 1
    # the same rows make the same steps
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
