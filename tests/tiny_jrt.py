"""A tiny random JRT-RNN, whose weights are far enough from zero that every token it sees tells in its logits."""

import torch

from varidepth import JRTConfig, JRTForCausalLM


VOCABULARY = 61
MASK = 60
PREFIX = 6
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    # what the second reads of a token, the first has read elsewhere
    "layer_types": ["linear_attention", "sliding_attention", "conv", "linear_attention"],
    "feature_dim": 4,
    "sliding_window": 5,
    "prefix_length": PREFIX,
    "mask_token_id": MASK,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_jrt(*, attention: str = "sdpa", seed: int = 0, **fields) -> JRTForCausalLM:
    """In eval mode."""
    torch.manual_seed(seed)
    return JRTForCausalLM._from_config(JRTConfig(**{**SIZES, **fields}), attn_implementation=attention).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random tokens that are not special."""
    return torch.randint(3, MASK, shape, generator=torch.Generator().manual_seed(seed))
