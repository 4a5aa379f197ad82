"""Tiny vanilla checkpoints, and the reference for a converted one: the vanilla model with its layers repeated."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


VOCABULARY = 96
FAMILY_FIELDS = {
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # the second layer has a dense MLP
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
}
WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]


def pico_config(family: str = "llama", layers: int = 6, **fields):
    """Hidden 32, a vocabulary of 96; gemma2 alternates windows of 8 with full attention."""
    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    small |= FAMILY_FIELDS.get(family, {})
    return CONFIG_MAPPING[family](**{**small, **fields})


def save_pico(
    folder: Path, family: str = "llama", layers: int = 6, *, dtype=torch.float32, shard="5GB", tokenizer=True, **fields
) -> Path:
    """A vanilla checkpoint with random weights; norms are not at one, so that nothing is equal by chance."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(pico_config(family, layers, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    if tokenizer:
        pico_tokenizer().save_pretrained(folder)
    return folder


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 96 words."""
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def repeated_vanilla(folder: Path, layers_used: list[list[int]], **load):
    """The vanilla model of `folder` with the given source layers, averaged where there are several."""
    source = AutoModelForCausalLM.from_pretrained(folder, **load)
    config = source.config.to_dict() | {"num_hidden_layers": len(layers_used)}
    for field in ("layer_types", "no_rope_layers"):
        if config.get(field):
            config[field] = [config[field][group[0]] for group in layers_used]
    config = CONFIG_MAPPING[source.config.model_type].from_dict(config)
    config._attn_implementation = source.config._attn_implementation
    model = AutoModelForCausalLM.from_config(config, dtype=source.dtype)
    state = source.state_dict()
    new = {name: value for name, value in state.items() if ".layers." not in name}
    for i, group in enumerate(layers_used):
        prefix = f"model.layers.{group[0]}."
        for name in [name for name in state if name.startswith(prefix)]:
            part = name.removeprefix(prefix)
            values = torch.stack([state[f"model.layers.{j}.{part}"].float() for j in group])
            new[f"model.layers.{i}.{part}"] = values.sum(0).div(len(group)).to(state[name].dtype)
    model.load_state_dict(new)
    return model.eval()


def unrolled_sources(plan) -> list[list[int]]:
    """Source layers of every unrolled layer of a plan, for `repeated_vanilla`."""
    depth = max(i for layer in plan.layers for i in layer.positions) + 1
    return [list(next(layer.sources for layer in plan.layers if i in layer.positions)) for i in range(depth)]


def some_ids(rows: int = 2, length: int = 20) -> torch.Tensor:
    """Token ids without special tokens, of shape (rows, length)."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def edit_json(path: Path, **values) -> None:
    """Sets keys of a JSON file; `None` removes a key."""
    content = json.loads(path.read_text())
    content |= values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
