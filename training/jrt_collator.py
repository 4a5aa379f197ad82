"""Training batches of JRT-RNN: masked tokens in the prefix, next tokens behind it (arXiv 2407.05483, section 4.2)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from ..configuration.config_basics import check_choice
from ..configuration.configuration_jrt import JRTConfig
from ..modeling.prefix_loss import IGNORED


logger = logging.get_logger(__name__)
PROMPT = "prompt"
# what tells the prompt of an example
_MARKS = ("labels", "completion_mask")


@dataclass
class JRTCollator:
    """Pads examples and masks tokens of their prefixes, for `Trainer(data_collator=...)`.

    A row's prefix is its first `prefix_length` tokens, pads not counted. Each of them is replaced by the mask token
    with probability `mlm_probability`, drawn afresh in every call, and labelled with the original token; the others in
    the prefix are not labelled. Behind it every token is. Labels stand at the tokens that they name, as everywhere in
    transformers; the official code shifts them itself, and has none for the first token behind the prefix.

    An example is a mapping with `input_ids`, and optionally `attention_mask`, `prefix_length`, `labels` (-100 where
    nothing is learned behind the prefix; `input_ids` by default) and `completion_mask` (0 likewise), each a list or
    tensor of one entry per token.

    Args:
        mask_token_id:
            The model's `config.mask_token_id`; `None` masks nothing and trains next tokens behind the prefix only.
        prefix_length:
            Tokens, where the example does not say itself; a shorter row is all prefix, and learns masked tokens only.
            Or `"prompt"`: the tokens before the first one that is learned by the example's `labels` or
            `completion_mask`.
        mlm_probability: how often a token of the prefix is masked.
        unmasked_token_ids: tokens that are never masked, such as `tokenizer.all_special_ids`.
        pad_token_id: any id will do, as `attention_mask` tells pads.
        padding_side: `right` or `left`.
        pad_to_multiple_of: of the row length.
        seed:
            Draw the masks of a batch from this number and its tokens. A batch that comes again is then masked as
            before: in evaluation, or when training is resumed. Shuffled epochs have other batches, so other masks.

    Raises:
        ValueError: for arguments out of range, and for examples that do not fit them.
    """

    mask_token_id: int | None
    prefix_length: int | str | None = None
    mlm_probability: float = 0.15
    unmasked_token_ids: Sequence[int] = ()
    pad_token_id: int = 0
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_choice("padding_side", self.padding_side, ("right", "left"))
        if not 0.0 <= self.mlm_probability <= 1.0:
            raise ValueError(f"mlm_probability={self.mlm_probability} is no probability: give a number from 0 to 1.")
        if isinstance(self.prefix_length, str):
            check_choice("prefix_length", self.prefix_length, (PROMPT,))
        elif self.prefix_length is not None and self.prefix_length < 0:
            raise ValueError(f"prefix_length={self.prefix_length} counts tokens: give at least 0, or {PROMPT!r}.")

    @classmethod
    def from_model_config(cls, config: JRTConfig, **fields: Any) -> JRTCollator:
        """The collator with the mask token, pad token and prefix length of a model; `fields` go before its own.

        Raises:
            ValueError: if the model has no mask token.
        """
        if config.mask_token_id is None and "mask_token_id" not in fields:
            raise ValueError(
                "config.mask_token_id is None, so no token can be masked: set it to a token that is not in the text, "
                "or pass mask_token_id=None to train next tokens only."
            )
        own = {
            "mask_token_id": config.mask_token_id,
            "prefix_length": config.prefix_length,
            "pad_token_id": config.pad_token_id or 0,
        }
        return cls(**{**own, **fields})

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_ids`, `attention_mask` and `labels`, of shape `(batch, tokens)`, and `prefix_length`, of shape
            `(batch,)`; all `torch.LongTensor`.
        """
        ids, present, learned = zip(*map(_rows_of, examples), strict=True)
        input_ids = self._pad(ids, self.pad_token_id)
        valid = self._pad(present, 0).bool()
        labels = self._pad(learned, IGNORED).masked_fill(~valid, IGNORED)
        prefix_length = self._prefix_length(examples, labels, valid)

        place = valid.cumsum(dim=1)
        masked = self._draw(input_ids, valid & (place <= prefix_length[:, None]))
        # nothing stands before a first token to predict it from
        labels = labels.masked_fill(place <= prefix_length[:, None].clamp(min=1), IGNORED)
        return {
            "input_ids": input_ids.masked_fill(masked, self.mask_token_id or 0),
            "attention_mask": valid.long(),
            "labels": torch.where(masked, input_ids, labels),
            "prefix_length": prefix_length,
        }

    def _pad(self, rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        batch = pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=self.padding_side)
        missing = -batch.shape[1] % (self.pad_to_multiple_of or 1)
        return F.pad(batch, (missing, 0) if self.padding_side == "left" else (0, missing), value=value)

    def _prefix_length(
        self, examples: Sequence[Mapping[str, Any]], labels: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        tokens = valid.sum(dim=1)
        default: list[int | None] = [None] * len(examples)
        if self.prefix_length == PROMPT:
            default = (valid & labels.ne(IGNORED).cumsum(dim=1).eq(0)).sum(dim=1).tolist()
        elif self.prefix_length is not None:
            default = tokens.clamp(max=int(self.prefix_length)).tolist()
        lengths: list[int] = []
        for example, length, count in zip(examples, default, tokens.tolist(), strict=True):
            if example.get("prefix_length") is not None:
                length = int(example["prefix_length"])
            elif self.prefix_length == PROMPT and all(example.get(key) is None for key in _MARKS):
                raise ValueError(
                    f"prefix_length={PROMPT!r}, but an example has neither {' nor '.join(_MARKS)} to tell its prompt: "
                    "add one (Trainer keeps `completion_mask` with remove_unused_columns=False)."
                )
            if length is None or not 0 <= length <= count:
                raise ValueError(
                    f"The `prefix_length` of an example of {count} tokens is {length}: give a number from 0 to "
                    f"{count} in every example, or one to the collator."
                )
            lengths.append(length)
        prefix_length = torch.tensor(lengths)
        if bool((prefix_length >= tokens).any()):
            logger.warning_once(
                "a row lies wholly in its prefix, so it has masked tokens to learn, but no next token; give a shorter "
                "`prefix_length` or longer rows if this is not meant."
            )
        return prefix_length

    def _draw(self, input_ids: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Which of the candidates are masked."""
        if self.mask_token_id is None:
            return torch.zeros_like(candidates)
        generator = None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(zlib.crc32(input_ids.numpy().tobytes(), self.seed))
        drawn = torch.rand(input_ids.shape, generator=generator) < self.mlm_probability
        kept = torch.isin(input_ids, torch.tensor([self.mask_token_id, *self.unmasked_token_ids]))
        return candidates & drawn & ~kept


def _rows_of(example: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`input_ids`, `attention_mask` and labels of an example, before any prefix, each of shape `(tokens,)`."""
    input_ids = torch.as_tensor(example["input_ids"], dtype=torch.long)
    if input_ids.ndim != 1:
        raise ValueError(f"`input_ids` of an example has shape {tuple(input_ids.shape)}: give one row of tokens.")

    def row(key: str, default: torch.Tensor) -> torch.Tensor:
        given = example.get(key)
        if given is None:
            return default
        values = torch.as_tensor(given, dtype=torch.long)
        if values.shape != input_ids.shape:
            raise ValueError(
                f"`{key}` of an example has shape {tuple(values.shape)}, but `input_ids` {tuple(input_ids.shape)}: "
                "give one entry for each token."
            )
        return values

    ones = torch.ones_like(input_ids)
    labels = row("labels", input_ids)
    return input_ids, row("attention_mask", ones), labels.masked_fill(row("completion_mask", ones) == 0, IGNORED)
