"""Held-out loss of a causal language model, vanilla or routed, in nats per token and per byte."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss over a text.

    Attributes:
        nats: summed negative log-likelihood.
        tokens: tokens that were predicted.
        bytes: UTF-8 bytes of the text that was predicted.
        documents: documents with at least one predicted token.
    """

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def nats_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / self.bytes

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


@dataclass(frozen=True)
class RoutingGap:
    """What it costs that the routers cannot see the future.

    Attributes:
        topk: loss when in every window the tokens of highest score enter, as in training.
        causal: loss by the model's own rule.
    """

    topk: HeldOutLoss
    causal: HeldOutLoss

    @property
    def nats_per_token(self) -> float:
        """loss(top-k) - loss(causal): below zero by what the causal rule loses."""
        return self.topk.nats_per_token - self.causal.nats_per_token


def _windows(tokens: list[int], size: int) -> list[list[int]]:
    """Cuts a document so that every token but the first is predicted once; each window re-reads one token."""
    return [tokens[start : start + size] for start in range(0, len(tokens) - 1, size - 1)]


def _document_tokens(tokenizer: Any, text: str) -> tuple[list[int], int]:
    """Tokens of a document behind a start token, and the bytes that are predicted."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = len(text.encode("utf-8", errors="replace"))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is not None:
        return [start, *tokens], size
    # nothing predicts the first token, so its bytes do not count
    first = len(tokenizer.decode(tokens[:1]).encode()) if tokens else 0
    return tokens, size - first


def held_out_loss(
    model: Any,
    tokenizer: Any,
    documents: str | Iterable[str],
    *,
    window: int = 512,
    batch_size: int = 4,
    max_tokens: int | None = None,
    progress: bool = False,
) -> HeldOutLoss:
    """Mean loss of `model` on text it has not seen.

    Each document starts with the tokenizer's BOS token (or EOS, if it has no BOS) and is cut into windows of `window`
    tokens; windows never cross documents and every token is predicted exactly once, by the tokens before it in its
    window. Pads are masked and do not count. The loss is computed in fp32.

    Args:
        model (`PreTrainedModel`): a causal language model; it is put into eval mode for the call.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        documents (`str` or an iterable of `str`): one document, or several.
        window (`int`): tokens per window, at least 2.
        batch_size (`int`): windows per forward pass.
        max_tokens (`int`, *optional*): stop once this many tokens were predicted (at the end of a batch).
        progress (`bool`): show a progress bar.

    Raises:
        ValueError: for a text without a token to predict, or a window or batch size out of range.
    """
    if window < 2:
        raise ValueError(f"`window` is {window}, but a window must hold at least 2 tokens; the default is 512.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}, but must be at least 1.")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"`max_tokens` is {max_tokens}, but must be at least 1; leave it out to read everything.")
    texts = [documents] if isinstance(documents, str) else list(documents)
    windows: list[tuple[int, list[int]]] = []
    sizes: list[tuple[int, int]] = []
    for index, text in enumerate(texts):
        tokens, size = _document_tokens(tokenizer, text) if text.strip() else ([], 0)
        sizes.append((size, len(tokens) - 1))
        windows += [(index, one) for one in _windows(tokens, window)]
    if not windows:
        raise ValueError(
            f"The text is empty ({len(texts)} documents without a token to predict); give a text with some words."
        )
    nats, predicted = 0.0, [0] * len(texts)
    was_training = model.training
    model.eval()
    try:
        steps = range(0, len(windows), batch_size)
        for start in tqdm(steps, desc="held-out loss", unit="batch", disable=not progress):
            batch = windows[start : start + batch_size]
            nats += _batch_nats(model, tokenizer, [one for _, one in batch])
            for index, one in batch:
                predicted[index] += len(one) - 1
            if max_tokens is not None and sum(predicted) >= max_tokens:
                break
    finally:
        model.train(was_training)
    # a document that was not read to its end counts its bytes in proportion
    read = sum(size * seen / total for (size, total), seen in zip(sizes, predicted, strict=True) if seen)
    return HeldOutLoss(nats, sum(predicted), round(read), sum(1 for seen in predicted if seen))


def routing_gap(model: Any, tokenizer: Any, documents: str | Iterable[str], **options: Any) -> RoutingGap:
    """The held-out loss under top-k and under the model's causal rule (MoD paper, section 4.2), on the same windows.

    Args:
        model (`PreTrainedModel`): a routed causal language model with routing="expert_choice".
        tokenizer, documents, options: as in `held_out_loss`.

    Raises:
        ValueError: for a model of another routing, one whose rule is "topk" itself, and as `held_out_loss`.
    """
    config = model.config
    if getattr(config, "routing", None) != "expert_choice" or config.inference_rule == "topk":
        given = {
            "routing": getattr(config, "routing", None),
            "inference_rule": getattr(config, "inference_rule", None),
        }
        raise ValueError(
            f"The model has {given}, but the gap is between top-k and a causal rule of routing='expert_choice'; give "
            "such a model, or use `held_out_loss`."
        )
    texts = [documents] if isinstance(documents, str) else list(documents)
    rule = config.inference_rule
    causal = held_out_loss(model, tokenizer, texts, **options)
    try:
        config.inference_rule = "topk"
        return RoutingGap(held_out_loss(model, tokenizer, texts, **options), causal)
    finally:
        config.inference_rule = rule


@torch.no_grad()
def _batch_nats(model: Any, tokenizer: Any, windows: list[list[int]]) -> float:
    """Summed negative log-likelihood of one right-padded batch."""
    longest = max(len(one) for one in windows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(windows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(windows):
        ids[row, : len(one)] = torch.tensor(one)
        mask[row, : len(one)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    padding = {} if bool(mask.all()) else {"attention_mask": mask}
    logits = model(input_ids=ids, use_cache=False, **padding).logits
    nats = 0.0
    for row, one in enumerate(windows):
        scores = logits[row, : len(one) - 1].float()
        targets = ids[row, 1 : len(one)]
        nats += float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))
    return nats
