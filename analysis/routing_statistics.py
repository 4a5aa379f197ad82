"""What the routers did: load, agreement with top-k, dead positions, entropy and balance, from `output_routing=True`.

Sources: the MoR paper (arXiv 2507.10524), section 5 and Tables 13 and 14, for sampling accuracy, dead tokens, entropy
and MaxVio; MaxVio is from the loss-free balancing paper (arXiv 2408.15664), section 2.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling.token_routing import activate, capacity_counts, logit_threshold, top_k_membership
from .cost import RowRouting, dense_recursions


def _require_routing(output: Any) -> None:
    for name in ("token_depth", "router_logits"):
        if getattr(output, name, None) is None:
            raise ValueError(f"The output has no `{name}`; call the model with output_routing=True.")


def valid_tokens(output: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Bool tensor (batch, seq): which columns of this call are tokens, not pads."""
    depth = output.token_depth
    if attention_mask is None:
        return torch.ones_like(depth, dtype=torch.bool)
    return attention_mask[:, -depth.shape[1] :].bool()


def entered_passes(model: Any, output: Any, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Which tokens entered which pass.

    Args:
        model: a MoR model with a router (its configuration and, with loss-free balancing, its bias are read).
        output: its output with `output_routing=True`.
        attention_mask (`torch.Tensor` of shape `(batch, past + seq)`, *optional*): 0 at pads.

    Returns:
        `torch.Tensor` of shape `(batch, seq, num_blocks * num_recursions)`, bool, block by block.

    Raises:
        ValueError: if the output has no routing, or it was made with capacities other than the configuration's.
    """
    _require_routing(output)
    config, depth, logits = model.config, output.token_depth, output.router_logits
    valid, n, blocks = valid_tokens(output, attention_mask), config.num_recursions, len(config.recursive_blocks)
    recursion = torch.arange(n, device=depth.device)
    if blocks == 1:
        # passes of one block nest, so their number says which they were
        return (recursion < depth.unsqueeze(-1)) & valid.unsqueeze(-1)
    if config.routing == "token_choice":
        chosen = token_choices(model, logits)
        entered = (recursion <= chosen.unsqueeze(-1)) & valid[..., None, None]
    else:
        scores = logits.unflatten(-1, (blocks, n))
        candidates = ~scores.isnan()
        # predictors are no part of an output: where they decide, only the depth tells
        guess = by_depth(candidates, depth) if config.inference_rule == "predictor" else causal_rule(config, scores)
        for last in (guess, top_k_members(config, scores, valid)):
            # who is scored at recursion r + 1 entered recursion r; the last recursion needs the rule itself
            entered = torch.cat([candidates[..., 1:], last[..., -1:]], dim=-1)
            if torch.equal(entered.sum((-1, -2)), depth):
                break
    entered = entered.flatten(-2)
    if not torch.equal(entered.sum(-1), depth):
        raise ValueError(
            f"The passes of {blocks} blocks cannot be told apart, since the depths of the output follow neither the "
            "thresholds nor the capacities of the configuration; use the output of the same model after the capacity "
            "warm-up, with inference_rule 'threshold' or 'topk'."
        )
    return entered


def token_choices(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """Token choice: the last recursion each token takes (0-based), (batch, seq, num_blocks), paper eq. 2.2."""
    config = model.config
    scores = activate(logits.unflatten(-1, (len(config.recursive_blocks), -1)), config.router_activation, 1.0)
    bias = getattr(model.base_model, "balancing_bias", None)
    return (scores if bias is None else scores + bias).argmax(-1)


def causal_rule(config: Any, scores: torch.Tensor) -> torch.Tensor:
    """Expert choice: what the threshold says, sigmoid(logit) >= threshold of the recursion (paper, section 2.2.1).

    A recursion of capacity 1 asks no router: every candidate enters.

    Args:
        scores: logits (..., num_recursions), NaN where the token was no candidate (the answer there is False).
    """
    thresholds = [logit_threshold(threshold) for threshold in config.router_thresholds]
    whole = torch.tensor(dense_recursions(config), device=scores.device)
    return (scores >= scores.new_tensor(thresholds)) | (whole & ~scores.isnan())


def by_depth(candidates: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """Expert choice: who entered the last recursion, where the depth alone says it: all of its candidates, or none.

    Args:
        candidates: (batch, seq, num_blocks, num_recursions), which router scored which token.
        depth: (batch, seq), passes of each token.

    Returns:
        bool, of the shape of `candidates`; only the last recursion means something, and where some candidates of a
        token entered and others did not, it disagrees with `depth`.
    """
    in_last = depth - candidates[..., 1:].sum((-1, -2))
    return candidates & (in_last == candidates[..., -1].sum(-1))[..., None, None]


def top_k_members(config: Any, scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Expert choice: which candidates top-k selects, with k = max(1, int(c_r * tokens of the row)).

    Args:
        scores: logits (batch, seq, num_blocks, num_recursions), NaN where the token was no candidate.
        valid: (batch, seq), False at pads.
    """
    candidates = ~scores.isnan()
    members = torch.zeros_like(candidates)
    for r, capacity in enumerate(config.capacities):
        counts = capacity_counts(capacity, valid)
        for block in range(scores.shape[2]):
            at = (..., block, r)
            members[at] = top_k_membership(scores[at], candidates[at], counts)
    return members


def measured_routing(
    model: Any,
    output: Any,
    attention_mask: torch.Tensor | None = None,
    previous: Sequence[RowRouting] | None = None,
) -> list[RowRouting]:
    """What the accountant needs, one entry per row, from an output.

    Args:
        model: the model, its head included or not.
        output: its output with `output_routing=True`.
        attention_mask (`torch.Tensor` of shape `(batch, past + seq)`, *optional*): 0 at pads.
        previous: the result for the call before, if this one continued its cache.
    """
    config, (rows, columns) = model.config, output.token_depth.shape
    counts: list[list[int]] = [[]] * rows
    if config.routing != "none":
        counts = entered_passes(model, output, attention_mask).sum(1).tolist()
    if previous is None:
        return [RowRouting(columns, tuple(row), 0, (0,) * len(row)) for row in counts]
    return [before.after(columns, row) for before, row in zip(previous, counts, strict=True)]


@dataclass(frozen=True)
class RoutingStatistics:
    """Figures over all outputs that a `RoutingMeter` saw. Lists have one entry per pass, block by block.

    Attributes:
        tokens: tokens seen, pads excluded.
        mean_depth: mean number of passes per token.
        depth_histogram: `depth_histogram[k]` tokens ran k passes.
        shares: share of all tokens that entered each pass; under balance (N_r - r) / N_r.
        accuracy, precision, recall:
            expert choice: agreement of the causal rule with membership in top-k among the candidates ("sampling
            accuracy", Table 13); NaN where a denominator is zero. The rule is that of the configuration: the
            thresholds, or what the predictors let in. Empty where no causal rule decided: for token choice, under the
            rule "topk", and for predictors in training mode.
        dead_ratio:
            share of positions that no row ever routed into the pass ("dead tokens", Table 13; the paper quotes the
            last recursion). Positions count valid tokens from 0; 2/3 in the last pass means collapse by position.
        entropy:
            nats. Token choice: per block, of the mean router probabilities (Table 14), ln N_r at best. Expert choice:
            per pass, mean binary entropy of sigmoid(logit) over candidates, near 0 for separated scores.
        max_violation:
            token choice: per block, (largest load - mean load) / mean load over the chosen depths (MaxVio). Empty for
            expert choice.
    """

    tokens: int
    mean_depth: float
    depth_histogram: list[int]
    shares: list[float]
    accuracy: list[float]
    precision: list[float]
    recall: list[float]
    dead_ratio: list[float]
    entropy: list[float]
    max_violation: list[float]


class RoutingMeter:
    """Adds up routing over batches: `meter.update(output, attention_mask)` for each, then `meter.result()`.

    Raises:
        ValueError: for a model without routers.
    """

    def __init__(self, model: Any) -> None:
        if getattr(model.config, "routing", "none") == "none":
            raise ValueError(
                f"This {model.config.model_type!r} model routes nothing; give one with routing='expert_choice' or "
                "'token_choice'."
            )
        self.model = model
        config = model.config
        self.blocks, self.recursions = len(config.recursive_blocks), config.num_recursions
        self.passes = self.blocks * self.recursions
        self.tokens = 0
        self.histogram = torch.zeros(self.passes + 1, dtype=torch.long)
        self.entered = torch.zeros(self.passes, dtype=torch.long)
        self.ever = torch.zeros(0, self.passes, dtype=torch.bool)
        # per pass: true and false positives and negatives of the rule; per pass or block: sums for the entropy
        self.decided = model.config.inference_rule != "topk"
        self.agreement = torch.zeros(4, self.passes, dtype=torch.long)
        self.entropies = torch.zeros(self.passes, dtype=torch.double)
        self.scored = torch.zeros(self.passes, dtype=torch.long)
        self.loads = torch.zeros(self.blocks, self.recursions, dtype=torch.long)
        self.probabilities = torch.zeros(self.blocks, self.recursions, dtype=torch.double)

    @torch.no_grad()
    def update(self, output: Any, attention_mask: torch.Tensor | None = None) -> None:
        """Adds one output with `output_routing=True` (a whole sequence, not a decode step)."""
        entered = entered_passes(self.model, output, attention_mask).cpu()
        valid = valid_tokens(output, attention_mask).cpu()
        self.tokens += int(valid.sum())
        self.histogram += torch.bincount(entered.sum(-1)[valid], minlength=self.passes + 1)
        self.entered += entered.sum((0, 1))
        self._see_positions(entered, valid)
        scores = output.router_logits.float().cpu().unflatten(-1, (self.blocks, self.recursions))
        if self.model.config.routing == "token_choice":
            self._see_choices(scores, entered, valid)
        else:
            self._see_candidates(scores, entered, valid)

    def _see_positions(self, entered: torch.Tensor, valid: torch.Tensor) -> None:
        positions = (valid.cumsum(1) - 1)[valid]
        length = int(positions.max()) + 1 if len(positions) else 0
        if length > len(self.ever):
            more = torch.zeros(length - len(self.ever), self.passes, dtype=torch.bool)
            self.ever = torch.cat([self.ever, more])
        rows, passes = entered[valid].nonzero(as_tuple=True)
        self.ever[positions[rows], passes] = True

    def _see_choices(self, scores: torch.Tensor, entered: torch.Tensor, valid: torch.Tensor) -> None:
        depth = entered.unflatten(-1, (self.blocks, self.recursions)).sum(-1)[valid] - 1
        self.loads += torch.nn.functional.one_hot(depth, self.recursions).sum(0)
        probabilities = scores[valid].softmax(-1) if self._softmax else scores[valid].sigmoid()
        self.probabilities += probabilities.double().sum(0)

    @property
    def _softmax(self) -> bool:
        return self.model.config.router_activation == "softmax"

    def _see_candidates(self, scores: torch.Tensor, entered: torch.Tensor, valid: torch.Tensor) -> None:
        config = self.model.config
        members = top_k_members(config, scores, valid).flatten(-2)
        chosen = causal_rule(config, scores).flatten(-2)
        if config.inference_rule == "predictor":
            # in training mode top-k decided, so nothing is known of the predictors
            self.decided &= not getattr(self.model, "training", False)
            chosen = entered
        self.decided &= config.inference_rule != "topk"
        scores = scores.flatten(-2)
        candidates = ~scores.isnan()
        outcomes = (chosen & members, chosen & ~members, ~chosen & members, ~chosen & ~members)
        self.agreement += torch.stack([(one & candidates).sum((0, 1)) for one in outcomes])
        p = scores.double().nan_to_num(nan=0.0).sigmoid()
        entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
        self.entropies += (entropy * candidates).sum((0, 1))
        self.scored += candidates.sum((0, 1))

    def result(self) -> RoutingStatistics:
        """The figures over everything seen.

        Raises:
            ValueError: if nothing was seen.
        """
        if not self.tokens:
            raise ValueError("No token was seen; call `update` with the output of at least one valid token.")
        depths = torch.arange(self.passes + 1, dtype=torch.double)
        accuracy: list[float] = []
        precision: list[float] = []
        recall: list[float] = []
        violation: list[float] = []
        if self.model.config.routing == "token_choice":
            mean = self.probabilities / self.probabilities.sum(-1, keepdim=True)
            entropy = -torch.xlogy(mean, mean).sum(-1)
            loads = self.loads.double()
            violation = (loads.amax(-1) / loads.mean(-1) - 1).tolist()
        else:
            if self.decided:
                hit, false, missed, right = self.agreement.double()
                accuracy = ((hit + right) / (hit + false + missed + right)).tolist()
                precision, recall = (hit / (hit + false)).tolist(), (hit / (hit + missed)).tolist()
            entropy = self.entropies / self.scored
        return RoutingStatistics(
            tokens=self.tokens,
            mean_depth=float((self.histogram * depths).sum()) / self.tokens,
            depth_histogram=self.histogram.tolist(),
            shares=(self.entered.double() / self.tokens).tolist(),
            accuracy=accuracy,
            precision=precision,
            recall=recall,
            dead_ratio=(1 - self.ever.double().mean(0)).tolist(),
            entropy=entropy.tolist(),
            max_violation=violation,
        )
