"""The parts of routing: selections with gather and scatter of tokens, routers, top-k by capacity, gates."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


@dataclass
class Selection:
    """The tokens of a chunk that enter a group of layers, gathered into a compact batch.

    Attributes:
        rows (`torch.LongTensor` of shape `(rows,)`): batch rows with at least one token.
        index (`torch.LongTensor` of shape `(rows, k)`): token indices within the chunk, ascending; rows with fewer
            than k tokens are filled with indices of tokens that did not enter.
        valid (`torch.BoolTensor` of shape `(rows, k)`): False at the fill; `None` if there is none.
        counts (`list[int]`): tokens of each batch row, also of those with none.
        full (`bool`): every token of every row enters, in order.
    """

    rows: torch.Tensor
    index: torch.Tensor
    valid: torch.Tensor | None
    counts: list[int]
    full: bool

    @classmethod
    def of_all(cls, batch_size: int, seq_len: int, device: torch.device) -> "Selection":
        """The selection of every token."""
        index = torch.arange(seq_len, device=device).expand(batch_size, -1)
        return cls(torch.arange(batch_size, device=device), index, None, [seq_len] * batch_size, full=True)

    @classmethod
    def of_some(cls, active: torch.Tensor, counts: list[int]) -> "Selection":
        """The selection of the tokens where `active`, of shape `(batch, seq_len)`, is True: some, but not all.

        Args:
            counts: how many they are in each row.
        """
        batch_size, device, k = active.shape[0], active.device, max(counts)
        filled = [row for row, count in enumerate(counts) if count]
        if len(filled) < batch_size:
            rows = torch.tensor(filled, device=device)
            active = active[rows]
        else:
            rows = torch.arange(batch_size, device=device)
        index = active.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :k]
        ragged = any(counts[row] != k for row in filled)
        return cls(rows, index, active.gather(1, index) if ragged else None, counts, full=False)

    @classmethod
    def of_none(cls, batch_size: int, device: torch.device) -> "Selection":
        """A first token that stands in where none enters but the layers must run: all of it is fill."""
        first = torch.zeros(1, dtype=torch.long, device=device)
        nothing = torch.zeros(1, 1, dtype=torch.bool, device=device)
        return cls(first, first[None], nothing, [0] * batch_size, full=False)

    @property
    def stands_in(self) -> bool:
        """No token enters; one is computed for the sake of other ranks, and changes nothing."""
        return not any(self.counts)

    @property
    def all_rows(self) -> bool:
        return len(self.counts) == self.rows.shape[0]

    def pick_columns(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns of the selected tokens: `(seq_len,)` -> `(rows, k)`."""
        return columns.expand(len(self.counts), -1) if self.full else columns[self.index]

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """Picks the selected tokens: `(batch, seq_len, ...)` -> `(rows, k, ...)`."""
        return tokens if self.full else tokens[self.rows[:, None], self.index]

    def scatter(self, tokens: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """A copy of `tokens`, `(batch, seq_len, ...)`, with `update`, `(rows, k, ...)`, at the selected places."""
        update = update.to(tokens.dtype)
        if self.full:
            return update
        if self.valid is not None:
            valid = self.valid.reshape(*self.valid.shape, *([1] * (update.ndim - 2)))
            update = torch.where(valid, update, self.gather(tokens))
        return tokens.index_put((self.rows[:, None], self.index), update)


class RouterBank(nn.Module):
    """All routers of a model: one for each pass (expert choice), or for each block (token choice).

    A router is a bias-free linear layer, or two with a GELU between (paper, section 3.1 and Table 13). Scores are
    computed in fp32. The parameters are stacked, so that a batch of mixed depths can index them and PEFT's
    `modules_to_save=["routers"]` covers them.

    Args:
        num_routers: number of routers.
        hidden_size: input width.
        num_outputs: 1 for expert choice, `num_recursions` for token choice.
        inner_size: inner width; 0 for a linear router.
        bias: adds a bias to the logits.
    """

    def __init__(self, num_routers: int, hidden_size: int, num_outputs: int, inner_size: int, bias: bool):
        super().__init__()
        width = inner_size or hidden_size

        def parameter(*shape: int) -> nn.Parameter:
            # whatever the dtype that the model is built in
            return nn.Parameter(torch.empty(num_routers, *shape, dtype=torch.float32))

        self.weight = parameter(num_outputs, width)
        self.expand_weight = parameter(width, hidden_size) if inner_size else None
        self.bias = parameter(num_outputs) if bias else None

    def reset_parameters(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)
        if self.expand_weight is not None:
            init.normal_(self.expand_weight, mean=0.0, std=std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor, router: int) -> torch.Tensor:
        """Logits of one router: `(..., hidden_size)` -> fp32 `(..., num_outputs)`."""
        if torch.is_autocast_enabled(hidden_states.device.type):
            with torch.autocast(hidden_states.device.type, enabled=False):
                return self.forward(hidden_states, router)
        hidden_states = hidden_states.float()
        if self.expand_weight is not None:
            hidden_states = F.gelu(F.linear(hidden_states, self.expand_weight[router].float()))
        bias = None if self.bias is None else self.bias[router].float()
        return F.linear(hidden_states, self.weight[router].float(), bias)


def top_k_membership(
    scores: torch.Tensor,
    candidates: torch.Tensor,
    counts: torch.Tensor,
    documents: torch.Tensor | None = None,
    forced: torch.Tensor | None = None,
) -> torch.Tensor:
    """Membership of exactly `counts` tokens, the candidates of highest score; the earlier of equal ones.

    Args:
        scores (`torch.Tensor` of shape `(batch, seq_len)`)
        candidates (`torch.BoolTensor` of shape `(batch, seq_len)`): only these compete.
        counts (`torch.LongTensor` of shape `(batch, 1)`, or `(batch, seq_len)` with documents)
        documents (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
            Tokens compete within their document only; ascending numbers below `seq_len`.
        forced (`torch.BoolTensor` of shape `(batch, seq_len)`, *optional*):
            Candidates that are members whatever they score, and take the place of others.

    Returns:
        `torch.BoolTensor` of shape `(batch, seq_len)`.
    """
    if forced is not None:
        scores = scores.masked_fill(forced, math.inf)
        counts = counts.maximum(_count(forced, documents))
    order = scores.masked_fill(~candidates, -math.inf).argsort(dim=1, descending=True, stable=True)
    if documents is not None:
        order = order.gather(1, documents.gather(1, order).argsort(dim=1, stable=True))
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    if documents is not None:
        sizes = torch.zeros_like(documents).scatter_add_(1, documents, torch.ones_like(documents))
        rank = rank - (sizes.cumsum(1) - sizes).gather(1, documents)
    return (rank < counts) & candidates


def capacity_counts(
    capacity: float, valid: torch.Tensor, documents: torch.Tensor | None = None, multiple: int = 1
) -> torch.Tensor:
    """max(1, int(c * tokens)) of each row's valid tokens (the official rule of MoR, counted over the whole row).

    Args:
        capacity: share of the tokens.
        valid (`torch.BoolTensor` of shape `(batch, seq_len)`): False at pads.
        documents (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*): counts within documents instead.
        multiple: the count is rounded up to a multiple of this, as far as there are tokens.

    Returns:
        `torch.LongTensor` of shape `(batch, 1)`, or `(batch, seq_len)` with documents: the count of each token's own.
    """
    lengths = _count(valid, documents)
    counts = (lengths.double() * capacity).long().clamp(min=1)
    if multiple > 1:
        counts = (counts + multiple - 1) // multiple * multiple
    return counts.minimum(lengths)


def _count(tokens: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """How many of `tokens`, a mask, a row has, `(batch, 1)`, or the document of each token, `(batch, seq_len)`."""
    if documents is None:
        return tokens.sum(dim=1, keepdim=True)
    return torch.zeros_like(documents).scatter_add_(1, documents, tokens.long()).gather(1, documents)


def top_k_edge(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The threshold, a scalar, that lets in `count` of the scores, of shape `(candidates,)`; at least one."""
    ranked = scores.sort(descending=True).values
    return (ranked[max(count, 1) - 1] + ranked[min(count, len(ranked) - 1)]) / 2


def uniform_noise(position_ids: torch.Tensor, router: int) -> torch.Tensor:
    """Numbers in [0, 1) that look random but are fixed for a position and a router: fp32, of the positions' shape."""
    mixed = position_ids.long() * 0x9E3779B1 + (router + 1) * 0x85EBCA77
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = ((mixed ^ ((mixed & 0xFFFFFFFF) >> shift)) * factor) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 16)) >> 8).float() / 2**24


def warmed_up(capacity: float, step: int, steps: int) -> float:
    """Capacity after `step` of `steps` warm-up steps: c + (1 - c) (1 + cos(pi step / steps)) / 2."""
    if step >= steps:
        return capacity
    return capacity + (1 - capacity) * 0.5 * (1 + math.cos(math.pi * step / steps))


def logit_threshold(threshold: float) -> float:
    """The logit at which sigmoid(logit) reaches `threshold`."""
    if threshold <= 0:
        return -math.inf
    return math.inf if threshold >= 1 else math.log(threshold / (1 - threshold))


def activate(logits: torch.Tensor, activation: str, alpha: float | None = 1.0) -> torch.Tensor:
    """Gate values, fp32, of the logits' shape: alpha * G(logits) (MoR, equations 2.1 and 2.2; MoD, equation 1).

    Args:
        logits (`torch.Tensor`)
        activation: `softmax` over the last dimension, `sigmoid`, `tanh` or `raw` for G; `one_plus_tanh` for
            1 + alpha tanh(logits); `straight_through` for exactly 1 with the gradient of the sigmoid.
        alpha: unused by `straight_through`.
    """
    if activation == "straight_through":
        soft = logits.sigmoid()
        return 1 + (soft - soft.detach())
    if activation == "one_plus_tanh":
        return 1 + alpha * logits.tanh()
    if activation == "softmax":
        return alpha * logits.softmax(dim=-1)
    if activation == "raw":
        return alpha * logits
    return alpha * (logits.tanh() if activation == "tanh" else logits.sigmoid())


def apply_gate(gating: str, residual: torch.Tensor, update: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Combines the stream H with the block's output f(H).

    Args:
        gating: `weighted` H + g f(H) (paper, equation 2.1), `additive` H + f(H), `interpolate` H + g (f(H) - H),
            which is f(H) to the last bit at g = 1.
        residual (`torch.Tensor` of shape `(batch, tokens, hidden_size)`): H.
        update (`torch.Tensor` of the same shape): f(H).
        gate (`torch.Tensor` of shape `(batch, tokens)`): g.
    """
    if gating == "additive":
        return residual + update
    gate = gate.unsqueeze(-1).to(update.dtype)
    if gating == "weighted":
        return residual + gate * update
    return torch.lerp(residual, update, gate)
