"""The training objective of JRT-RNN: next tokens behind the prefix, masked tokens inside it (paper, section 4.2)."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .prefix_tokens import Prefix, find_prefix


logger = logging.get_logger(__name__)

IGNORED = -100


def prefix_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    input_ids: torch.Tensor | None,
    prefix: Prefix | None,
    mask_token_id: int | None,
    mlm_loss_weight: float,
    num_items_in_batch: int | torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean loss of next tokens + `mlm_loss_weight` times that of masked tokens.

    A label stands at the token that it names, as everywhere in transformers. Behind the prefix it is predicted from
    the position before; in the prefix from its own position, and only where the input is the mask token instead. Other
    labels up to the end of the prefix are not read: the prefix has seen their tokens.

    Args:
        logits (`torch.Tensor` of shape `(batch, tokens, vocab_size)`)
        labels (`torch.LongTensor` of shape `(batch, tokens)`): token ids; -100 where there is nothing to learn.
        input_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): without them no masked token is known.
        prefix: of each row; `None` for a causal model.
        mask_token_id, mlm_loss_weight: as in `JRTConfig`.
        num_items_in_batch:
            Labels of the whole batch, of which this call is one part; its loss then counts by its share of them. Parts
            with equally many labels of each kind add up to the loss of the batch; otherwise the tokens of a part with
            fewer of a kind weigh more, as each part has its own two means.
        shift_labels (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
            Labels of next tokens that were shifted before a row was divided; `labels` then only serve masked tokens.

    Raises:
        ValueError: if there are labels, but none that may be read.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    given = shift_labels.ne(IGNORED).sum()
    next_labels = _behind(shift_labels, prefix)
    loss = _mean_loss(logits.flatten(0, 1), next_labels.flatten())
    hidden = masked = torch.zeros_like(labels, dtype=torch.bool)
    if prefix is not None and input_ids is not None:
        hidden = prefix.mask & labels.ne(IGNORED) & labels.ne(input_ids)
        if mask_token_id is not None:
            masked = hidden & input_ids.eq(mask_token_id)
            loss = loss + mlm_loss_weight * _mean_loss(logits[masked], labels[masked])
    if not torch.compiler.is_compiling():
        _check_read(given, next_labels.ne(IGNORED), hidden, masked, mask_token_id)
    if num_items_in_batch is None:
        return loss
    return loss * (given / torch.as_tensor(num_items_in_batch).clamp(min=1))


def _check_read(
    given: torch.Tensor, read: torch.Tensor, hidden: torch.Tensor, masked: torch.Tensor, mask_token_id: int | None
) -> None:
    """Raises a `ValueError` if a batch has labels to no effect."""
    if bool(hidden.any()) and not bool(masked.any()):
        logger.warning_once(
            "labels in the prefix name tokens that the input hides behind another than the mask token of the model "
            f"(`config.mask_token_id` is {mask_token_id}), so they are not read; give the model and the collator the "
            "same."
        )
    if bool(given) and not bool(read.any() | masked.any()):
        raise ValueError(
            "every label lies in the prefix, which has seen its token, so there is no loss to read; pass a shorter "
            "`prefix_length` (the prompt's), longer rows, or inputs with mask tokens (`JRTCollator`)."
        )


def _behind(shift_labels: torch.Tensor, prefix: Prefix | None) -> torch.Tensor:
    """The labels of next tokens that lie behind the last token of their row's prefix."""
    if prefix is None:
        return shift_labels
    seen = prefix.mask.flip(1).cummax(dim=1).values.flip(1)
    return shift_labels.masked_fill(F.pad(seen[:, 1:], (0, 1), value=False), IGNORED)


def _mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Zero, with a gradient of zero, where nothing is labelled."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / labels.ne(IGNORED).sum().clamp(min=1)


def read_prompt_first(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook before `forward`, for trainers that replace it and make the loss of all labels themselves.

    TRL asks its own `forward` for log-probabilities with `fused_lm_head=True`. The prefix is then the prompt, as in
    generation: the tokens before the first label, at most `config.prefix_length`.

    Raises:
        ValueError: if there is no prompt, a given prefix has seen a label's token, or the loss is made of logits that
            were computed without labels.
    """
    labels, longest = kwargs.get("labels"), model.config.prefix_length
    given = {name: kwargs[name] for name in ("prefix_length", "encoder_mask") if kwargs.get(name) is not None}
    if not kwargs.get("fused_lm_head") or labels is None or not longest:
        if not torch.compiler.is_compiling():
            blind = model.training and torch.is_grad_enabled() and labels is None and not given
            model.__dict__["_read_without_labels"] = blind
        return None
    if model.__dict__.pop("_read_without_labels", False):
        raise ValueError(
            "the trainer makes its loss of logits that were computed without labels, so that the prefix may have seen "
            "their tokens; leave `label_smoothing_factor` and `compute_loss_func` out."
        )
    mask = kwargs.get("attention_mask")
    learned = labels.ne(IGNORED)
    if given:
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if bool((shift_labels != _behind(shift_labels, find_prefix(labels, mask, **given))).any()):
            raise ValueError(
                "the trainer makes the loss of all labels itself, but some lie in the prefix, which has seen their "
                "tokens; give a prefix that ends before the first label, as `JRTCollator(mask_token_id=None, "
                "prefix_length='prompt')` does, or use `Trainer`."
            )
        return None
    prompt = learned.cumsum(dim=1).eq(0)
    if mask is not None:
        prompt = prompt & mask.bool()
    lengths = prompt.sum(dim=1)
    if not torch.compiler.is_compiling() and bool((learned.any(dim=1) & lengths.eq(0)).any()):
        raise ValueError(
            "a row is learned from its first token on, so that it has no prompt which could be the prefix; give rows "
            "of `prompt` and `completion`, or use `Trainer` with `JRTCollator` for plain text."
        )
    return args, {**kwargs, "prefix_length": lengths.clamp(max=longest)}
