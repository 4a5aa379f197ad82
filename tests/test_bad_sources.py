"""Damaged or unfit sources: one clear sentence on stderr, exit status 2, and nothing written."""

import builtins
import json
import pickle
import shutil
import struct

import pytest
import torch
from bad_cases import Cases, change_weights, convert_arguments, reshard, write_index
from pico_checkpoints import edit_json
from safetensors.torch import load_file, save_file

from varidepth.cli.main import main


CASES = Cases()
case = CASES.add


# files


@case("model-00002-of-00002.safetensors", "missing")
def missing_shard(folder, monkeypatch):
    reshard(folder / "source")
    (folder / "source" / "model-00002-of-00002.safetensors").unlink()


@case("index", "model.safetensors.index.json")
def missing_index(folder, monkeypatch):
    reshard(folder / "source")
    (folder / "source" / "model.safetensors.index.json").unlink()


@case("truncated", "model.safetensors")
def truncated_safetensors(folder, monkeypatch):
    path = folder / "source" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@case("truncated", "model.safetensors")
def empty_safetensors(folder, monkeypatch):
    (folder / "source" / "model.safetensors").write_bytes(b"")


@case("outside", "../secret.safetensors")
def index_points_outside(folder, monkeypatch):
    weight_map = reshard(folder / "source")
    shutil.copy(folder / "source" / "model-00001-of-00002.safetensors", folder / "secret.safetensors")
    write_index(folder / "source", weight_map | {"model.norm.weight": "../secret.safetensors"})


@case("index", "model.norm.weight")
def index_names_the_wrong_shard(folder, monkeypatch):
    weight_map = reshard(folder / "source")
    other = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    write_index(folder / "source", weight_map | {"model.norm.weight": other})


@case("weight_map")
def index_without_weight_map(folder, monkeypatch):
    reshard(folder / "source")
    (folder / "source" / "model.safetensors.index.json").write_text("{}")


@case("two shards", "model.norm.weight")
def tensor_in_two_shards(folder, monkeypatch):
    weight_map = reshard(folder / "source")
    for file in set(weight_map.values()):
        weights = load_file(folder / "source" / file)
        weights["model.norm.weight"] = torch.ones(32)
        save_file(weights, folder / "source" / file)


@case("no weights")
def no_weights(folder, monkeypatch):
    (folder / "source" / "model.safetensors").unlink()


@case("config.json")
def config_missing(folder, monkeypatch):
    (folder / "source" / "config.json").unlink()


@case("config.json", "JSON")
def config_is_no_json(folder, monkeypatch):
    (folder / "source" / "config.json").write_text('{"model_type": "llama",')


@case("config.json", "object")
def config_is_a_list(folder, monkeypatch):
    (folder / "source" / "config.json").write_text("[1, 2]")


@case("model_type")
def config_without_model_type(folder, monkeypatch):
    edit_json(folder / "source" / "config.json", model_type=None)


@case("hidden_size", "config.json")
def config_with_a_wrong_type(folder, monkeypatch):
    edit_json(folder / "source" / "config.json", hidden_size="thirty-two")


@case("could run foreign code")
def pickle_with_code(folder, monkeypatch):
    (folder / "source" / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self):
            return (builtins.print, ("pwned",))

    torch.save({"model.norm.weight": Payload()}, folder / "source" / "pytorch_model.bin")


@case("could run foreign code")
def plain_pickle_with_code(folder, monkeypatch):
    (folder / "source" / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self):
            return (builtins.print, ("pwned",))

    (folder / "source" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(), protocol=2))


@case("pytorch_model.bin", "truncated")
def truncated_pickle(folder, monkeypatch):
    weights = load_file(folder / "source" / "model.safetensors")
    (folder / "source" / "model.safetensors").unlink()
    path = folder / "source" / "pytorch_model.bin"
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@case("state dict")
def pickle_without_state_dict(folder, monkeypatch):
    (folder / "source" / "model.safetensors").unlink()
    torch.save([torch.ones(2)], folder / "source" / "pytorch_model.bin")


@case("does not exist")
def source_does_not_exist(folder, monkeypatch):
    return [str(folder / "nowhere"), "-o", str(folder / "out"), "--recursions", "2"]


@case("Hub", "reached")
def hub_offline(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return ["someone/something-that-is-not-cached", "-o", str(folder / "out"), "--recursions", "2"]


@case("neither an existing path nor a Hub id")
def source_is_no_hub_id(folder, monkeypatch):
    return ["what is this?", "-o", str(folder / "out"), "--recursions", "2"]


@case("GGUF", "damaged")
def corrupt_gguf(folder, monkeypatch):
    (folder / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 10**6, 10**6) + b"\x00" * 64)
    return [str(folder / "model.gguf"), "-o", str(folder / "out"), "--recursions", "2"]


@case("no GGUF file")
def gguf_of_something_else(folder, monkeypatch):
    (folder / "model.gguf").write_bytes(b"PK\x03\x04 a zip archive")
    return [str(folder / "model.gguf"), "-o", str(folder / "out"), "--recursions", "2"]


@case("only .gguf files")
def source_is_another_file(folder, monkeypatch):
    return [str(folder / "source" / "model.safetensors"), "-o", str(folder / "out"), "--recursions", "2"]


@case("2 GGUF files")
def folder_with_two_ggufs(folder, monkeypatch):
    (folder / "source" / "model.safetensors").unlink()
    for name in ("a.gguf", "b.gguf"):
        (folder / "source" / name).write_bytes(b"GGUF")


# models


@case("'gpt2'", "llama")
def unsupported_family(folder, monkeypatch):
    edit_json(folder / "source" / "config.json", model_type="gpt2")


@case("quantized", "bitsandbytes")
def quantized_source(folder, monkeypatch):
    edit_json(folder / "source" / "config.json", quantization_config={"quant_method": "bitsandbytes"})


@case("I8", "unquantized")
def integer_weights(folder, monkeypatch):
    change_weights(folder / "source", lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))


@case("model.layers.3.mlp.up_proj.weight")
def missing_tensor(folder, monkeypatch):
    change_weights(folder / "source", lambda w: w.pop("model.layers.3.mlp.up_proj.weight"))


@case("adapter", "model.layers.0.self_attn.q_proj.lora_A")
def unknown_tensor(folder, monkeypatch):
    lora = {"model.layers.0.self_attn.q_proj.lora_A": torch.ones(2, 32)}
    change_weights(folder / "source", lambda w: w.update(lora))


@case("shape [16]", "[32]")
def wrong_shape(folder, monkeypatch):
    change_weights(folder / "source", lambda w: w.update({"model.norm.weight": torch.ones(16)}))


@case("model.layers.6", "config.json")
def config_of_a_deeper_model(folder, monkeypatch):
    edit_json(folder / "source" / "config.json", num_hidden_layers=7)


@case("lm_head.weight")
def untied_head_missing(folder, monkeypatch):
    edit_json(folder / "source" / "config.json", tie_word_embeddings=False)


@case("ties the head")
def tied_head_differs(folder, monkeypatch):
    change_weights(folder / "source", lambda w: w.update({"lm_head.weight": torch.ones(96, 32)}))


@case("model.layers.0.mlp.up_proj.weight", "NaN")
def nan_weights(folder, monkeypatch):
    change_weights(folder / "source", lambda w: w["model.layers.0.mlp.up_proj.weight"].view(-1)[5].fill_(torch.nan))


@case("float16", "bfloat16")
def weights_beyond_float16(folder, monkeypatch):
    change_weights(folder / "source", lambda w: w["model.layers.0.mlp.up_proj.weight"].fill_(1e6))
    return convert_arguments(folder, "--dtype", "float16")


@case("tokenizer", "150", "96")
def vocabulary_mismatch(folder, monkeypatch):
    tokenizer = json.loads((folder / "source" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["another"] = 150
    (folder / "source" / "tokenizer.json").write_text(json.dumps(tokenizer))


@case("tokenizer.json", "JSON")
def damaged_tokenizer(folder, monkeypatch):
    (folder / "source" / "tokenizer.json").write_text("{")


@case("generation_config.json", "JSON")
def damaged_generation_config(folder, monkeypatch):
    (folder / "source" / "generation_config.json").write_text("nope")


@case("MoR already")
def source_is_a_mor(folder, monkeypatch):
    main(["convert", *convert_arguments(folder), "--quiet"])
    return [str(folder / "out"), "-o", str(folder / "again"), "--recursions", "2"]


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_nothing_written(name, tmp_path, monkeypatch, capsys):
    CASES.check(name, tmp_path, monkeypatch, capsys)


def test_there_are_enough_cases():
    assert len(CASES) >= 40
