"""Checkpoints in the layout of the official JRT-RNN and Based code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import written_out_jrt
from huggingface_hub import ModelCard
from pico_checkpoints import edit_json, pico_tokenizer, save_pico
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from written_out_jrt import official_logits, official_tensors

import varidepth
from varidepth.analysis.recurrent_state import state_bytes
from varidepth.cli.main import main
from varidepth.conversion.convert import convert
from varidepth.conversion.errors import ConversionError
from varidepth.conversion.official_jrt import jrt_blueprint
from varidepth.conversion.recipe import Recipe
from varidepth.conversion.source_checkpoint import SourceCheckpoint
from varidepth.conversion.tensor_source import TensorSource


EMBEDDING, HEAD = "transformer.embeddings.word_embeddings.weight", "lm_head.weight"
# mixers of the small model
LINEAR, SLIDING, CONV = (f"transformer.layers.{layer}.mixer" for layer in (1, 2, 0))
# layers with linear and with sliding-window attention
LAYOUTS = {
    26: ([1, 6, 11, 16, 21], [2, 7, 12, 17, 22]),
    36: ([1, 6, 11, 16, 21, 27, 33], [2, 7, 12, 17, 22, 28, 34]),
}
COUNTERS = {f"{part}_metrics.num-tokens.count": torch.tensor(31457280000) for part in ("train", "val", "test")}


def shapes(layers, hidden, heads=16, vocabulary=50264, feature_dim=16, prefix=True):
    """Names and shapes of the official modules."""
    linear, sliding = LAYOUTS.get(layers, ([1], [2]))
    keys, d = heads * feature_dim, hidden
    found = {EMBEDDING: (vocabulary, d), HEAD: (vocabulary, d), "transformer.ln_f.weight": (d,)}
    for layer in range(layers):
        part = {"norm1.weight": (d,), "norm2.weight": (d,), "mlp.fc1.weight": (4 * d, d), "mlp.fc2.weight": (d, 2 * d)}
        if layer in linear:
            part |= {f"mixer.proj_{name}.weight": (keys, d) for name in ("q", "k")}
            part |= {"mixer.proj_v.weight": (d, d), "mixer.out_proj.weight": (d, d)}
            if prefix:
                part |= {"mixer.proj_k_enc.weight": (keys, d), "mixer.proj_v_enc.weight": (d, d)}
        elif layer in sliding:
            part |= {"mixer.Wqkv.weight": (3 * d, d), "mixer.out_proj.weight": (d, d)}
        else:
            part |= {"mixer.in_proj.weight": (4 * d, d), "mixer.in_proj.bias": (4 * d,)}
            part |= {"mixer.out_proj.weight": (d, 2 * d), "mixer.out_proj.bias": (d,)}
            part |= {"mixer.conv.conv.weight": (2 * d, 1, 3)}
        found |= {f"transformer.layers.{layer}.{name}": shape for name, shape in part.items()}
    return found


def config_of(layers, hidden, heads=16, vocabulary=50257, prefix=1024):
    """config.json of a released model; `prefix` is None for Based."""
    package = "based.models.mixers"
    linear = {"_target_": f"{package}.linear_attention.LinearAttention", "feature_dim": 16, "num_heads": heads}
    if prefix is None:
        linear["feature_map"] = {"_target_": f"{package}.linear_attention.TaylorExp", "input_dim": 16}
    else:
        linear |= {"_target_": f"{package}.prefix_linear_attention.PrefixLinearAttention", "enc_length": prefix}
        linear |= {"dec_length": 1024, "implementation": "fla_parallel", "feature_name": "taylor_exp"}
    return {
        "model_type": "gpt2",
        "architectures": ["GPTLMHeadModel"],
        "vocab_size": vocabulary,
        "n_positions": 0,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_inner": 2 * hidden,
        "activation_function": "swiglu",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "attn_pdrop": 0,
        "rms_norm": True,
        "residual_in_fp32": True,
        "rotary_emb_fraction": 1,
        "max_position_embeddings": 0,
        "pad_vocab_size_multiple": 8,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "mixer": {"_target_": f"{package}.convolution.BaseConv", "expand_proj": 4, "kernel_sizes": [3], "l_max": 2048},
        "alt_mixer": linear,
        "alt_mixer_2": {
            "_target_": f"{package}.slide_attention.SlidingAttention",
            "window_size": 256,
            "num_heads": heads,
        },
        "alt_mixer_layers": LAYOUTS.get(layers, ([1], [2]))[0],
        "alt_mixer_2_layers": LAYOUTS.get(layers, ([1], [2]))[1],
    }


def random_tensors(layers=4, prefix=True):
    """Weights of a model 32 wide, with 4 heads and a vocabulary of 93, padded to 96."""
    generator = torch.Generator().manual_seed(layers)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.2 + (1.0 if "norm" in name or "ln_f" in name else 0.0)
        for name, shape in shapes(layers, 32, 4, 96, prefix=prefix).items()
    }
    return tensors | {HEAD: tensors[EMBEDDING].clone()}


def save(folder: Path, tensors, layers=4, prefix: int | None = 24, *, binary=False):
    """An official checkpoint: as the training loop wrote it (`binary`), or as it was made safetensors of."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(layers, 32, 4, 93, prefix)))
    if binary:
        tensors = {name.replace(".conv.conv.", ".conv1.conv."): value for name, value in tensors.items()}
        torch.save(
            {f"model.{name}": value for name, value in tensors.items()} | COUNTERS, folder / "pytorch_model.bin"
        )
    else:
        kept = {name: value for name, value in tensors.items() if name != HEAD}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ids_of(length, rows=1):
    return torch.randint(3, 93, (rows, length), generator=torch.Generator().manual_seed(length))


def check_logits(folder, tensors, lengths, prefix=24, **written):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    wide = {name: value.double() for name, value in tensors.items() if name != HEAD}
    for length in lengths:
        ids = ids_of(length)
        with torch.no_grad():
            logits = model(ids).logits[0]
        expected = official_logits(wide, ids[0], 4, prefix, **written)
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("layers, hidden, parameters", [(26, 1024, 356_578_304), (36, 1792, 1_375_143_168)])
def test_the_released_sizes(layers, hidden, parameters):
    """Every name and shape of the released models, without their values."""
    found = {name: shape for name, shape in shapes(layers, hidden).items() if name != HEAD}
    weights = TensorSource({f"model.{name}": torch.empty(shape, device="meta") for name, shape in found.items()})
    raw = config_of(layers, hidden)
    config = CONFIG_MAPPING["gpt2"].from_dict(dict(raw))
    blueprint = jrt_blueprint(SourceCheckpoint(Path(), "released", config, weights, raw_config=raw), Recipe())
    blueprint.check_targets()
    assert sum(target.numel for target in blueprint.targets) == blueprint.plan.full.parameters == parameters
    preset = varidepth.JRTConfig.preset("360m" if layers == 26 else "1.3b").to_dict()
    made = blueprint.model.config.to_dict()
    assert {key for key in preset if made[key] != preset[key]} == {"dtype"}


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("layers", LAYOUTS)
def test_every_value_and_the_function(layers, binary, tmp_path, capsys):
    tensors = random_tensors(layers)
    source = save(tmp_path / "source", tensors, layers, binary=binary)
    result = convert(source, tmp_path / "jrt", max_shard_size="200KB", quiet=True)
    assert main(["convert", str(source), "-o", str(tmp_path / "command"), "--to", "jrt"]) == 0
    plan = capsys.readouterr().out
    assert ("train_metrics.num-tokens.count and 2 more" in plan) is binary and "openai-community/gpt2" in plan
    config = result.config
    for kind, found in zip(("linear_attention", "sliding_attention"), LAYOUTS[layers], strict=True):
        assert [layer for layer, mixer in enumerate(config.layer_types) if mixer == kind] == found
    assert (config.prefix_length, config.sliding_window, config.vocab_size) == (24, 129, 96)
    assert (config.feature_dim, config.conv_kernel_size, config.short_prompt) == (16, 3, "exact")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "jrt", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in official_tensors(model).items():
        assert torch.equal(value.float(), tensors[name]), name
    one_file = load_file(tmp_path / "command" / "model.safetensors")
    assert one_file.keys() == model.state_dict().keys() - {"lm_head.weight"}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in one_file.items())
    check_logits(tmp_path / "jrt", tensors, lengths=(17, 40))


def test_the_window_has_129_keys(tmp_path):
    tensors = random_tensors()
    convert(save(tmp_path / "source", tensors), tmp_path / "jrt", quiet=True)
    check_logits(tmp_path / "jrt", tensors, lengths=(135,))
    with pytest.raises(AssertionError):
        check_logits(tmp_path / "jrt", tensors, lengths=(135,), window=128)


def test_fewer_heads_of_keys_and_values(tmp_path):
    tensors = random_tensors()
    tensors[f"{SLIDING}.Wqkv.weight"] = tensors[f"{SLIDING}.Wqkv.weight"][:64].clone()
    save(tmp_path / "source", tensors)
    edit_json(tmp_path / "source" / "config.json", n_head_kv=2)
    convert(tmp_path / "source", tmp_path / "jrt", quiet=True)
    check_logits(tmp_path / "jrt", tensors, lengths=(30,))


def test_based_is_a_causal_model(tmp_path):
    tensors = random_tensors(prefix=False)
    result = convert(save(tmp_path / "source", tensors, prefix=None), tmp_path / "based", quiet=True)
    assert result.config.prefix_length == 0 and result.plan.backbone == "official Based"
    assert not any("prefix" in name for name in load_file(tmp_path / "based" / "model.safetensors"))
    assert not any("short_prompt" in note for note in result.plan.notes)
    check_logits(tmp_path / "based", tensors, lengths=(30,), prefix=0)
    assert "causal" in (tmp_path / "based" / "README.md").read_text()


@pytest.mark.parametrize("strategy", ["left_pad", "read_twice"])
def test_the_official_padding_of_a_converted_model(strategy, tmp_path):
    tensors = random_tensors()
    fields = {"short_prompt": strategy, "short_prompt_token_id": 5}
    convert(save(tmp_path / "source", tensors), tmp_path / "jrt", quiet=True, **fields)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "jrt").eval()
    prompt, more = ids_of(9), ids_of(3)
    read = torch.cat([prompt, prompt], dim=1) if strategy == "read_twice" else prompt
    padded = torch.cat([torch.full((1, 24 - read.shape[1]), 5), read, more], dim=1)
    kept = torch.arange(24) >= 24 - read.shape[1]
    wide = {name: value.double() for name, value in tensors.items() if name != HEAD}
    expected = official_logits(wide, padded[0], 4, 24, kept=kept)[-4:]
    with torch.no_grad():
        whole = model(torch.cat([prompt, more], dim=1), prefix_length=9).logits[0, -4:].double()
        start = model(prompt, use_cache=True)
        step = model(more, cache=start.cache).logits[0].double()
    stepwise = torch.cat([start.logits[0, -1:].double(), step])
    for logits in (whole, stepwise):
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("missing", [HEAD, EMBEDDING, None], ids=["embedding", "head", "both"])
def test_one_of_the_tied_tensors_is_enough(missing, tmp_path):
    tensors = random_tensors()
    save(tmp_path / "source", tensors)
    kept = {name: value for name, value in tensors.items() if name != missing}
    save_file(kept, tmp_path / "source" / "model.safetensors")
    convert(tmp_path / "source", tmp_path / "jrt", quiet=True)
    weights = load_file(tmp_path / "jrt" / "model.safetensors")
    assert torch.equal(weights["model.embed_tokens.weight"], tensors[EMBEDDING]) and HEAD not in weights


def test_the_result_is_complete(tmp_path):
    source = save(tmp_path / "source", random_tensors())
    pico_tokenizer().save_pretrained(source)
    edit_json(source / "config.json", vocab_size=96)
    (source / "LICENSE").write_text("terms")
    result = convert(source, tmp_path / "jrt", base_model="hazyresearch/JRT-360M-30B", dtype="bfloat16", quiet=True)
    names = {path.name for path in (tmp_path / "jrt").iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "LICENSE",
        "model.safetensors",
        "modeling_jrt.py",
        "README.md",
        "tokenizer.json",
        "varidepth_plan.json",
        "varidepth_recipe.yaml",
    }
    assert json.loads((tmp_path / "jrt" / "generation_config.json").read_text())["eos_token_id"] == 50256
    assert not any("tokenizer" in note for note in result.plan.notes)
    card = ModelCard.load(tmp_path / "jrt" / "README.md")
    assert card.data.base_model == "hazyresearch/JRT-360M-30B" and "jrt" in card.data.tags
    for words in ("2407.05483", 'short_prompt="left_pad"', "fewer than 24 tokens", "transformer.layers.3"):
        assert words in card.content
    assert str(tmp_path) not in card.content
    recipe = tmp_path / "jrt" / "varidepth_recipe.yaml"
    assert "to: jrt" in recipe.read_text()
    convert(source, tmp_path / "again", recipe, quiet=True)
    assert (tmp_path / "jrt" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "jrt", short_prompt="iterate")
    assert model.dtype == torch.bfloat16 and model.config.short_prompt == "iterate"
    AutoTokenizer.from_pretrained(tmp_path / "jrt")


def test_what_config_json_does_not_say_is_as_in_the_released_models(tmp_path):
    tensors = random_tensors()
    raw = config_of(4, 32, 4, 93)
    save(tmp_path / "source", tensors)
    silent = {"mixer": {"expand_proj": 4}, "alt_mixer": None, "alt_mixer_2": {"_target_": "slide"}, "n_inner": None}
    dropped = dict.fromkeys(("rotary_emb_fraction", "rms_norm", "residual_in_fp32", "pad_vocab_size_multiple"))
    edit_json(tmp_path / "source" / "config.json", **silent, **dropped)
    config = convert(tmp_path / "source", None, dry_run=True, quiet=True).config
    assert (config.prefix_length, config.sliding_window, config.feature_dim) == (1024, 129, 16)
    assert (config.intermediate_size, config.residual_in_fp32, config.rms_norm_eps) == (64, True, 1e-5)
    assert raw["n_inner"] == 64


def test_flags_go_before_config_json(tmp_path, capsys):
    save(tmp_path / "source", random_tensors())
    edit_json(tmp_path / "source" / "config.json", alt_mixer_2={"window_size": 8}, layer_norm_epsilon=1e-3)
    arguments = ["convert", str(tmp_path / "source"), "-o", str(tmp_path / "jrt"), "--quiet"]
    assert main([*arguments, "--sliding-window", "7", "--prefix-length", "9", "--short-prompt", "iterate"]) == 0
    config = varidepth.JRTConfig.from_pretrained(tmp_path / "jrt")
    assert (config.sliding_window, config.prefix_length, config.rms_norm_eps) == (7, 9, 1e-3)
    assert config.short_prompt == "iterate"
    assert main([*arguments, "--overwrite"]) == 0
    assert varidepth.JRTConfig.from_pretrained(tmp_path / "jrt").sliding_window == 5
    assert capsys.readouterr() == ("", "")


def test_it_loads_and_generates_where_varidepth_is_not_installed(tmp_path):
    tensors = random_tensors()
    convert(save(tmp_path / "source", tensors), tmp_path / "jrt", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "jrt").eval()
    expected = model.generate(ids_of(30), max_new_tokens=5, do_sample=False)
    torch.save(expected, tmp_path / "expected.pt")
    program = """
import sys
sys.modules["varidepth"] = None
import torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
expected = torch.load(folder + "/expected.pt")
model = AutoModelForCausalLM.from_pretrained(folder + "/jrt", trust_remote_code=True).eval()
assert torch.equal(model.generate(expected[:, :30], max_new_tokens=5, do_sample=False), expected)
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "tensors, config, fields, words",
    [
        ({f"{LINEAR}.decay_proj.weight": (4, 32)}, {}, {}, f"{LINEAR}.decay_proj.weight.*decay"),
        ({f"{LINEAR}.proj_v_enc.weight": None}, {}, {}, f"lack {LINEAR}.proj_v_enc.weight"),
        ({f"{CONV}.in_proj.bias": None}, {}, {}, f"lack {CONV}.in_proj.bias"),
        ({"transformer.ln_f.weight": None}, {}, {}, "lack transformer.ln_f.weight"),
        ({EMBEDDING: None}, {}, {}, f"lack {EMBEDDING}"),
        ({EMBEDDING: (104, 32)}, {}, {}, r"word_embeddings.*\[104, 32\].*\[93, 32\]"),
        ({HEAD: (96, 32)}, {}, {}, "lm_head.weight and .* differ"),
        ({f"{SLIDING}.Wqkv.weight": (64, 32)}, {}, {}, r"Wqkv.weight has shape \[64, 32\].*\[96, 32\]"),
        ({f"{SLIDING}.Wqkv.weight": None}, {}, {}, "of layer 2"),
        ({"model.transformer.ln_f.weight": (32,)}, {}, {}, "model.transformer.ln_f.weight .* the same"),
        ({}, {"n_layer": 6}, {}, "of layer 4, 5"),
        ({}, {"n_layer": 3}, {}, "hold transformer.layers.3"),
        ({}, {"n_embd": 48}, {}, r"\[96, 32\].*\[96, 48\]"),
        ({}, {"n_inner": 128}, {}, r"fc1.weight has shape \[128, 32\].*\[256, 32\]"),
        ({}, {"n_head": 8}, {}, "4 heads .* and 8"),
        ({}, {"n_head": "four"}, {}, "no valid gpt2"),
        ({}, {"vocab_size": -9}, {}, "No model can be built"),
        ({}, {"rotary_emb_base": "ten"}, {}, "No model can be built"),
        (
            {},
            {"n_head": 8, "alt_mixer": {"feature_dim": 16}, "alt_mixer_2": {"window_size": 256}},
            {},
            r"proj_q.weight.*\[64, 32\].*\[128, 32\]",
        ),
        ({}, {}, {"num_attention_heads": 8}, r"proj_q.weight.*\[64, 32\].*\[128, 32\]"),
        ({}, {"activation_function": "geglu"}, {}, "`activation_function` is 'geglu'.*'swiglu'"),
        ({}, {"rotary_emb_fraction": 0.5}, {}, "`rotary_emb_fraction` is 0.5"),
        ({}, {"alt_mixer": {"feature_name": "hedgehog"}}, {}, "'hedgehog'"),
        ({}, {"alt_mixer": {"feature_map": {"_target_": "maps.PerformerFeatureMap"}}}, {}, "Performer"),
        ({}, {"alt_mixer_2": None}, {}, "Layer 2 is attention"),
        ({}, {"alt_mixer_2": {"window_size": "wide"}}, {}, "`window_size` .* is 'wide'"),
        ({}, {"mixer": None, "alt_mixer": None, "alt_mixer_2": None}, {}, "'gpt2' model"),
        ({}, {}, {"to": "mor"}, "`to` is 'mor'.*--to jrt"),
        ({}, {}, {"to": "mod"}, "`to` is 'mod'.*--to jrt"),
        ({}, {}, {"num_recursions": 2}, "`num_recursions` is 2"),
        ({}, {}, {"init": "upper"}, "`init` is 'upper'"),
        ({}, {}, {"seed": 1}, "`seed`"),
        ({}, {}, {"hidden_size": 32}, "`hidden_size` is no field"),
        ({}, {}, {"prefix_length": 0}, "proj_k_enc.weight"),
        ({}, {}, {"short_prompt": "left_pad"}, "`short_prompt_token_id`"),
        ({}, {}, {"sliding_window": 1}, "`sliding_window` is 1"),
        ({}, {}, {"sliding_window": "wide"}, "`sliding_window` is 'wide'"),
    ],
)
def test_refusals(tensors, config, fields, words, tmp_path):
    held = {name: value for name, value in random_tensors().items() if name != HEAD}
    save(tmp_path / "source", held)
    for name, shape in tensors.items():
        if shape is None:
            held.pop(name)
        else:
            held[name] = torch.ones(shape)
    save_file(held, tmp_path / "source" / "model.safetensors")
    edit_json(tmp_path / "source" / "config.json", **config)
    with pytest.raises(ConversionError, match=words) as caught:
        convert(tmp_path / "source", tmp_path / "jrt", quiet=True, **fields)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "command, words",
    [
        (["convert", "vanilla", "-o", "out", "--to", "jrt"], "no attention model"),
        (["convert", "vanilla", "-o", "out", "--sliding-window", "9"], "--to jrt"),
        (["convert", "jrt", "-o", "out"], "JRT-RNN of this package"),
        (["convert", "jrt", "-o", "out", "--to", "mod"], "JRT-RNN of this package"),
        (["unroll", "jrt", "-o", "out"], "JRT-RNN of this package"),
        (["unroll", "official", "-o", "out"], "`varidepth convert`"),
        (["inspect", "official"], "`varidepth convert`"),
        (["depth-map", "jrt", "w1 w2"], "same depth"),
        (["calibrate", "jrt", "text.txt"], "expert_choice"),
        (["perplexity", "jrt", "text.txt"], "prefix_length"),
        (["perplexity", "jrt", "text.txt", "--compute", "0.5"], "`compute` is 0.5"),
    ],
)
def test_commands_answer_in_one_sentence(command, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_pico(tmp_path / "vanilla")
    save(tmp_path / "official", random_tensors())
    pico_tokenizer().save_pretrained(tmp_path / "official")
    edit_json(tmp_path / "official" / "config.json", vocab_size=96)
    convert("official", "jrt", quiet=True)
    Path("text.txt").write_text("w1 w2 w3 w4 w5 " * 60)
    capsys.readouterr()
    assert main(command) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not Path("out").exists()


def test_perplexity_behind_the_prefix(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "official", random_tensors())
    pico_tokenizer().save_pretrained(tmp_path / "official")
    edit_json(tmp_path / "official" / "config.json", vocab_size=96)
    convert("official", "jrt", quiet=True)
    Path("text.txt").write_text("w1 w2 w3 w4 w5 " * 20)
    assert main(["perplexity", "jrt", "text.txt", "--prefix-length", "24", "--window", "50"]) == 0
    assert "nats per token" in capsys.readouterr().out


def test_inspect(tmp_path, capsys):
    tensors = random_tensors(26)
    convert(save(tmp_path / "source", tensors, 26), tmp_path / "jrt", quiet=True)
    assert main(["inspect", str(tmp_path / "jrt")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in ("prefix_length 24", "linear_attention 1, 6, 11, 16, 21", "conv 0, 3-5", "state bytes per sequence"):
        assert words in out
    assert main(["inspect", str(tmp_path / "jrt"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    parameters = sum(value.numel() for value in tensors.values()) - tensors[HEAD].numel()
    assert content["stored_parameters"] == content["full"]["parameters"] == parameters
    assert content["full"]["non_embedding"] == parameters - tensors[EMBEDDING].numel()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "jrt")
    assert content["full"]["state_bytes"] == state_bytes(model.config).total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fields", [{}, {"feature_map": "softmax"}, {"prefix_length": 0, "conv_kernel_size": 4}])
def test_the_state_has_the_predicted_size(fields, dtype):
    small = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}
    small |= {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 9, "prefix_length": 7}
    config = varidepth.JRTConfig(**{**small, **fields})
    model = varidepth.JRTForCausalLM(config).to(dtype).eval()
    predicted = state_bytes(config, dtype.itemsize)
    for length in (12, 40):
        with torch.no_grad():
            cache = model(ids_of(length), use_cache=True).cache
        found = dict.fromkeys(("linear_attention", "sliding_attention", "conv"), 0)
        for layer, kind in zip(cache.layers, config.layer_types, strict=True):
            held = {
                "linear_attention": lambda layer: [layer.state],
                "sliding_attention": lambda layer: [layer.keys, layer.values],
                "conv": lambda layer: [layer.conv_states[0]],
            }[kind](layer)
            found[kind] += sum(tensor.numel() * tensor.element_size() for tensor in held)
        assert found == {kind: getattr(predicted, kind) for kind in found}
    assert predicted.total == sum(found.values())


def test_the_state_of_the_released_sizes():
    """Elements of section 4.4 of the paper's code with 153 features for 273: 5, 5 and 16 layers."""
    small = state_bytes(varidepth.JRTConfig.preset("360m"))
    assert small.linear_attention == 4 * 5 * 16 * 65 * 153
    assert small.sliding_attention == 4 * 5 * 2 * 128 * 1024
    assert small.conv == 4 * 16 * 2 * 1024 * 3
    assert state_bytes(varidepth.JRTConfig.preset("1.3b")).linear_attention == 4 * 7 * 16 * 113 * 153


def test_the_written_out_leak_gives_a_pad_the_weight_one():
    """By hand: one head, one feature of zero, so that every weight is 1."""
    mixer = {f"proj_{name}.weight": torch.zeros(1, 2).double() for name in ("q", "k", "k_enc")}
    mixer |= {f"{name}.weight": torch.eye(2).double() for name in ("proj_v", "proj_v_enc", "out_proj")}
    x = torch.tensor([[9.0, 0.0], [1.0, 1.0]]).double()
    kept = torch.tensor([False, True])
    out = written_out_jrt.prefix_attention(x, mixer, 1, 2, kept)
    assert torch.allclose(out[1], (2 * x[0] + 2 * x[1]) / 4)
