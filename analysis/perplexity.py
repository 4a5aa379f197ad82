"""Held-out loss of a causal language model, vanilla or routed, in nats per token and per byte."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from .unseen_targets import evaluating, first_scored, row_logits


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


def document_tokens(tokenizer: Any, text: str) -> tuple[list[int], int]:
    """Tokens of a document behind a start token, and how many bytes they predict; nothing for a blank text."""
    if not text.strip():
        return [], 0
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = len(text.encode("utf-8", errors="replace"))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is not None:
        return [start, *tokens], size
    # nothing predicts the first token, so its bytes do not count
    first = len(tokenizer.decode(tokens[:1]).encode()) if tokens else 0
    return tokens, size - first


def _windows(tokens: list[int], size: int) -> list[list[int]]:
    """Cuts a document so that every token but the first is predicted once; each window re-reads one token."""
    return [tokens[start : start + size] for start in range(0, len(tokens) - 1, size - 1)]


@dataclass(frozen=True)
class WindowLoss:
    """Loss of the tokens of one window.

    Attributes:
        document: number of the document that the window was cut from.
        tokens: token ids of the window.
        nats: negative log-likelihood of its last tokens, those that were scored, as `torch.FloatTensor`.
    """

    document: int
    tokens: list[int]
    nats: torch.Tensor


def window_losses(
    model: Any,
    documents: Sequence[list[int]],
    *,
    window: int = 512,
    batch_size: int = 4,
    max_tokens: int | None = None,
    prefix_length: int | None = None,
    progress: bool = False,
) -> Iterator[WindowLoss]:
    """Loss token by token, window by window: what `held_out_loss` adds up, with its arguments and errors.

    Args:
        documents (sequence of token ids): from `document_tokens`.
    """
    if window < 2:
        raise ValueError(f"`window` is {window}, but a window must hold at least 2 tokens; the default is 512.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}, but must be at least 1.")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"`max_tokens` is {max_tokens}, but must be at least 1; leave it out to read everything.")
    first = first_scored(model, prefix_length)
    cut = [(number, one) for number, tokens in enumerate(documents) for one in _windows(tokens, window)]
    scored = [(number, one) for number, one in cut if len(one) > first]
    if cut and not scored:
        raise ValueError(
            f"The text has no token behind a prefix of {prefix_length} tokens (windows of {window}, the longest with "
            f"{max(len(one) for _, one in cut)}); give a smaller `prefix_length`, larger windows or longer documents."
        )
    if not scored:
        raise ValueError(
            f"The text is empty ({len(documents)} documents without a token to predict); give a text with some words."
        )
    read = 0
    with evaluating(model):
        steps = range(0, len(scored), batch_size)
        for start in tqdm(steps, desc="held-out loss", unit="batch", disable=not progress):
            batch = scored[start : start + batch_size]
            logits = row_logits(model, [one for _, one in batch], prefix_length)
            for (number, one), scores in zip(batch, logits, strict=True):
                targets = torch.tensor(one[first:], device=scores.device)
                nats = torch.nn.functional.cross_entropy(scores[first - 1 : -1].float(), targets, reduction="none")
                yield WindowLoss(number, one, nats)
                read += len(nats)
            if max_tokens is not None and read >= max_tokens:
                break


def held_out_loss(
    model: Any,
    tokenizer: Any,
    documents: str | Iterable[str],
    *,
    window: int = 512,
    batch_size: int = 4,
    max_tokens: int | None = None,
    prefix_length: int | None = None,
    progress: bool = False,
) -> HeldOutLoss:
    """Mean loss of `model` on text it has not seen.

    Each document starts with the tokenizer's BOS token (or EOS, if it has no BOS) and is cut into windows of `window`
    tokens; windows never cross documents and every token is predicted exactly once, by the tokens before it in its
    window. Pads are masked and do not count. The loss is computed in fp32.

    A model that reads a prefix (`config.prefix_length` above 0) sees every token of it at once, so of each window only
    the tokens behind the first `prefix_length` are scored. For a causal model `prefix_length` scores the same tokens,
    which makes the two comparable.

    Args:
        model (`PreTrainedModel`): a causal language model, or one that reads a prefix; it is put into eval mode for
            the call.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        documents (`str` or an iterable of `str`): one document, or several.
        window (`int`): tokens per window, at least 2.
        batch_size (`int`): windows per forward pass.
        max_tokens (`int`, *optional*): stop once this many tokens were predicted (at the end of a batch).
        prefix_length (`int`, *optional*): tokens at the start of each window that are read and not scored; a model
            that reads a prefix needs it.
        progress (`bool`): show a progress bar.

    Raises:
        ValueError: for a text without a token to predict, a window or batch size out of range, or a model that reads a
            prefix without `prefix_length`.
    """
    texts = [documents] if isinstance(documents, str) else list(documents)
    read = [document_tokens(tokenizer, text) for text in texts]
    nats, scored = 0.0, [0] * len(texts)
    for one in window_losses(
        model,
        [tokens for tokens, _ in read],
        window=window,
        batch_size=batch_size,
        max_tokens=max_tokens,
        prefix_length=prefix_length,
        progress=progress,
    ):
        nats += float(one.nats.sum())
        scored[one.document] += len(one.nats)
    # a document of which not every token was scored counts its bytes in proportion
    size = sum(size * seen / (len(tokens) - 1) for (tokens, size), seen in zip(read, scored, strict=True) if seen)
    return HeldOutLoss(nats, sum(scored), round(size), sum(1 for seen in scored if seen))


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
