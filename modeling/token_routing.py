"""Which tokens enter a group of layers: routers, selection rules, gates, and the gather and scatter of tokens."""

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
    def from_mask(cls, active: torch.Tensor) -> "Selection | None":
        """Builds the selection of the tokens where `active`, of shape `(batch, seq_len)`, is True; `None` for none.

        The one place where routing waits for the device: work can only be skipped once the counts are known.
        """
        batch_size, seq_len = active.shape
        counts = active.sum(dim=1).tolist()
        k = max(counts, default=0)
        if k == 0:
            return None
        device = active.device
        filled = [row for row, count in enumerate(counts) if count]
        rows = torch.arange(batch_size, device=device)
        if len(filled) < batch_size:
            rows = torch.tensor(filled, device=device)
            active = active[rows]
        if k == seq_len:
            index = torch.arange(seq_len, device=device).expand(len(filled), -1)
            if min(counts[row] for row in filled) < seq_len:
                index = _entering_first(active, k)
        else:
            index = _entering_first(active, k)
        ragged = any(counts[row] != k for row in filled)
        valid = active.gather(1, index) if ragged else None
        return cls(rows, index, valid, counts, full=len(filled) == batch_size and not ragged and k == seq_len)

    @property
    def all_rows(self) -> bool:
        return len(self.counts) == self.rows.shape[0]

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


def _entering_first(active: torch.Tensor, k: int) -> torch.Tensor:
    return active.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :k]


class RouterBank(nn.Module):
    """All routers of a model, one per block and recursion (expert choice) or per block (token choice).

    A router is a bias-free linear layer, or two with a GELU between (paper, section 3.1 and Table 13). Scores are
    computed in fp32. The parameters are stacked, so that a batch of mixed depths can index them and PEFT's
    `modules_to_save=["routers"]` covers them.

    Args:
        num_routers: number of routers.
        hidden_size: input width.
        num_outputs: 1 for expert choice, `num_recursions` for token choice.
        expansion: hidden width as a multiple of `hidden_size`; 0 for a linear router.
        bias: adds a bias to the logits.
    """

    def __init__(self, num_routers: int, hidden_size: int, num_outputs: int, expansion: int, bias: bool):
        super().__init__()
        width = hidden_size * (expansion or 1)
        self.weight = nn.Parameter(torch.empty(num_routers, num_outputs, width))
        self.expand_weight = nn.Parameter(torch.empty(num_routers, width, hidden_size)) if expansion else None
        self.bias = nn.Parameter(torch.empty(num_routers, num_outputs)) if bias else None

    def reset_parameters(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)
        if self.expand_weight is not None:
            init.normal_(self.expand_weight, mean=0.0, std=std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor, router: int) -> torch.Tensor:
        """Logits of one router: `(..., hidden_size)` -> fp32 `(..., num_outputs)`."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.float()
            if self.expand_weight is not None:
                hidden_states = F.gelu(F.linear(hidden_states, self.expand_weight[router].float()))
            bias = None if self.bias is None else self.bias[router].float()
            return F.linear(hidden_states, self.weight[router].float(), bias)


def router_expansion(router_type: str) -> int:
    return {"linear": 0, "mlp": 2, "wide_mlp": 4}[router_type]


def top_k_membership(scores: torch.Tensor, candidates: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Membership of exactly `counts` tokens per row, the candidates of highest score; the earlier of equal ones.

    Args:
        scores (`torch.Tensor` of shape `(batch, seq_len)`)
        candidates (`torch.BoolTensor` of shape `(batch, seq_len)`): only these compete.
        counts (`torch.LongTensor` of shape `(batch,)`)

    Returns:
        `torch.BoolTensor` of shape `(batch, seq_len)`.
    """
    order = scores.masked_fill(~candidates, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < counts[:, None]) & candidates


def capacity_counts(capacity: float, valid: torch.Tensor) -> torch.Tensor:
    """max(1, int(c * tokens)) of each row's valid tokens (the official rule, counted over the whole row)."""
    lengths = valid.sum(dim=1)
    return (lengths.double() * capacity).long().clamp(min=1).minimum(lengths)


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


def activate(logits: torch.Tensor, activation: str, alpha: float) -> torch.Tensor:
    """Gate values alpha * G(logits) (paper, equations 2.1 and 2.2), fp32, of the logits' shape."""
    if activation == "softmax":
        return alpha * logits.softmax(dim=-1)
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
