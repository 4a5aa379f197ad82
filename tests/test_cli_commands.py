"""The command: plans, progress, formats and exit states."""

import json
import os
import signal
import subprocess
import sys

import pytest
from pico_checkpoints import save_pico
from transformers import AutoModelForCausalLM

import varidepth
from varidepth.cli.convert_command import field_help
from varidepth.cli.main import COMMANDS, main
from varidepth.conversion.recipe_fields import ALL_FIELDS


@pytest.fixture
def source(tmp_path):
    return save_pico(tmp_path / "source", layers=8)


def test_convert_prints_the_plan_before_it_writes(source, tmp_path, capsys):
    assert main(["convert", str(source), "-o", str(tmp_path / "mor"), "--to", "mor", "--recursions", "2"]) == 0
    captured = capsys.readouterr()
    for words in ("layer", "made of source layer", "new: model.routers.weight", "parameters", "FLOPs per token", "KV"):
        assert words in captured.out
    assert "writing" in captured.err and str(tmp_path) not in captured.out
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "mor"), varidepth.MoRForCausalLM)


def test_dry_run_writes_nothing(source, tmp_path, capsys):
    flags = ["--recursions", "4", "--init", "average", "--dry-run", "--quiet"]
    assert main(["convert", str(source), "-o", str(tmp_path / "mor"), *flags]) == 0
    out = capsys.readouterr().out
    assert "mean of 2-5" in out and "coda (extra)" in out
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_quiet_is_silent(source, tmp_path, capfd):
    assert main(["convert", str(source), "-o", str(tmp_path / "mor"), "--recursions", "2", "--quiet"]) == 0
    assert main(["unroll", str(tmp_path / "mor"), "-o", str(tmp_path / "vanilla"), "--quiet"]) == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_every_field_of_the_model_is_a_flag(source, tmp_path, capsys):
    flags = [
        "--num-recursions",
        "2",
        "--sharing",
        "middle_sequence",
        "--capacities",
        "1",
        "0.5",
        "--router-type",
        "mlp",
    ]
    flags += [
        "--prelude-layers",
        "2",
        "--router-thresholds",
        "0.4",
        "0.6",
        "--aux-loss-coef",
        "0.01",
        "--kv-mode",
        "shared",
    ]
    assert main(["convert", str(source), "-o", str(tmp_path / "mor"), *flags, "--quiet"]) == 0
    config = varidepth.MoRConfig.from_pretrained(tmp_path / "mor")
    assert (config.prelude_layers, config.coda_layers, config.num_shared_layers) == (2, 2, 2)
    assert (config.capacities, config.router_thresholds) == ([1.0, 0.5], [0.4, 0.6])
    assert (config.router_type, config.aux_loss_coef, config.kv_mode) == ("mlp", 0.01, "shared")


def test_help_describes_every_field_of_the_model(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "{cycle,sequence,middle_cycle,middle_sequence}",
        "{weighted,additive,interpolate}",
        "how often a shared layer can be applied",
        "Unique layers before and after",
        "Weight of the balancing loss.",
    ):
        assert words in text
    for field in ALL_FIELDS:
        assert field_help(field).endswith(".")


def test_flags_go_before_the_recipe(source, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {source}\nnum_recursions: 3\nrouter_init: on\naux_loss_coef: 1e-2\n")
    arguments = ["convert", "--recipe", str(recipe), "-o", str(tmp_path / "mor"), "--recursions", "2", "--quiet"]
    assert main(arguments) == 0
    config = varidepth.MoRConfig.from_pretrained(tmp_path / "mor")
    assert (config.num_recursions, config.routing, config.aux_loss_coef) == (2, "expert_choice", 0.01)
    for name in ("varidepth_recipe.yaml", "varidepth_plan.json", "README.md", "config.json"):
        assert str(tmp_path) not in (tmp_path / "mor" / name).read_text()


@pytest.mark.parametrize("recursive", [True, False])
def test_inspect(recursive, source, tmp_path, capsys):
    folder = source
    if recursive:
        folder = tmp_path / "mor"
        main(["convert", str(source), "-o", str(folder), "--recursions", "2", "--quiet"])
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert ("let every token through" in out) is recursive and "FLOPs per token at 1024" in out
    assert main(["inspect", str(folder), "--json", "--context", "64"]) == 0
    content = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert content["stored_parameters"] == content["full"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert content["full"]["context"] == 64


def test_env(capsys):
    assert main(["env"]) == 0
    assert varidepth.__version__ in capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    bundle = json.loads(capsys.readouterr().out)
    assert {"python", "torch", "transformers", "cores"} <= bundle.keys()
    assert os.path.expanduser("~") not in json.dumps(bundle)


def test_help_and_version(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as done:
            main([name, "--help"])
        assert done.value.code == 0
    capsys.readouterr()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == varidepth.__version__


def test_a_defect_is_told_apart_from_bad_input(source, tmp_path, capsys, monkeypatch):
    def broken(*arguments, **options):
        raise KeyError("surprise")

    monkeypatch.setattr("varidepth.conversion.convert.export_remote_code", broken)
    arguments = ["convert", str(source), "-o", str(tmp_path / "mor"), "--recursions", "2", "--quiet"]
    assert main(arguments) == 1
    assert "unexpected KeyError" in capsys.readouterr().err
    with pytest.raises(KeyError):
        main([*arguments, "--debug"])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM handlers")
def test_a_killed_conversion_leaves_nothing(source, tmp_path):
    program = (
        "import os, signal, sys\n"
        "from varidepth.conversion import checkpoint_writer\n"
        "checkpoint_writer.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from varidepth.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["convert", str(source), "-o", str(tmp_path / "deep" / "mor"), "--recursions", "2", "--quiet"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
