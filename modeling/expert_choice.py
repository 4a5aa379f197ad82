"""Which tokens enter a pass whose router takes its tokens: top-k in training, a causal rule otherwise."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ..configuration.routed_config import RoutedConfig, RoutedPass
from .attention_context import AttentionContext
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


@dataclass
class RoutingTrace:
    """What a forward pass reports of its routing; nothing unless asked for.

    Attributes:
        depth (`torch.LongTensor` of shape `(batch, seq_len)`): passes entered so far; `None` if not asked.
        logits: fp32 router outputs of shape `(batch, seq_len, outputs)`, router by router.
    """

    depth: torch.Tensor | None = None
    logits: list[torch.Tensor] = field(default_factory=list)

    def enter(self, active: torch.Tensor) -> None:
        if self.depth is not None:
            self.depth = self.depth + active

    def record(self, logits: torch.Tensor, candidates: torch.Tensor) -> None:
        if self.depth is not None:
            self.logits.append(logits.detach().masked_fill(~candidates.unsqueeze(-1), float("nan")))

    def record_unasked(self, routers: int) -> None:
        """Routers of one output that no token reached."""
        if self.depth is not None:
            shape = (*self.depth.shape, routers)
            self.logits.append(torch.full(shape, float("nan"), device=self.depth.device))


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
        config: RoutedConfig = model.config
        self.model = model
        self.config = config
        self.context = context
        self.trace = trace
        self.losses = losses
        self.step = step
        self.multiple = multiple
        self.forced = context.first_tokens(always_first) if always_first else None
        self.by_running_mean = config.inference_rule == "ema_threshold" and config.compute is None
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
        config, training = self.config, self.model.training
        logits = self._logits(self.model.routers, router, hidden_states, selection)
        self.trace.record(logits.unsqueeze(-1), candidates)
        causal_logits = logits
        if config.inference_rule == "predictor" and (training or not routed_pass.always):
            causal_logits = self._logits(self.model.predictors, router, hidden_states.detach(), selection)
        if routed_pass.always:
            active = candidates
        elif training or config.inference_rule == "topk":
            active = self.top_k(routed_pass, logits, candidates)
        else:
            threshold = self.model.threshold_ema[router] if self.by_running_mean else self.thresholds[router]
            active = candidates & (causal_logits >= threshold)
            if self.forced is not None:
                active = active | (self.forced & candidates)
        if training:
            self.losses.add(membership_loss(causal_logits, active), candidates, config.aux_loss_coef)
            self.losses.add(z_loss(logits.unsqueeze(-1)), candidates, config.router_z_loss_coef)
            if config.inference_rule == "ema_threshold" and not routed_pass.always:
                self._follow_edge(router, logits, candidates, active)
        return logits, active

    def top_k(self, routed_pass: RoutedPass, scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """The candidates of highest score, as many as the capacity allows, of shape `(batch, seq_len)`."""
        config, context = self.config, self.context
        capacity = routed_pass.share
        if self.model.training:
            capacity = warmed_up(capacity, self.step, config.capacity_warmup_steps)
        counts = capacity_counts(capacity, context.valid, context.documents, self.multiple)
        if self.forced is not None:
            scores = scores.masked_fill(self.forced, float("inf"))
            first = self.forced.sum(dim=1, keepdim=True)
            if context.documents is not None:
                sizes = torch.zeros_like(context.documents).scatter_add_(1, context.documents, self.forced.long())
                first = sizes.gather(1, context.documents)
            counts = counts.maximum(first)
        return top_k_membership(scores, candidates, counts, context.documents)

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
        """Moves the running mean of the score at the edge of the top-k, over all ranks."""
        edge = top_k_edge(logits, candidates, members)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(edge)
            edge = edge / torch.distributed.get_world_size()
        mean = self.model.threshold_ema[router]
        decay = self.config.ema_decay
        mean.copy_(torch.where(mean.isinf(), edge, decay * mean + (1 - decay) * edge))
