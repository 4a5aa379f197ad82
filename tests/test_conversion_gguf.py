"""A GGUF file as the source: transformers reads it, the result is a plain checkpoint."""

import json

import numpy
import pytest
import torch
from pico_checkpoints import VOCABULARY, repeated_vanilla, save_pico, some_ids, unrolled_sources
from transformers import AutoModelForCausalLM, AutoTokenizer

from varidepth.cli.checkpoint_loading import load_teacher
from varidepth.conversion.convert import convert


gguf = pytest.importorskip("gguf", reason="reading GGUF files needs the gguf package")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path, folder):
    """A llama checkpoint as a GGUF file of F32 tensors with a byte-level BPE tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    letters = [chr(ord("!") + i) for i in range(VOCABULARY - 4)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "ab"])
    writer.add_token_types([3, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", array)
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", array)
        elif name.startswith("model.layers."):
            _, _, layer, part = name.split(".", 3)
            if part.startswith(("self_attn.q_proj", "self_attn.k_proj")):
                heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
                array = interleaved(array, heads)
            writer.add_tensor(f"blk.{layer}.{NAMES[part.removesuffix('.weight')]}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(array: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Rows in the order of GGUF, which rotates neighbouring pairs instead of halves."""
    rows, columns = array.shape
    return numpy.ascontiguousarray(array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)).reshape(
        rows, columns
    )


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_gguf_file_converts_like_the_checkpoint_it_was_made_of(as_folder, tmp_path):
    source = save_pico(tmp_path / "source", "llama")
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "pico.gguf"
    write_gguf(path, source)
    result = convert(path.parent if as_folder else path, tmp_path / "mor", num_recursions=2, quiet=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mor").eval()
    vanilla = repeated_vanilla(source, unrolled_sources(result.plan))
    with torch.no_grad():
        assert torch.equal(model(some_ids()).logits, vanilla(some_ids()).logits)
    config = json.loads((tmp_path / "mor" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert AutoTokenizer.from_pretrained(tmp_path / "mor")("abc").input_ids == [95, 69]
    assert any("GGUF" in note for note in result.plan.notes)


@pytest.mark.parametrize("kind", ["file", "folder of one file", "checkpoint"])
def test_a_teacher_is_loaded_from_whatever_converts(kind, tmp_path):
    source = save_pico(tmp_path / "source", "llama")
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "pico.gguf"
    write_gguf(path, source)
    teacher = load_teacher({"file": path, "folder of one file": path.parent, "checkpoint": source}[kind])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(some_ids()).logits
        torch.testing.assert_close(teacher(some_ids()).logits, expected, rtol=1e-5, atol=1e-5)
    assert not teacher.training
