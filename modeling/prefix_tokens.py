"""Which tokens of a row are its prefix: the part that linear attention reads non-causally."""

from typing import NamedTuple

import torch


class Prefix(NamedTuple):
    """The prefix of each row.

    Attributes:
        mask (`torch.BoolTensor` of shape `(batch, tokens)`): True in the prefix.
        columns: the first columns, which hold all of it.
        lengths (`torch.LongTensor` of shape `(batch,)`): tokens.
    """

    mask: torch.Tensor
    columns: int
    lengths: torch.Tensor

    def to(self, device: torch.device) -> "Prefix":
        return Prefix(self.mask.to(device), self.columns, self.lengths.to(device))


def find_prefix(
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prefix_length: int | torch.Tensor | None = None,
    encoder_mask: "torch.Tensor | Prefix | None" = None,
    default: int = 0,
) -> Prefix | None:
    """
    Args:
        tokens (`torch.Tensor` of shape `(batch, tokens, ...)`): ids, or vectors.
        attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 0 at pads.
        prefix_length (`int` or `torch.LongTensor` of shape `(batch,)`, *optional*):
            The first tokens of each row that are the prefix, pads not counted.
        encoder_mask (`torch.Tensor` of shape `(batch, at most tokens)`, *optional*):
            1 in the prefix, instead of a length; tokens behind it are not in the prefix. Or a prefix that was found.
        default: where neither is given, at most so many first tokens of each row.

    Returns:
        The prefix, or `None` if no row has one.

    Raises:
        ValueError: if both are given, a row has fewer tokens, or the mask does not fit.
    """
    if isinstance(encoder_mask, Prefix):
        return encoder_mask
    batch, length = tokens.shape[:2]
    valid = tokens.new_ones((batch, length), dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if encoder_mask is not None:
        mask = _given_mask(encoder_mask, valid, prefix_length)
    else:
        wanted: int | torch.Tensor = default
        if prefix_length is not None:
            wanted = _given_length(prefix_length, valid)
        if isinstance(wanted, int) and wanted == 0:
            return None
        mask = valid & (valid.cumsum(dim=1) <= wanted)
    lengths = mask.sum(dim=1)
    if torch.compiler.is_compiling():
        return Prefix(mask, length, lengths)
    columns = int((mask.any(dim=0) * torch.arange(1, length + 1, device=mask.device)).max()) if length else 0
    return Prefix(mask, columns, lengths) if columns else None


def _given_mask(
    encoder_mask: torch.Tensor, valid: torch.Tensor, prefix_length: int | torch.Tensor | None
) -> torch.Tensor:
    if prefix_length is not None:
        raise ValueError("`prefix_length` and `encoder_mask` say the same thing; give one of them.")
    batch, length = valid.shape
    if encoder_mask.ndim != 2 or encoder_mask.shape[0] != batch or encoder_mask.shape[1] > length:
        raise ValueError(
            f"`encoder_mask` has shape {tuple(encoder_mask.shape)}, but must be ({batch}, at most {length}): one "
            "entry for each token up to the end of the prefix."
        )
    mask = torch.nn.functional.pad(encoder_mask.bool(), (0, length - encoder_mask.shape[1]))
    if not torch.compiler.is_compiling() and bool((mask & ~valid).any()):
        raise ValueError("`encoder_mask` is 1 where `attention_mask` is 0; a pad cannot be in the prefix.")
    return mask


def _given_length(prefix_length: int | torch.Tensor, valid: torch.Tensor) -> int | torch.Tensor:
    batch = valid.shape[0]
    if isinstance(prefix_length, list | tuple):
        prefix_length = torch.tensor(prefix_length)
    if isinstance(prefix_length, torch.Tensor) and prefix_length.ndim:
        if tuple(prefix_length.shape) != (batch,):
            raise ValueError(
                f"`prefix_length` has shape {tuple(prefix_length.shape)}, but must be one number, or one for each of "
                f"the {batch} rows."
            )
        wanted: int | torch.Tensor = prefix_length[:, None].to(valid.device)
    else:
        wanted = prefix_length if torch.compiler.is_compiling() else int(prefix_length)
    if torch.compiler.is_compiling():
        return wanted
    counts = valid.sum(dim=1)
    lengths = torch.as_tensor(prefix_length, device=valid.device).expand(batch)
    for row, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        if not 0 <= length <= count:
            raise ValueError(
                f"`prefix_length` is {length} for row {row}, which has {count} tokens in this call; give at most "
                "these, and the whole prefix in the first call."
            )
    return wanted
