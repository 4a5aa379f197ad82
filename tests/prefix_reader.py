"""Models that read a prefix, to score: one that cheats inside of it, and a tiny JRT-RNN.

The cheat is certain of the next token inside the prefix, and a bigram model behind it.
"""

from types import SimpleNamespace

import torch

from varidepth import JRTConfig, JRTForCausalLM


class PrefixReader(torch.nn.Module):
    """The contract of a model that reads a prefix, with `config.prefix_length`; 0 makes it the causal bigram model.

    Args:
        vocabulary: number of token ids.
        prefix_length: prefix of a call that names none, of every row at most its valid tokens.
    """

    def __init__(self, vocabulary: int, prefix_length: int):
        super().__init__()
        self.config = SimpleNamespace(prefix_length=prefix_length)
        self.register_buffer(
            "bigrams", torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(5))
        )
        self.seen_prefixes: list[list[int]] = []

    @property
    def device(self) -> torch.device:
        return self.bigrams.device

    def forward(self, input_ids, attention_mask=None, prefix_length=None, use_cache=None):
        assert self.config.prefix_length > 0 or prefix_length is None, "a causal model knows no such argument"
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        wanted = self.config.prefix_length if prefix_length is None else prefix_length
        prefix = torch.minimum(torch.as_tensor(wanted).expand(len(input_ids)), mask.sum(1))
        self.seen_prefixes += [prefix.tolist()]
        logits = self.bigrams[input_ids].clone()
        for row, length in enumerate(prefix.tolist()):
            for place in range(length - 1):
                logits[row, place, input_ids[row, place + 1]] = 1e4
        return SimpleNamespace(logits=logits)

    def nats(self, tokens: list[int], first: int) -> float:
        """What tokens `first` and later cost without cheating."""
        log_probs = self.bigrams.log_softmax(-1)
        return -sum(float(log_probs[tokens[i - 1], tokens[i]]) for i in range(first, len(tokens)))


def tiny_jrt(vocabulary: int, prefix_length: int) -> JRTForCausalLM:
    """Random weights, every kind of layer."""
    torch.manual_seed(2)
    config = JRTConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        layer_types=["conv", "linear_attention", "sliding_attention", "linear_attention"],
        feature_dim=4,
        sliding_window=5,
        prefix_length=prefix_length,
        mask_token_id=None,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.5,
    )
    return JRTForCausalLM(config).eval()


@torch.no_grad()
def token_nats(model: JRTForCausalLM, tokens: list[int], first: int, prefix_length: int) -> float:
    """What tokens `first` and later cost, each in a pass of its own that ends before it."""
    nats = 0.0
    for place in range(first, len(tokens)):
        logits = model(torch.tensor([tokens[:place]]), prefix_length=prefix_length).logits[0, -1]
        nats -= float(logits.log_softmax(-1)[tokens[place]])
    return nats
