"""Routers that start from what depth is measured to gain for each token of a text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.token_routing import RouterBank, logit_threshold


OPEN = 20.0  # the sigmoid of this logit is 1 in fp32


@torch.no_grad()
def start_routers(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    *,
    spread: float = 4.0,
    ridge: float = 1.0,
) -> dict[int, float]:
    """Sets every linear expert-choice router whose capacity is below 1 from what its recursion gains on a text.

    A conversion leaves the routers at "everyone enters", with zero weights: training would then choose tokens by
    their position, ties being broken that way. Here the gain of a recursion for a token is how much more likely the
    next token becomes when all tokens run it; the router's weights are the ridge regression of that gain on the
    states it reads, scaled so that logits have a standard deviation of `spread`, and its bias puts the share of
    `config.capacities` above the threshold. So the causal rule starts at the capacities, and training refines it.

    Args:
        model (`PreTrainedModel`): a MoR for causal language modelling; its own weights do not change.
        batches: token ids of shape `(batch, seq_len)`; some thousand tokens are enough.
        spread: standard deviation of the new logits: at 4, few tokens have a gate between open and shut.
        ridge: strength of the regression's penalty, relative to the mean variance of the states.

    Returns:
        For each router that was set, the correlation of its logits with the gain on these batches.

    Raises:
        ValueError: for what `why_not_started` says, or if there is no token.
    """
    config = model.config
    reason = why_not_started(config)
    if reason is not None:
        raise ValueError(f"{reason}.")
    batches = [ids.to(model.device) for ids in batches]
    if not sum(ids[:, 1:].numel() for ids in batches):
        raise ValueError("The batches hold no token with a next one: give rows of at least two tokens.")
    routers: RouterBank = model.model.routers
    assert routers.bias is not None
    chosen = [router for router in range(config.num_routers) if config.capacities[router % config.num_recursions] < 1]
    was_training = model.training
    model.eval()
    try:
        for router in range(config.num_routers):
            _set(routers, router, OPEN)
        full, states = _measure(model, batches, set(chosen))
        found = {}
        for router in chosen:
            _set(routers, router, -OPEN)
            without, _ = _measure(model, batches, set())
            _set(routers, router, OPEN)
            found[router] = (states[router], without - full)
    finally:
        model.train(was_training)
    correlations = {}
    for router, (inputs, gain) in found.items():
        recursion = router % config.num_recursions
        weight, scores = _regress(inputs, gain, ridge)
        scale = spread / scores.std().clamp(min=1e-6)
        below = torch.quantile(scores * scale, 1 - config.capacities[recursion])
        routers.weight[router, 0] = weight * scale
        routers.bias[router, 0] = logit_threshold(config.router_thresholds[recursion]) - below
        correlations[router] = torch.corrcoef(torch.stack([scores, gain]))[0, 1].item()
    return correlations


def why_not_started(config: Any) -> str | None:
    """Why the routers of a MoR cannot be started, as a clause; `None` if they can."""
    routing, kind, bias = (getattr(config, name, None) for name in ("routing", "router_type", "router_bias"))
    if routing != "expert_choice" or kind != "linear" or not bias:
        return (
            f"routing is {routing!r}, router_type {kind!r} and router_bias {bias}, but only linear expert-choice "
            "routers with a bias can be started; convert with `router_bias: true`"
        )
    if config.inference_rule != "threshold":
        return (
            f"inference_rule is {config.inference_rule!r}, but only 'threshold' routers can be started, since no "
            "other rule compares their scores with a threshold; train them, or convert with "
            "`inference_rule: threshold`"
        )
    return None


def _set(routers: RouterBank, router: int, logit: float) -> None:
    assert routers.bias is not None
    routers.weight[router] = 0.0
    routers.bias[router] = logit


def _measure(
    model: PreTrainedModel, batches: list[torch.Tensor], watched: set[int]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Loss of every token's successor, of shape `(tokens,)`, and the states that the watched routers read."""
    states: dict[int, list[torch.Tensor]] = {router: [] for router in watched}

    def watch(module: nn.Module, args: tuple) -> None:
        if args[1] in states:
            states[args[1]].append(args[0][:, :-1].float().flatten(0, 1))

    handle = model.model.routers.register_forward_pre_hook(watch)
    try:
        losses = []
        for ids in batches:
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
    finally:
        handle.remove()
    return torch.cat(losses), {router: torch.cat(parts) for router, parts in states.items()}


def _regress(inputs: torch.Tensor, gain: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression of `gain` on centred inputs: weights and scores `inputs @ weights`."""
    centred = (inputs - inputs.mean(0)).double()
    covariance = centred.T @ centred / len(centred)
    penalty = ridge * covariance.diagonal().mean().clamp(min=1e-12)
    target = centred.T @ (gain - gain.mean()).double() / len(centred)
    covariance.diagonal().add_(penalty)
    weight = torch.linalg.solve(covariance, target).float()
    return weight, inputs @ weight
