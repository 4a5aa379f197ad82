"""Text that a model writes by itself.

What a text does not show, a student forgets first; what its teacher says unasked shows what the teacher knows.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..modeling.cache_naming import CACHE


@torch.no_grad()
def sample_rows(
    model: PreTrainedModel,
    rows: int,
    seq_len: int,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> torch.Tensor:
    """Rows drawn from a model's own distribution, each behind a first token that is drawn evenly from the vocabulary.

    So LLM-QAT (arXiv 2305.17888) makes the text for a distillation without data.

    Args:
        model (`PreTrainedModel`): a causal language model with a cache.
        rows, seq_len: how many, and tokens of each.
        vocab_size: first tokens are below it; by default the model's.
        seed: the same gives the same rows, on the same machine.
        batch_size: rows that are written side by side.

    Returns:
        `torch.LongTensor` of shape `(rows, seq_len)`, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size = vocab_size or model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    written = []
    try:
        for count in (min(batch_size, rows - done) for done in range(0, rows, batch_size)):
            written.append([torch.randint(vocab_size, (count, 1), generator=generator)])
            cache = None
            for _ in range(seq_len - 1):
                outputs = model(written[-1][-1].to(model.device), use_cache=True, **{CACHE: cache})
                cache = outputs[CACHE]
                # by the inverse of the cumulative distribution: torch.multinomial took a fifth of the time of a step
                below = outputs.logits[:, -1].softmax(-1, dtype=torch.float32).cumsum(-1)
                drawn = torch.rand(count, 1, generator=generator).to(below.device) * below[:, -1:]
                written[-1].append(torch.searchsorted(below, drawn, right=True).clamp(max=below.shape[1] - 1).cpu())
    finally:
        model.train(was_training)
    return torch.cat([torch.cat(row, dim=1) for row in written]) if rows else torch.empty(0, seq_len, dtype=torch.long)
