"""Losses that train the router, and their way into the gradient.

All losses are fp32 sums over valid tokens, divided once by the number of items of the optimizer step, which are its
labelled tokens as for the cross-entropy (valid tokens where there are no labels): so gradient accumulation gives the
gradient of one large batch. The language model head adds them to its loss. Trainers that bypass the head (TRL patches
it) reach only the backbone, which then injects their gradient itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .process_ranks import sum_over_ranks


logger = logging.get_logger(__name__)


@dataclass
class RouterLossTerms:
    """Collects the terms of one forward pass.

    Attributes:
        total: weighted sum over tokens and routers so far, fp32.
        valid (`torch.BoolTensor` of shape `(batch, seq_len)`): False at pads.
    """

    valid: torch.Tensor
    total: torch.Tensor | None = None

    def add(self, per_token: torch.Tensor, where: torch.Tensor, weight: float) -> None:
        """Adds `weight` times the sum of `per_token`, of shape `(batch, seq_len)`, over the tokens in `where`."""
        if weight:
            term = weight * per_token.masked_fill(~where, 0.0).sum()
            self.total = term if self.total is None else self.total + term

    def add_mean(self, loss: torch.Tensor, weight: float) -> None:
        """Adds `weight` times a loss that is a mean over the valid tokens of this call already."""
        self.add(loss.float() * self.valid, self.valid, weight)

    def mean(self, items: torch.Tensor | int | None) -> torch.Tensor | None:
        """The loss: the sum over `items`, or over the valid tokens of this call."""
        if self.total is None:
            return None
        count = self.valid.sum().clamp(min=1) if items is None else items
        return self.total / count


def membership_loss(logits: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the router's logits against top-k membership, per token (paper, section 2.2.1)."""
    return F.binary_cross_entropy_with_logits(logits, member.to(logits.dtype), reduction="none")


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """Squared log-sum-exp over the router's outputs, per token: `(..., outputs)` -> `(...)`."""
    return logits.logsumexp(dim=-1).square()


def balancing_loss(probabilities: torch.Tensor, choice: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sum over depths of f_i P_i (paper, Table 14), per token, so that its sum over tokens is the loss times them.

    Args:
        probabilities (`torch.Tensor` of shape `(batch, seq_len, num_recursions)`)
        choice (`torch.LongTensor` of shape `(batch, seq_len)`): chosen depth.
        valid (`torch.BoolTensor` of shape `(batch, seq_len)`)

    Returns:
        `torch.Tensor` of shape `(batch, seq_len)`: f of the call, over all ranks, times the token's own
        probabilities.
    """
    depths = probabilities.shape[-1]
    chosen = F.one_hot(choice, depths).to(probabilities.dtype) * valid.unsqueeze(-1)
    counts = sum_over_ranks(chosen.sum(dim=(0, 1)))
    fractions = depths * counts / counts.sum().clamp(min=1)
    return (probabilities * fractions).sum(dim=-1)


class RouterLossScale:
    """Carries what the backbone must know to inject: how many items the step has, and the scale of the loss.

    Attributes:
        outside: scale of a loss that is made outside of the model (DPO, GRPO, an own loop), which the model cannot
            see: the gradient scaler's scale over the accumulation steps; `None` stands for 1 and warns once.
        step_items: items of the whole optimizer step, where a trainer knows them but does not tell the model; `None`
            stands for those of each call.
    """

    def __init__(self) -> None:
        self.outside: float | None = None
        self.step_items: torch.Tensor | int | None = None
        self.begin(None)

    def begin(self, items: torch.Tensor | int | None) -> None:
        """A forward pass of the model with the head begins."""
        self.items = items
        self.scale: torch.Tensor | float | None = self.outside
        self.injected = False

    def seen_by_loss(self) -> torch.Tensor | float:
        if self.scale is None:
            logger.warning_once(
                "the loss is made outside of the model, so its scale is unknown to the router loss, which takes 1; "
                "with gradient accumulation or a gradient scaler call `adapt_trainer(trainer)` of "
                "varidepth.training.trainer_adapter, or set `model.router_loss_scale.outside` to that scale."
            )
            return 1.0
        return self.scale


class _Inject(torch.autograd.Function):
    """Identity on the hidden states whose backward also sends the scale of the loss into the router loss."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, loss: torch.Tensor, scale: RouterLossScale) -> torch.Tensor:
        ctx.scale = scale
        ctx.like = loss.new_ones(())
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return gradient, ctx.like * ctx.scale.seen_by_loss(), None


class _Tap(torch.autograd.Function):
    """Identity on the loss whose backward records the scale it arrives with (accumulation, GradScaler, world size)."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, scale: RouterLossScale) -> torch.Tensor:
        ctx.scale = scale
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.scale.scale = gradient.detach()
        return gradient, None


def inject(hidden_states: torch.Tensor, loss: torch.Tensor, scale: RouterLossScale) -> torch.Tensor:
    """Returns `hidden_states`; in the backward pass `loss` receives the scale of the loss as its gradient."""
    scale.injected = True
    return _Inject.apply(hidden_states, loss, scale)


def attach_loss_hooks(model: nn.Module, scale: RouterLossScale, labels_are_tokens: bool = True) -> None:
    """Hooks on a model with a head: they fire even where a trainer has replaced its `forward`."""
    object.__setattr__(model, "router_loss_scale", scale)
    model.register_forward_pre_hook(_note_items if labels_are_tokens else _note_nothing, with_kwargs=True)
    model.register_forward_hook(_tap_loss, always_call=True)


def _note_nothing(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    module.router_loss_scale.begin(None)


def _note_items(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None:
        items = module.router_loss_scale.step_items
    if items is None and isinstance(labels, torch.Tensor) and labels.ndim == 2:
        items = labels[:, 1:].ne(-100).sum().clamp(min=1)
    module.router_loss_scale.begin(items)


def _tap_loss(module: nn.Module, args: tuple, output: Any) -> Any:
    scale = module.router_loss_scale
    scale.items = None
    loss = output.get("loss") if isinstance(output, dict) else None
    if scale.injected and isinstance(loss, torch.Tensor) and loss.requires_grad:
        output["loss"] = _Tap.apply(loss, scale)
    return output
