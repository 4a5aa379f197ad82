"""Routers of a converted MoD that start from how much each layer matters to each token.

A conversion leaves the routers at "everyone enters". What it would cost to keep a token out of a layer is measured
without doing it: the second-order effect on the model's own distribution is the Fisher information of the token's
gate there, the expected square of the gradient that the log-likelihood of a token drawn from the model sends to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


OPEN_SHARE = 0.99  # layers that keep more tokens than this stay dense
LOWEST_SHARE = 0.02
EDGE_OF_OUTLIERS = 8.0  # standard deviations
SLOPE_AT_ZERO = 0.25  # of the sigmoid, the straight-through gate's gradient


def start_by_importance(
    model: PreTrainedModel, batches: Iterable[torch.Tensor], *, share: float | None = None, ridge: float = 0.3
) -> list[float]:
    """Fits every router to the measured importance of its layer for each token, and divides the capacity by it.

    The logarithm of the importance is fitted by ridge regression on the states that the router reads. One limit for
    all layers parts the tokens that enter from those that stay out, so that layers which matter to many tokens get
    more of them: `config.capacity` becomes a list whose mean is `share`, with 1 for layers that all tokens need.

    Args:
        model (`PreTrainedModel`):
            A MoD for causal language modelling; its own weights do not change. Its routers may hold anything.
        batches: token ids of shape `(batch, seq_len)` without pads; ten thousand tokens are enough. The states of all
            of them at all routed layers are held in memory, in fp32.
        share: mean share of the tokens that enter a routed layer; by default the mean of `config.capacity`.
        ridge: penalty of the regression, relative to the variance of a state.

    Returns:
        For each router the correlation of its logits with the logarithm of the measured importance. One measurement
        is noisy, so that even a perfect router stays well below 1.

    Raises:
        ValueError: for what `why_not_started_by_importance` says, if `share` is out of range, or there is no token.
    """
    config: Any = model.config
    reason = why_not_started_by_importance(config)
    if reason is not None:
        raise ValueError(f"{reason}.")
    wanted = sum(config.capacities) / len(config.capacities) if share is None else share
    if not 0 < wanted < 1:
        raise ValueError(f"`share` is {wanted}, but must be between 0 and 1: the mean capacity of the routed layers.")
    batches = [ids.to(model.device) for ids in batches]
    if not sum(ids[:, config.always_route_first :].numel() for ids in batches):
        raise ValueError(
            f"The batches hold no token behind the first {config.always_route_first} of a row, which always enter: "
            "give longer rows."
        )
    states, importance = _measure(model, batches)
    fits = [_fit(x, y, ridge) for x, y in zip(states, importance, strict=True)]
    scores = torch.stack([fit[2] for fit in fits])
    limit = _quantile(scores.flatten(), 1 - wanted)
    routers = model.model.routers
    with torch.no_grad():
        for router, (weight, offset, _) in enumerate(fits):
            routers.weight[router, 0] = weight
            routers.bias[router, 0] = offset - limit
    shares = (scores >= limit).double().mean(dim=1).clamp(min=LOWEST_SHARE)
    config.capacity = [1.0 if s > OPEN_SHARE else s for s in shares.tolist()]
    config.router_thresholds = [0.5] * config.num_routers
    config.compute = config.compute_curve = None
    return [
        float(torch.corrcoef(torch.stack([score, y.clamp(min=y[y > 0].min()).log()]))[0, 1])
        for score, y in zip(scores, importance, strict=True)
    ]


def why_not_started_by_importance(config: Any) -> str | None:
    """Why the routers of a MoD cannot be started by importance, as a clause; `None` if they can."""
    needed = {"gate": "straight_through", "router_bias": True, "inference_rule": "threshold"}
    for field, value in needed.items():
        if getattr(config, field, None) != value:
            return (
                f"`{field}` is {getattr(config, field, None)!r}, but routers can only be started by importance with "
                f"{field}={value!r}; convert with it"
            )
    return None


def _measure(model: PreTrainedModel, batches: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """States of shape `(tokens, hidden_size)` per router, and importances of shape `(routers, tokens)`."""
    config: Any = model.config
    routers: nn.Module = model.model.routers
    # tokens that always enter need no score, and the first of a row would stretch the scale of the states
    first = config.always_route_first
    states: list[list[torch.Tensor]] = [[] for _ in range(config.num_routers)]
    found: list[list[torch.Tensor]] = [[] for _ in range(config.num_routers)]
    probes: list[torch.Tensor] = []

    def watch(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        states[args[1]].append(args[0][:, first:].detach().float().flatten(0, 1).cpu())
        probes.append(torch.zeros_like(output, requires_grad=True))
        return probes[-1]

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = config.router_thresholds, config.compute, config.capacity, model.training
    config.router_thresholds, config.compute = [0.0] * config.num_routers, None
    # below 1, so that the layers are routed
    config.capacities = [min(capacity, 0.5) for capacity in config.capacities]
    model.requires_grad_(False)
    model.eval()
    generator = torch.Generator(device=model.device).manual_seed(0)
    handle = routers.register_forward_hook(watch)
    try:
        for ids in batches:
            probes.clear()
            with torch.enable_grad():
                logits = model(ids, use_cache=False).logits.float().flatten(0, 1)
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
                nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
            for router, probe in enumerate(probes):
                assert probe.grad is not None
                found[router].append((probe.grad[:, first:] / SLOPE_AT_ZERO).square().flatten().cpu())
    finally:
        handle.remove()
        config.router_thresholds, config.compute, config.capacity, was_training = before
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)
    return [torch.cat(parts) for parts in states], torch.stack([torch.cat(parts) for parts in found])


def _fit(
    states: torch.Tensor, importance: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and offset of a linear model of the logarithm of the expected importance, and its values here."""
    mean, deviation = states.mean(0), states.std(0).clamp(min=1e-4)
    standard = ((states - mean) / deviation).clamp(-EDGE_OF_OUTLIERS, EDGE_OF_OUTLIERS).double()
    target = (importance.double() + 1e-4 * importance.double().mean() + 1e-30).log()
    covariance = standard.T @ standard / len(standard)
    covariance.diagonal().add_(ridge)
    weight = torch.linalg.solve(covariance, standard.T @ (target - target.mean()) / len(standard))
    weight = weight.float() / deviation
    scores = states @ weight
    # the level at which the expected importance, not its logarithm, is right
    level = (importance.double() * (-(scores - scores.mean())).double().exp()).mean().clamp(min=1e-30).log().float()
    offset = level - scores.mean()
    return weight, offset, scores + offset


def _quantile(values: torch.Tensor, share: float) -> torch.Tensor:
    """As `torch.quantile`, which refuses large inputs."""
    return values.kthvalue(max(1, round(share * len(values)))).values
