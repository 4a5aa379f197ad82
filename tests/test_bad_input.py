"""Wrong outputs, recipes and commands: one clear sentence on stderr, exit status 2, and nothing written."""

import errno
import shutil
from pathlib import Path

import pytest
from bad_cases import Cases, change_weights, convert_arguments
from pico_checkpoints import edit_json, save_pico

from varidepth.cli.main import main
from varidepth.conversion import checkpoint_writer


CASES = Cases()
case = CASES.add


# output


@case("not empty", "--overwrite")
def output_not_empty(folder, monkeypatch):
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")


@case("no checkpoint")
def overwriting_something_else(folder, monkeypatch):
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    return convert_arguments(folder, "--overwrite")


@case("holds notes.txt", "no part of a checkpoint")
def overwriting_a_checkpoint_with_notes(folder, monkeypatch):
    shutil.copytree(folder / "source", folder / "out")
    (folder / "out" / "notes.txt").write_text("mine")
    return convert_arguments(folder, "--overwrite")


@case("holds checkpoint-500", "no part of a checkpoint")
def overwriting_a_checkpoint_with_a_folder(folder, monkeypatch):
    shutil.copytree(folder / "source", folder / "out")
    shutil.copytree(folder / "source", folder / "out" / "checkpoint-500")
    return convert_arguments(folder, "--overwrite")


@case("holds train.py", "no part of a checkpoint")
def overwriting_a_checkpoint_with_a_program(folder, monkeypatch):
    shutil.copytree(folder / "source", folder / "out")
    (folder / "out" / "train.py").write_text("pass")
    return convert_arguments(folder, "--overwrite")


@case("is a file")
def output_is_a_file(folder, monkeypatch):
    (folder / "out").write_text("mine")


@case("source itself")
def output_is_the_source(folder, monkeypatch):
    return [str(folder / "source"), "-o", str(folder / "source"), "--recursions", "2", "--overwrite"]


@case("inside the source")
def output_inside_the_source(folder, monkeypatch):
    return [str(folder / "source"), "-o", str(folder / "source" / "mor"), "--recursions", "2"]


@case("no output")
def no_output(folder, monkeypatch):
    return [str(folder / "source"), "--recursions", "2"]


@case("cannot be made")
def output_below_a_file(folder, monkeypatch):
    (folder / "file").write_text("mine")
    return [str(folder / "source"), "-o", str(folder / "file" / "deep" / "out"), "--recursions", "2"]


@case("needs", "GB")
def disk_too_small(folder, monkeypatch):
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda path: usage)
    return [str(folder / "source"), "-o", str(folder / "new" / "deep" / "out"), "--recursions", "2"]


@case("disk is full")
def disk_full_while_writing(folder, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer.os, "fsync", full)
    return [str(folder / "source"), "-o", str(folder / "new" / "out"), "--recursions", "2"]


@case("disk is full")
def disk_full_at_the_last_file(folder, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("varidepth.conversion.convert.write_card", full)


# recipe


@case("num_recursions", "--recursions")
def recursions_left_out(folder, monkeypatch):
    return [str(folder / "source"), "-o", str(folder / "out")]


@case("num_recursions", "5", "4")
def recursions_do_not_fit(folder, monkeypatch):
    return [str(folder / "source"), "-o", str(folder / "out"), "--recursions", "5"]


@case("--recursionz")
def misspelt_flag(folder, monkeypatch):
    return [str(folder / "source"), "-o", str(folder / "out"), "--recursionz", "2"]


@case("--dtype", "int8")
def wrong_dtype_flag(folder, monkeypatch):
    return convert_arguments(folder, "--dtype", "int8")


@case("sharing", "'middle_cycel'", "middle_cycle")
def misspelt_sharing(folder, monkeypatch):
    return convert_arguments(folder, "--sharing", "middle_cycel")


@case("capacities", "3 entries")
def capacities_of_wrong_length(folder, monkeypatch):
    return convert_arguments(folder, "--capacities", "1", "0.5", "0.2")


@case("router_bias", "router_init")
def contradicting_router_fields(folder, monkeypatch):
    return convert_arguments(folder, "--no-router-bias")


@case("`router_init` is 'random'", "no router")
def random_routers_without_routing(folder, monkeypatch):
    return convert_arguments(folder, "--routing", "none", "--router-init", "random")


@case("`router_bias` is True", "no router")
def router_bias_without_routing(folder, monkeypatch):
    return convert_arguments(folder, "--routing", "none", "--router-bias")


@case("`gating` is 'interpolate'", "no router")
def gate_without_routing(folder, monkeypatch):
    return convert_arguments(folder, "--routing", "none", "--gating", "interpolate")


@case("max_shard_size")
def shard_size_without_meaning(folder, monkeypatch):
    return convert_arguments(folder, "--max-shard-size", "large")


@case("revision")
def revision_of_a_folder(folder, monkeypatch):
    return convert_arguments(folder, "--revision", "main")


def with_recipe(folder, text):
    (folder / "recipe.yaml").write_text(text)
    return [str(folder / "source"), "-o", str(folder / "out"), "--recipe", str(folder / "recipe.yaml")]


@case("`num_recursion`", "`num_recursions`")
def unknown_recipe_key(folder, monkeypatch):
    return with_recipe(folder, "to: mor\nnum_recursion: 2\n")


@case("`num_recursions`", "twice")
def recipe_with_a_field_in_two_spellings(folder, monkeypatch):
    return with_recipe(folder, "num-recursions: 2\nrecursions: 2\n")


@case("`revision`", "local")
def recipe_with_the_revision_of_a_folder(folder, monkeypatch):
    return with_recipe(folder, "recursions: 2\nrevision: main\n")


@case("YAML", "line 2")
def recipe_is_no_yaml(folder, monkeypatch):
    return with_recipe(folder, "to: mor\n  num_recursions: [2\n")


@case("key: value")
def recipe_is_a_list(folder, monkeypatch):
    return with_recipe(folder, "- mor\n- 2\n")


@case("num_recursions", "'two'", "int")
def recipe_value_of_wrong_type(folder, monkeypatch):
    return with_recipe(folder, "num_recursions: two\n")


@case("dtype", "'float8'")
def recipe_with_wrong_dtype(folder, monkeypatch):
    return with_recipe(folder, "num_recursions: 2\ndtype: float8\n")


@case("`capacities` is 0.5", "list")
def recipe_with_a_number_for_a_list(folder, monkeypatch):
    return with_recipe(folder, "num_recursions: 2\ncapacities: 0.5\n")


# MoD


def mod_arguments(folder: Path, *flags: str) -> list[str]:
    return [str(folder / "source"), "-o", str(folder / "out"), "--to", "mod", *flags]


@case("`num_recursions` is 2", "'mor'", "`to: mod`")
def recursions_of_a_mod(folder, monkeypatch):
    return mod_arguments(folder, "--recursions", "2")


@case("`init` is 'upper'", "'mor'")
def initialisation_of_a_mod(folder, monkeypatch):
    return mod_arguments(folder, "--init", "upper")


@case("`routed_layers` is [1, 3]", "--to mod")
def routed_layers_of_a_mor(folder, monkeypatch):
    return convert_arguments(folder, "--routed-layers", "1", "3")


@case("`calibration_text`", "--to mod")
def calibration_text_of_a_mor(folder, monkeypatch):
    return convert_arguments(folder, "--calibration-text", "text.txt")


@case("`num_routed_layers` is 2", "--routed-layers auto")
def number_of_layers_without_a_measurement(folder, monkeypatch):
    return mod_arguments(folder, "--num-routed-layers", "2")


@case("`calibration_text`", "--routed-layers auto")
def text_without_a_measurement(folder, monkeypatch):
    return mod_arguments(folder, "--routed-layers", "1", "--calibration-text", "text.txt")


@case("--routed-layers", "'autoo'", "'auto'")
def misspelt_auto(folder, monkeypatch):
    return mod_arguments(folder, "--routed-layers", "autoo")


@case("`routed_layers` is [2, 6]", "0 to 5")
def routed_layer_that_does_not_exist(folder, monkeypatch):
    return mod_arguments(folder, "--routed-layers", "2", "6")


@case("`num_routed_layers` is 6", "1 to 5")
def more_layers_than_can_be_routed(folder, monkeypatch):
    return mod_arguments(folder, "--routed-layers", "auto", "--num-routed-layers", "6")


@case("`capacity` has 2 entries", "3")
def auto_with_capacities_of_wrong_length(folder, monkeypatch):
    return mod_arguments(folder, "--routed-layers", "auto", "--capacity", "0.5", "0.2")


@case("`calibration_text`", "no such file")
def calibration_text_missing(folder, monkeypatch):
    return mod_arguments(folder, "--routed-layers", "auto", "--calibration-text", str(folder / "nothing.txt"))


@case("`calibration_text`", "UTF-8")
def calibration_text_is_no_text(folder, monkeypatch):
    (folder / "text.txt").write_bytes(b"\xff\xfe\x00\x80")
    return mod_arguments(folder, "--routed-layers", "auto", "--calibration-text", str(folder / "text.txt"))


@case("`calibration_text`", "3 tokens")
def calibration_text_is_too_short(folder, monkeypatch):
    (folder / "text.txt").write_text("w1 w2")
    return mod_arguments(folder, "--routed-layers", "auto", "--calibration-text", str(folder / "text.txt"))


@case("auto", "no tokenizer")
def measurement_without_tokenizer(folder, monkeypatch):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "source" / name).unlink()
    return mod_arguments(folder, "--routed-layers", "auto")


@case("`capacity`", "above 0")
def capacity_of_zero(folder, monkeypatch):
    return mod_arguments(folder, "--capacity", "0")


@case("`gate` is 'raw'", "router_init: random")
def raw_gate_that_starts_open(folder, monkeypatch):
    return mod_arguments(folder, "--gate", "raw")


@case("`num_noop_experts` is 1", "llama")
def new_experts_without_experts(folder, monkeypatch):
    return mod_arguments(folder, "--num-noop-experts", "1")


@case("`num_noop_experts` is 1", "router_init: random")
def new_experts_that_start_open(folder, monkeypatch):
    save_pico(folder / "experts", "mixtral", tokenizer=False)
    return [str(folder / "experts"), "-o", str(folder / "out"), "--to", "mod", "--num-noop-experts", "1"]


@case("lack expert 1.w1", "incomplete")
def missing_expert(folder, monkeypatch):
    save_pico(folder / "experts", "mixtral", tokenizer=False)
    change_weights(folder / "experts", lambda w: w.pop("model.layers.2.block_sparse_moe.experts.1.w1.weight"))
    return [str(folder / "experts"), "-o", str(folder / "out"), "--to", "mod"]


@case("'mixtral'", "llama")
def experts_in_a_mor(folder, monkeypatch):
    save_pico(folder / "experts", "mixtral", tokenizer=False)
    return [str(folder / "experts"), "-o", str(folder / "out"), "--recursions", "2"]


@case("`router_init` is 'random'", "no router")
def random_routers_of_stochastic_routing(folder, monkeypatch):
    return mod_arguments(folder, "--routing", "stochastic", "--router-init", "random")


@case("`gate` is 'sigmoid'", "no router")
def gate_of_stochastic_routing(folder, monkeypatch):
    return mod_arguments(folder, "--routing", "stochastic", "--gate", "sigmoid")


@case("`routing` is 'none'", "'stochastic'")
def mod_without_routing(folder, monkeypatch):
    return mod_arguments(folder, "--routing", "none")


@case("`to` is 'mad'", "'mod'")
def recipe_for_an_unknown_architecture(folder, monkeypatch):
    return with_recipe(folder, "to: mad\n")


@case("`capacity` is 'half'", "float")
def recipe_with_a_word_for_a_capacity(folder, monkeypatch):
    return with_recipe(folder, "to: mod\ncapacity: half\n")


@case("MoD already")
def source_is_a_mod(folder, monkeypatch):
    main(["convert", *mod_arguments(folder), "--quiet"])
    return [str(folder / "out"), "-o", str(folder / "again"), "--to", "mod"]


@case("recipe", "mor_middle_cycle")
def recipe_missing(folder, monkeypatch):
    return convert_arguments(folder, "--recipe", str(folder / "nothing.yaml"))


# unroll and inspect


def routed(folder, *flags):
    assert main([str(word) for word in ("convert", *convert_arguments(folder, *flags), "--quiet")]) == 0
    return [str(folder / "out"), "-o", str(folder / "vanilla")]


@case("gate", "'weighted'", command="unroll")
def unroll_a_weighted_gate(folder, monkeypatch):
    return routed(folder, "--gating", "weighted")


@case("routers have learned", command="unroll")
def unroll_trained_routers(folder, monkeypatch):
    arguments = routed(folder)
    change_weights(folder / "out", lambda w: w["model.routers.weight"].fill_(0.1))
    return arguments


@case("routers have learned", command="unroll")
def unroll_a_closed_router(folder, monkeypatch):
    arguments = routed(folder)
    change_weights(folder / "out", lambda w: w["model.routers.bias"].view(-1)[1].fill_(3.0))
    return arguments


@case("kv_mode", command="unroll")
def unroll_shared_keys(folder, monkeypatch):
    return routed(folder, "--kv-mode", "shared")


@case("routers have learned", command="unroll")
def unroll_trained_depths(folder, monkeypatch):
    assert main(["convert", *mod_arguments(folder), "--quiet"]) == 0
    change_weights(folder / "out", lambda w: w["model.routers.weight"].fill_(0.1))
    return [str(folder / "out"), "-o", str(folder / "vanilla")]


@case("lack model.routers.weight", command="unroll")
def unroll_without_routers(folder, monkeypatch):
    assert main(["convert", *mod_arguments(folder), "--quiet"]) == 0
    change_weights(folder / "out", lambda w: w.pop("model.routers.weight"))
    return [str(folder / "out"), "-o", str(folder / "vanilla")]


@case("'llama'", "mor", command="unroll")
def unroll_a_vanilla_model(folder, monkeypatch):
    return [str(folder / "source"), "-o", str(folder / "vanilla")]


@case("'gpt2'", command="inspect")
def inspect_an_unsupported_family(folder, monkeypatch):
    edit_json(folder / "source" / "config.json", model_type="gpt2")
    return [str(folder / "source")]


@case("context", command="inspect")
def inspect_with_a_negative_context(folder, monkeypatch):
    return [str(folder / "source"), "--context", "-1"]


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_nothing_written(name, tmp_path, monkeypatch, capsys):
    CASES.check(name, tmp_path, monkeypatch, capsys)


def test_there_are_enough_cases():
    assert len(CASES) >= 69
