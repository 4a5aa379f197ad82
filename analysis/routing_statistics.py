"""What the routers did: load, agreement with top-k, dead positions, entropy and balance, from `output_routing=True`.

Sources: the MoR paper (arXiv 2507.10524), section 5 and Tables 13 and 14, for sampling accuracy, dead tokens, entropy
and MaxVio; MaxVio is from the loss-free balancing paper (arXiv 2408.15664), section 2.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling.token_routing import capacity_counts, logit_threshold, top_k_membership
from .cost import RowRouting, pass_chains, passes_of


def _routing_mask(output: Any) -> torch.Tensor:
    mask = getattr(output, "routing_mask", None)
    if mask is None:
        raise ValueError("The output has no `routing_mask`; call the model with output_routing=True.")
    return mask


def valid_tokens(output: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Bool tensor (batch, seq): which columns of this call are tokens, not pads."""
    mask = _routing_mask(output)
    if attention_mask is None:
        return torch.ones_like(mask[..., 0])
    return attention_mask[:, -mask.shape[1] :].bool()


def causal_decisions(model: Any, output: Any, valid: torch.Tensor) -> torch.Tensor:
    """Expert choice: whom the causal rule lets in, bool of shape (batch, seq, passes); False for who is no candidate.

    Outside training these are the tokens that entered. In training, where the top-k enter, it is what the rule would
    have said. A pass of capacity 1 asks no rule, and neither do the first tokens under `always_route_first`.

    Args:
        model: a routed model with routers; its configuration and the running mean of `ema_threshold` are read.
        output: its output with `output_routing=True`.
        valid: (batch, seq), False at pads.
    """
    config, logits = model.config, output.decision_logits
    if config.inference_rule == "ema_threshold" and config.compute is None:
        thresholds = model.base_model.threshold_ema
    else:
        thresholds = logits.new_tensor([logit_threshold(threshold) for threshold in config.current_thresholds])
    always = torch.tensor([routed_pass.always for routed_pass in passes_of(config)], device=logits.device)
    unasked = always | _first_tokens(config, valid).unsqueeze(-1)
    return ((logits >= thresholds) | unasked) & ~logits.isnan()


def top_k_members(config: Any, scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Expert choice: which candidates top-k selects in whole rows, bool of the shape of `scores`.

    Args:
        scores: the routers' logits (batch, seq, passes), NaN where the token was no candidate.
        valid: (batch, seq), False at pads.
    """
    candidates = ~scores.isnan()
    members = torch.zeros_like(candidates)
    first = _first_tokens(config, valid)
    for number, routed_pass in enumerate(passes_of(config)):
        counts = capacity_counts(routed_pass.share, valid, multiple=getattr(config, "capacity_multiple", 1))
        members[..., number] = top_k_membership(scores[..., number], candidates[..., number], counts, forced=first)
    return members


def _first_tokens(config: Any, valid: torch.Tensor) -> torch.Tensor:
    """Tokens of whole rows that enter without being asked (`always_route_first`), bool of shape (batch, seq)."""
    return valid & (valid.cumsum(dim=1) <= getattr(config, "always_route_first", 0))


def measured_routing(output: Any, previous: Sequence[RowRouting] | None = None) -> list[RowRouting]:
    """What the accountant needs, one entry per row, from an output.

    Args:
        output: a routed model's output with `output_routing=True`.
        previous: the result for the call before, if this one continued its cache.

    Raises:
        ValueError: if the output has no routing.
    """
    mask = _routing_mask(output)
    columns, counts = mask.shape[1], mask.sum(1).tolist()
    if previous is None:
        return [RowRouting(columns, tuple(row), 0, (0,) * len(row)) for row in counts]
    return [before.after(columns, row) for before, row in zip(previous, counts, strict=True)]


@dataclass(frozen=True)
class RoutingStatistics:
    """Figures over all outputs that a `RoutingMeter` saw. Lists have one entry per pass of `config.routed_passes`.

    Attributes:
        tokens: tokens seen, pads excluded.
        mean_depth: mean number of passes per token.
        depth_histogram: `depth_histogram[k]` tokens ran k passes.
        shares: share of all tokens that entered each pass; for token choice under balance (N_r - r) / N_r.
        untouched: share of tokens that entered none of the passes that one can stay out of.
        accuracy, precision, recall, f1:
            expert choice: agreement of the causal rule with membership in top-k among the candidates ("sampling
            accuracy", MoR Table 13; MoD, section 3.5); NaN where a denominator is zero. At a capacity of 12.5 % a
            rule that lets nobody in has an accuracy of 87.5 %, so read the others too. Empty where there is no causal
            rule: for token choice, for stochastic routing, and under the rule "topk".
        dead_ratio:
            share of positions that no row ever routed into the pass ("dead tokens", MoR Table 13, which quotes the
            last recursion). Positions count valid tokens from 0; 2/3 in the last pass means collapse by position.
        entropy:
            nats. Token choice: per block, of the mean router probabilities (MoR Table 14), ln N_r at best. Expert
            choice: per pass, mean binary entropy of sigmoid(logit) over candidates, near 0 for separated scores.
            Empty for stochastic routing.
        max_violation:
            token choice: per block, (largest load - mean load) / mean load over the chosen depths (MaxVio). Empty for
            the others.
    """

    tokens: int
    mean_depth: float
    depth_histogram: list[int]
    shares: list[float]
    untouched: float
    accuracy: list[float]
    precision: list[float]
    recall: list[float]
    f1: list[float]
    dead_ratio: list[float]
    entropy: list[float]
    max_violation: list[float]


class RoutingMeter:
    """Adds up routing over batches: `meter.update(output, attention_mask)` for each, then `meter.result()`.

    The sums stay on the device of the outputs, so that only `result` waits for it.

    Raises:
        ValueError: for a model that routes nothing.
    """

    def __init__(self, model: Any) -> None:
        passes = passes_of(model.config)
        if all(routed_pass.always for routed_pass in passes):
            raise ValueError(
                f"This {model.config.model_type!r} model routes nothing: every token runs all of its layers; give one "
                "with routers and capacities below 1."
            )
        self.model = model
        self.routing = model.config.routing
        self.passes = len(passes)
        self.avoidable = [number for number, routed_pass in enumerate(passes) if not routed_pass.always]
        chains = pass_chains(model.config)
        self.chains = len(chains), len(chains[0])
        # with "topk" it is the top-k that enters, and no rule is meant to find it
        self.decided = self.routing == "expert_choice" and model.config.inference_rule != "topk"
        self.sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def update(self, output: Any, attention_mask: torch.Tensor | None = None, top_k_entered: bool = False) -> None:
        """Adds one output with `output_routing=True` (a whole sequence, not a decode step).

        Args:
            output: the output.
            attention_mask: (batch, columns), 0 at pads.
            top_k_entered: the output is of training: those that entered are the top-k, at the capacity of that step.
        """
        valid = valid_tokens(output, attention_mask)
        self._see_entering(_routing_mask(output), valid)
        if self.routing == "token_choice":
            self._see_choices(output, valid)
        elif self.routing == "expert_choice":
            scores, entered = output.router_logits, _routing_mask(output)
            members = entered if top_k_entered else top_k_members(self.model.config, scores, valid)
            self._see_candidates(scores, members, causal_decisions(self.model, output, valid))

    def _add(self, name: str, value: torch.Tensor) -> None:
        """Adds to a sum; the shorter of two is filled with zeros."""
        before = self.sums.get(name)
        if before is None:
            self.sums[name] = value
            return
        length = max(len(before), len(value))
        self.sums[name] = _lengthened(before, length) + _lengthened(value, length)

    def _see_entering(self, entered: torch.Tensor, valid: torch.Tensor) -> None:
        entered = entered & valid.unsqueeze(-1)
        depths = torch.arange(self.passes + 1, device=entered.device)
        runs = (entered.sum(-1, keepdim=True) == depths) & valid.unsqueeze(-1)
        self._add("depths", runs.sum((0, 1)))
        self._add("untouched", (valid & ~entered[..., self.avoidable].any(-1)).sum().reshape(1))
        # per position: tokens seen, and how many of them entered each pass
        positions = (valid.cumsum(1) - 1).clamp(min=0).flatten()
        seen = torch.cat([valid.unsqueeze(-1), entered], dim=-1).flatten(0, 1).long()
        self._add("positions", seen.new_zeros(valid.shape[1], seen.shape[1]).index_add_(0, positions, seen))

    def _see_choices(self, output: Any, valid: torch.Tensor) -> None:
        depth = output.routing_mask.unflatten(-1, self.chains).sum(-1, keepdim=True)
        known = valid[..., None, None]
        chosen = depth == torch.arange(1, self.chains[1] + 1, device=depth.device)
        self._add("loads", (chosen & known).sum((0, 1)))
        scores = output.router_logits.float().unflatten(-1, self.chains)
        softmax = self.model.config.router_activation == "softmax"
        probabilities = scores.softmax(-1) if softmax else scores.sigmoid()
        self._add("probabilities", probabilities.double().masked_fill(~known, 0.0).sum((0, 1)))

    def _see_candidates(self, scores: torch.Tensor, members: torch.Tensor, chosen: torch.Tensor) -> None:
        candidates = ~scores.isnan()
        # true and false positives and negatives of the rule
        outcomes = (chosen & members, chosen & ~members, ~chosen & members, ~chosen & ~members)
        self._add("agreement", torch.stack([(one & candidates).sum((0, 1)) for one in outcomes]))
        p = scores.double().nan_to_num(nan=0.0).sigmoid()
        entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
        self._add("entropy", (entropy * candidates).sum((0, 1)))
        self._add("candidates", candidates.sum((0, 1)))

    def add_ranks(self) -> None:
        """Adds what the other processes saw; where there are some, each must call it, after at least one update."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        length = self.sums["positions"].new_tensor(len(self.sums["positions"]))
        torch.distributed.all_reduce(length, op=torch.distributed.ReduceOp.MAX)
        self.sums["positions"] = _lengthened(self.sums["positions"], int(length))
        for name in sorted(self.sums):
            torch.distributed.all_reduce(self.sums[name])

    def result(self) -> RoutingStatistics:
        """The figures over everything seen.

        Raises:
            ValueError: if nothing was seen.
        """
        sums = {name: total.cpu() for name, total in self.sums.items()}
        depths = sums.get("depths", torch.zeros(self.passes + 1, dtype=torch.long))
        tokens = int(depths.sum())
        if not tokens:
            raise ValueError("No token was seen; call `update` with the output of at least one valid token.")
        seen, entered = sums["positions"].split([1, self.passes], dim=1)
        accuracy, precision, recall, f1 = _agreement(sums["agreement"]) if self.decided else ([], [], [], [])
        entropy: list[float] = []
        violation: list[float] = []
        if self.routing == "token_choice":
            mean = sums["probabilities"] / sums["probabilities"].sum(-1, keepdim=True)
            entropy = (-torch.xlogy(mean, mean).sum(-1)).tolist()
            loads = sums["loads"].double()
            violation = (loads.amax(-1) / loads.mean(-1) - 1).tolist()
        elif self.routing == "expert_choice":
            entropy = (sums["entropy"] / sums["candidates"]).tolist()
        return RoutingStatistics(
            tokens=tokens,
            mean_depth=float((depths * torch.arange(self.passes + 1, dtype=torch.double)).sum()) / tokens,
            depth_histogram=depths.tolist(),
            shares=(entered.sum(0).double() / tokens).tolist(),
            untouched=int(sums["untouched"]) / tokens,
            accuracy=accuracy,
            precision=precision,
            recall=recall,
            f1=f1,
            dead_ratio=(entered[seen.squeeze(1) > 0] == 0).double().mean(0).tolist(),
            entropy=entropy,
            max_violation=violation,
        )


def _lengthened(total: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([total, total.new_zeros(length - len(total), *total.shape[1:])]) if len(total) < length else total


def _agreement(outcomes: torch.Tensor) -> tuple[list[float], list[float], list[float], list[float]]:
    """Accuracy, precision, recall and F1 per pass, from (4, passes)."""
    hit, false, missed, right = outcomes.double()
    accuracy = (hit + right) / (hit + false + missed + right)
    f1 = 2 * hit / (2 * hit + false + missed)
    return accuracy.tolist(), (hit / (hit + false)).tolist(), (hit / (hit + missed)).tolist(), f1.tolist()
