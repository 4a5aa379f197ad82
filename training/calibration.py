"""Thresholds measured on text, so that the causal rule of expert choice spends the compute that is wanted.

Training leaves scores whose thresholds need not let in the share of tokens that the capacities name. Calibration
finds, for several operating points between "everyone enters" and half of the capacities, the thresholds at which each
pass gets its share; the points make the curve that `compute` of the configuration and of `generate` moves along.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..analysis.cost import RowRouting, forward_flops, full_routing
from ..configuration.routed_config import RoutedConfig
from ..modeling.token_routing import logit_threshold


POSITIONS = (0.05, 0.35, 0.7, 1.0, 1.5)
LOWEST = 1.9
TOLERANCE = 0.01  # of a pass's share
CORRECTIONS = 2
LARGEST_LOGIT = 30.0  # above it the sigmoid is too close to 1 to tell scores apart; near 0 it can


@dataclass(frozen=True)
class PassCalibration:
    """One pass at the chosen operating point.

    Attributes:
        slots: its unrolled layers.
        wanted: share of the tokens that should enter.
        share: share that enters by the causal rule.
        accuracy, precision, recall: agreement of the rule with top-k membership, over the candidates.
    """

    slots: tuple[int, ...]
    wanted: float
    share: float
    accuracy: float
    precision: float
    recall: float


@dataclass(frozen=True)
class Calibration:
    """
    Attributes:
        compute: FLOPs of the decoder layers at the chosen point, as a share of those that all tokens in all layers
            take.
        passes: those that only some tokens enter.
        loss_full, loss_topk, loss_causal: nats per token when everyone enters, when the top-k of each row enter, and
            by the causal rule.
        tokens: predicted tokens.
        curve: the operating points, as in the configuration.
    """

    compute: float
    passes: tuple[PassCalibration, ...]
    loss_full: float
    loss_topk: float
    loss_causal: float
    tokens: int
    curve: tuple[dict[str, Any], ...]

    def table(self) -> str:
        """The report as text for a terminal."""
        lines = ["layers   wanted   share   accuracy   precision   recall"]
        for p in self.passes:
            layers = f"{p.slots[0]}-{p.slots[-1]}" if len(p.slots) > 1 else str(p.slots[0])
            shares = f"{p.wanted:6.3f}  {p.share:6.3f}"
            lines.append(f"{layers:<7}  {shares}   {p.accuracy:8.3f}   {p.precision:9.3f}   {p.recall:6.3f}")
        lines += [
            "",
            f"compute  {self.compute:.3f} of all tokens in all layers",
            f"loss     {self.loss_causal:.4f} nats per token by the causal rule, {self.loss_topk:.4f} with top-k, "
            f"{self.loss_full:.4f} with all tokens ({self.tokens} tokens)",
            "curve    " + ", ".join(f"{point['compute']:.3f}" for point in self.curve),
        ]
        return "\n".join(lines)


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    *,
    compute: float | None = None,
    positions: Sequence[float] = POSITIONS,
) -> Calibration:
    """Sets `router_thresholds` and `compute_curve` of the model's configuration; its weights do not change.

    Args:
        model (`PreTrainedModel`): a causal language model with expert-choice routers.
        batches: token ids of shape `(batch, seq_len)` without pads; some thousand tokens are enough.
        compute (`float`, *optional*):
            Wanted share of the FLOPs that all tokens in all layers take; by default that of `config.capacities`.
        positions (`list[float]`):
            Further points of the curve: 0 is everyone, 1 the capacities, 2 nobody, linear between. Each takes one to
            three runs over the text.

    Returns:
        `Calibration`

    Raises:
        ValueError: if the model has no routers that take their tokens, the compute is out of reach, a router gives all
            tokens the same score, or there is no text; then nothing is changed.
    """
    config: Any = model.config
    if getattr(config, "routing", None) != "expert_choice":
        raise ValueError(
            f"routing is {getattr(config, 'routing', None)!r}, but only routers with routing='expert_choice' have "
            "thresholds to calibrate."
        )
    batches = [ids.to(model.device) for ids in batches]
    if not sum(ids[:, 1:].numel() for ids in batches):
        raise ValueError("The batches hold no token with a next one: give rows of at least two tokens.")
    length = max(ids.shape[1] for ids in batches)
    capacities = list(config.capacities)
    if all(capacity == 1 for capacity in capacities):
        raise ValueError("All capacities are 1, so that every token enters; set the capacities to be calibrated for.")
    chosen = 1.0 if compute is None else _position_of(config, capacities, compute, length)
    with _by_thresholds(model):
        run = everyone = _run(model, batches, [0.0] * len(config.routed_passes))
        points = {}
        for position in sorted({*positions, chosen}):
            wanted = _pass_shares(config, shares_at(capacities, position))
            thresholds, run = _meet(model, batches, wanted, run)
            points[position] = thresholds, run
    thresholds, run = points[chosen]
    topk = _run_topk(model, batches, shares_at(capacities, chosen))

    curve = [{"compute": measured.compute, "thresholds": values} for values, measured in points.values()]
    curve.append({"compute": 1.0, "thresholds": [0.0] * len(thresholds)})
    config.router_thresholds = thresholds
    config.compute_curve = _ascending(curve)
    # a running mean decides only where no operating point is set
    config.compute = run.compute if config.inference_rule == "ema_threshold" else None
    wanted = _pass_shares(config, shares_at(capacities, chosen))
    passes = [
        _agreement(topk, number, p.slots, wanted[number], run.shares[number], logit_threshold(thresholds[number]))
        for number, p in enumerate(config.routed_passes)
        if not p.always
    ]
    return Calibration(
        run.compute, tuple(passes), everyone.loss, topk.loss, run.loss, run.tokens, tuple(config.compute_curve)
    )


def shares_at(capacities: list[float], position: float) -> list[float]:
    """Shares of the tokens at a position on the curve: 1 at 0, the capacities at 1, none at 2."""
    return [1 - position * (1 - c) if position <= 1 else c * (2 - position) if c < 1 else 1.0 for c in capacities]


def layer_flops(config: Any, length: int, entered: Sequence[Any] | None = None) -> float:
    """FLOPs of the decoder layers for one row.

    Args:
        length: tokens of the row.
        entered: tokens that enter each pass of `config.routed_passes`; by default all.
    """
    routing = full_routing(config, length)
    if entered is not None:
        routing = RowRouting(length, tuple(entered), 0, (0,) * len(entered))
    return forward_flops(config, routing, logits=0).total


def _pass_shares(config: RoutedConfig, shares: list[float]) -> list[float]:
    return shares * (len(config.routed_passes) // len(shares))


def _position_of(config: RoutedConfig, capacities: list[float], compute: float, length: int) -> float:
    def compute_at(position: float) -> float:
        entered = [share * length for share in _pass_shares(config, shares_at(capacities, position))]
        return layer_flops(config, length, entered) / layer_flops(config, length)

    if not compute_at(LOWEST) <= compute < 1:
        raise ValueError(
            f"`compute` is {compute}, but the routed layers of this model allow {compute_at(LOWEST):.3f} to 1 (not "
            "included: that is every token in every layer)."
        )
    low, high = 0.0, LOWEST
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if compute_at(middle) > compute else (low, middle)
    return round(high, 6)


@dataclass
class _Measured:
    """What one run over the text shows; tensors of shape `(tokens, passes)`, `forced` of shape `(tokens,)`."""

    loss: float
    tokens: int
    entered: torch.Tensor
    scores: torch.Tensor
    forced: torch.Tensor
    compute: float

    @property
    def shares(self) -> list[float]:
        return self.entered.double().mean(dim=0).tolist()


def _run(model: PreTrainedModel, batches: list[torch.Tensor], thresholds: list[float] | None) -> _Measured:
    if thresholds is not None:
        model.config.router_thresholds = thresholds
    nats, tokens = 0.0, 0
    entered, scores, forced = [], [], []
    spent = whole = 0.0
    first = getattr(model.config, "always_route_first", 0)
    for ids in batches:
        output = model(ids, use_cache=False, output_routing=True)
        logits = output.logits[:, :-1].float()
        nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        tokens += ids[:, 1:].numel()
        for row in output.routing_mask.sum(dim=1).tolist():
            spent += layer_flops(model.config, ids.shape[1], row)
        whole += layer_flops(model.config, ids.shape[1]) * ids.shape[0]
        entered.append(output.routing_mask.flatten(0, 1))
        scores.append(output.decision_logits.flatten(0, 1))
        forced.append((torch.arange(ids.shape[1], device=ids.device) < first).repeat(ids.shape[0]))
    found = torch.cat(entered), torch.cat(scores), torch.cat(forced)
    return _Measured(nats / tokens, tokens, *found, compute=spent / whole)


def _run_topk(model: PreTrainedModel, batches: list[torch.Tensor], capacities: list[float]) -> _Measured:
    config = model.config
    before = config.capacities, config.inference_rule, model.training
    config.capacities, config.inference_rule = capacities, "topk"
    model.eval()
    try:
        return _run(model, batches, None)
    finally:
        config.capacities, config.inference_rule = before[:2]
        model.train(before[2])


def _meet(
    model: PreTrainedModel, batches: list[torch.Tensor], wanted: list[float], run: _Measured
) -> tuple[list[float], _Measured]:
    """Thresholds by which each pass gets its wanted share, and the run that shows it.

    Args:
        run: a run in which no pass had fewer tokens; its scores are where the search starts.
    """
    for _ in range(1 + CORRECTIONS):
        thresholds = _thresholds(model.config, run, [round(share * len(run.entered)) for share in wanted])
        run = _run(model, batches, thresholds)
        if max(abs(share - goal) for share, goal in zip(run.shares, wanted, strict=True)) <= TOLERANCE:
            break
    return thresholds, run


def _thresholds(config: Any, run: _Measured, counts: list[int]) -> list[float]:
    """Thresholds on the sigmoid at which as many tokens enter as `counts` says, by the scores of a run."""
    thresholds = []
    for router, p in enumerate(config.routed_passes):
        if p.always:
            thresholds.append(0.0)
            continue
        free = ~run.scores[:, router].isnan() & ~run.forced
        ranked = run.scores[free, router].double().sort(descending=True).values
        count = counts[router] - int((run.entered[:, router] & run.forced).sum())
        if len(ranked) > 1 and ranked[0] == ranked[-1]:
            raise ValueError(
                f"The scores of router {router} are tied, and no threshold can tell such tokens apart; train it, or "
                "start it with `start_routers` (MoR) or `start_by_importance` (MoD)."
            )
        if not 0 < count < len(ranked):
            edge = float(ranked[-1]) - 1 if count else float(ranked[0]) + 1
        else:
            edge = float(ranked[count - 1] + ranked[count]) / 2
        if edge > LARGEST_LOGIT:
            raise ValueError(
                f"The scores of router {router} are about {edge:.0f} where tokens are to be parted, and above "
                f"{LARGEST_LOGIT:.0f} a sigmoid cannot tell them apart; train longer, or scale the router's weights."
            )
        thresholds.append(1 / (1 + math.exp(min(-edge, 700.0))))
    return thresholds


def _agreement(
    topk: _Measured, number: int, slots: tuple[int, ...], wanted: float, share: float, threshold: float
) -> PassCalibration:
    candidates = ~topk.scores[:, number].isnan()
    members = topk.entered[candidates, number]
    predicted = (topk.scores[candidates, number] >= threshold) | topk.forced[candidates]
    hits = int((members & predicted).sum())
    return PassCalibration(
        slots,
        wanted,
        share,
        accuracy=float((members == predicted).double().mean()),
        precision=hits / max(int(predicted.sum()), 1),
        recall=hits / max(int(members.sum()), 1),
    )


def _ascending(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorted by compute, without points that measured the same compute."""
    points = {round(point["compute"], 6): point for point in curve}
    return [{"compute": compute, "thresholds": points[compute]["thresholds"]} for compute in sorted(points)]


@contextmanager
def _by_thresholds(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode, decided by `router_thresholds`; puts the configuration back afterwards."""
    config, was_training = model.config, model.training
    before = config.router_thresholds, config.compute, config.inference_rule
    config.compute = None
    if config.inference_rule != "predictor":
        config.inference_rule = "threshold"
    model.eval()
    try:
        yield
    finally:
        config.router_thresholds, config.compute, config.inference_rule = before
        model.train(was_training)
