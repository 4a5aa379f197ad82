"""Which tokens enter a pass whose router takes its tokens: top-k in training, a causal rule otherwise."""

from typing import Any

import torch
from torch import nn

from ..configuration.routed_config import RoutedPass
from .attention_context import AttentionContext
from .process_ranks import join_ranks, sum_over_ranks
from .router_loss import RouterLossTerms, membership_loss, z_loss
from .token_routing import (
    RouterBank,
    Selection,
    capacity_counts,
    logit_threshold,
    top_k_edge,
    top_k_membership,
    warmed_up,
)


# a running mean before its first step: everyone enters
UNSET_THRESHOLD = -1e30


class RoutingTrace:
    """What a forward pass reports of its routing; nothing unless asked for.

    Args:
        wanted: record.
        valid (`torch.BoolTensor` of shape `(batch, seq_len)`): False at pads.
        passes: number of passes.
        routers, outputs: number of routers, and of the outputs of each.

    Attributes:
        mask (`torch.BoolTensor` of shape `(batch, seq_len, passes)`): who entered.
        router_logits: fp32, of shape `(batch, seq_len, routers, outputs)`; NaN where the token was no candidate.
        decision_logits: fp32, of shape `(batch, seq_len, routers)`, what the causal rule compares with its thresholds.
    """

    def __init__(self, wanted: bool, valid: torch.Tensor, passes: int, routers: int, outputs: int):
        self.mask = self.router_logits = self.decision_logits = None
        if wanted:
            self.mask = valid.new_zeros((*valid.shape, passes))
            if routers:
                empty = torch.full((*valid.shape, routers, outputs), float("nan"), device=valid.device)
                self.router_logits = empty
                self.decision_logits = empty[..., 0].clone() if outputs == 1 else None

    def enter(self, number: int, active: torch.Tensor) -> None:
        if self.mask is not None:
            self.mask[..., number] = active

    def record(self, router: int, logits: torch.Tensor, candidates: torch.Tensor) -> None:
        """Logits of one router, of shape `(batch, seq_len, outputs)`."""
        if self.router_logits is not None:
            self.router_logits[..., router, :] = logits.detach().masked_fill(~candidates.unsqueeze(-1), float("nan"))

    def record_decision(self, router: int, logits: torch.Tensor, candidates: torch.Tensor) -> None:
        if self.decision_logits is not None:
            self.decision_logits[..., router] = logits.detach().masked_fill(~candidates, float("nan"))


class ExpertChoice:
    """The decisions of one forward pass (MoR, section 2.2.1; MoD, sections 3.3 and 3.5).

    Args:
        model: holds `routers`, and where the rule needs them `predictors` and `threshold_ema`.
        context: the forward pass.
        trace: where logits are reported.
        losses: where the router's losses are collected in training.
        step: training forward passes so far, for the capacity warm-up.
        always_first: the first tokens of every row or packed document enter every pass.
        multiple: the number of tokens chosen in training is a multiple of this.
    """

    def __init__(
        self,
        model: nn.Module,
        context: AttentionContext,
        trace: RoutingTrace,
        losses: RouterLossTerms,
        step: int,
        always_first: int = 0,
        multiple: int = 1,
    ):
        config: Any = model.config
        self.model = model
        self.config = config
        self.context = context
        self.trace = trace
        self.losses = losses
        self.step = step
        self.multiple = multiple
        self.forced = context.first_tokens(always_first) if always_first else None
        self.rule = config.inference_rule
        self.by_running_mean = self.rule == "ema_threshold" and config.compute is None
        self.thresholds = [] if self.by_running_mean else [logit_threshold(t) for t in config.current_thresholds]

    def decide(
        self,
        router: int,
        routed_pass: RoutedPass,
        hidden_states: torch.Tensor,
        candidates: torch.Tensor,
        selection: Selection | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decides for one pass, and collects the losses that teach the causal rule in training.

        Args:
            router: number of the router.
            routed_pass: the pass; all candidates enter one that is `always` entered.
            hidden_states (`torch.Tensor` of shape `(batch, seq_len, hidden_size)`)
            candidates (`torch.BoolTensor` of shape `(batch, seq_len)`)
            selection: the candidates, where the last pass has gathered them.

        Returns:
            The router's fp32 logits (0 where there is no candidate) and who enters, both of shape `(batch, seq_len)`.
        """
        training = self.model.training
        logits = self._logits(self.model.routers, router, hidden_states, selection)
        causal_logits = logits
        if self.rule == "predictor" and (training or not routed_pass.always):
            causal_logits = self._logits(self.model.predictors, router, hidden_states.detach(), selection)
        if self.trace.mask is not None:
            self.trace.record(router, logits.unsqueeze(-1), candidates)
            self.trace.record_decision(router, causal_logits, candidates)
        if routed_pass.always:
            active = candidates
        elif training or self.rule == "topk":
            active = self.top_k(routed_pass, logits, candidates)
        else:
            threshold = self.model.threshold_ema[router] if self.by_running_mean else self.thresholds[router]
            active = causal_logits >= threshold
            if self.forced is not None:
                active = active | self.forced
            if not (candidates is self.context.valid and self.context.all_valid):
                active = active & candidates
        if training:
            self.losses.add(membership_loss(causal_logits, active), candidates, self.config.aux_loss_coef)
            self.losses.add(z_loss(logits.unsqueeze(-1)), candidates, self.config.router_z_loss_coef)
            if self.rule == "ema_threshold" and not routed_pass.always:
                self._follow_edge(router, logits, candidates, active)
        return logits, active

    def top_k(self, routed_pass: RoutedPass, scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """The candidates of highest score, as many as the capacity allows, of shape `(batch, seq_len)`."""
        config, context = self.config, self.context
        capacity = routed_pass.share
        if self.model.training:
            capacity = warmed_up(capacity, self.step, config.capacity_warmup_steps)
        counts = capacity_counts(capacity, context.valid, context.documents, self.multiple)
        return top_k_membership(scores, candidates, counts, context.documents, self.forced)

    def _logits(
        self, bank: RouterBank, router: int, hidden_states: torch.Tensor, selection: Selection | None
    ) -> torch.Tensor:
        """fp32 logits of shape `(batch, seq_len)`, computed for the candidates only; 0 elsewhere."""
        if selection is None:
            return bank(hidden_states, router).squeeze(-1).to(hidden_states.device)
        logits = bank(selection.gather(hidden_states), router).squeeze(-1).to(hidden_states.device)
        return selection.scatter(logits.new_zeros(self.context.valid.shape), logits)

    @torch.no_grad()
    def _follow_edge(self, router: int, logits: torch.Tensor, candidates: torch.Tensor, members: torch.Tensor) -> None:
        """Moves the running mean of the score at the edge of the top-k, that of the tokens of all ranks together.

        Tokens that enter whatever they score are left out: the threshold has to let in the rest of the capacity.
        """
        if self.forced is not None:
            candidates, members = candidates & ~self.forced, members & ~self.forced
        scores, count = join_ranks(logits[candidates]), int(sum_over_ranks(members.sum()))
        if len(scores):
            mean, edge, decay = self.model.threshold_ema[router], top_k_edge(scores, count), self.config.ema_decay
            mean.copy_(torch.where(mean == UNSET_THRESHOLD, edge, decay * mean + (1 - decay) * edge))
