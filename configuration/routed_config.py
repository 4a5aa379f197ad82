"""What the configurations of all architectures with per-token depth have in common."""

from typing import Any, ClassVar, NamedTuple

from huggingface_hub.dataclasses import strict

from .backbone_config import BackboneConfig
from .config_basics import check_choice


class RoutedPass(NamedTuple):
    """Layers that a token enters, or passes by, as one: a recursion of a block (MoR), or a routed layer (MoD).

    Attributes:
        slots: unrolled layers, which are also their KV cache slots.
        share: expected share of the tokens that enter.
        always: every token enters by construction; the pass is then run and stored as in a vanilla model.
        unit: what of its layers is routed: `block`, `attention` or `mlp`.
        writes_kv: keys and values are computed here, not read from an earlier pass.
    """

    slots: tuple[int, ...]
    share: float
    always: bool
    unit: str = "block"
    writes_kv: bool = True

    @property
    def stores_partly(self) -> bool:
        """Whether the cache slots hold only the tokens that entered."""
        return self.writes_kv and not self.always and self.unit != "mlp"


@strict
class RoutedConfig(BackboneConfig):
    r"""
    Args:
        capacity_warmup_steps (`int`, *optional*, defaults to 0):
            Training forward passes over which capacities fall from 1 along a cosine.
        router_bias (`bool`, *optional*, defaults to `False`):
            Adds a bias to the router's logits.
        inference_rule (`str`, *optional*, defaults to `"threshold"`):
            How expert-choice routers decide outside training.
        router_thresholds (`list[float]`, *optional*):
            Thresholds on sigmoid(logit), one per pass; 0.5 each by default.
        aux_loss_coef (`float`, *optional*, defaults to 0.001):
            Weight of the binary cross-entropy that teaches the causal rule the top-k membership.
        router_z_loss_coef (`float`, *optional*, defaults to 0.0):
            Weight of the squared logits (token choice: of their log-sum-exp).
        compute (`float`, *optional*):
            Operating point on `compute_curve`: FLOPs of the decoder layers as a share of those that all tokens in all
            layers would take. By default `router_thresholds` decide.
        compute_curve (`list[dict]`, *optional*):
            Operating points that calibration measured, `{"compute": 0.75, "thresholds": [...]}`, thresholds as in
            `router_thresholds`, in ascending order of compute.
    """

    keys_to_ignore_at_inference = [
        "cache", "past_key_values", "aux_loss", "routing_mask", "router_logits", "decision_logits",
    ]  # fmt: skip
    inference_rules: ClassVar[tuple[str, ...]] = ("threshold", "predictor", "topk")

    capacity_warmup_steps: int = 0
    router_bias: bool = False
    inference_rule: str = "threshold"
    router_thresholds: list[float | int] | None = None
    aux_loss_coef: float | int = 0.001
    router_z_loss_coef: float | int = 0.0
    compute: float | int | None = None
    compute_curve: list[dict[str, Any]] | None = None

    @property
    def routed_passes(self) -> list[RoutedPass]:
        """All passes in the order in which a token meets them."""
        raise NotImplementedError

    @property
    def num_routers(self) -> int:
        raise NotImplementedError

    @property
    def current_thresholds(self) -> list[float]:
        """Threshold of each router on sigmoid(logit), at `compute` if it is set."""
        thresholds = self.router_thresholds if self.compute is None else self.thresholds_at(self.compute)
        return list(thresholds) * (self.num_routers // len(thresholds)) if thresholds else []

    def thresholds_at(self, compute: float) -> list[float]:
        """Thresholds at an operating point, linear between the calibrated ones.

        Raises:
            ValueError: without a calibrated curve, and for a point outside of it.
        """
        curve = self.compute_curve
        if not curve:
            raise ValueError(
                f"`compute` is {compute}, but the checkpoint has no calibrated `compute_curve`; run "
                "`varidepth calibrate` on it first, or leave `compute` out."
            )
        points = [point["compute"] for point in curve]
        if not points[0] <= compute <= points[-1]:
            raise ValueError(
                f"`compute` is {compute}, but the calibrated curve of this checkpoint goes from {points[0]:.3g} to "
                f"{points[-1]:.3g}; choose a number between them."
            )
        above = next(i for i, point in enumerate(points) if compute <= point)
        if compute == points[above]:
            return list(curve[above]["thresholds"])
        low, high = curve[above - 1], curve[above]
        weight = (compute - low["compute"]) / (high["compute"] - low["compute"])
        return [a + weight * (b - a) for a, b in zip(low["thresholds"], high["thresholds"], strict=True)]

    def _check_shared(self) -> None:
        """Checks the fields of this class.

        Raises:
            ValueError: with the field, the value and what is allowed.
        """
        check_choice("inference_rule", self.inference_rule, self.inference_rules)
        for field in ("capacity_warmup_steps", "aux_loss_coef", "router_z_loss_coef"):
            if getattr(self, field) < 0:
                raise ValueError(f"`{field}` is {getattr(self, field)}, but must be zero or positive.")
        if self.router_thresholds is not None:
            check_thresholds("router_thresholds", self.router_thresholds)
        for i, point in enumerate(self.compute_curve or []):
            if set(point) != {"compute", "thresholds"} or not isinstance(point["thresholds"], list):
                raise ValueError(
                    f"`compute_curve` has {point} at index {i}, but each point must be a dictionary of `compute` and "
                    "`thresholds`."
                )
            check_thresholds(f"compute_curve[{i}]['thresholds']", point["thresholds"])
            if self.router_thresholds is not None and len(point["thresholds"]) != len(self.router_thresholds):
                raise ValueError(
                    f"`compute_curve[{i}]` has {len(point['thresholds'])} thresholds, but `router_thresholds` has "
                    f"{len(self.router_thresholds)}; calibrate again."
                )
        points = [point["compute"] for point in self.compute_curve or []]
        if sorted(set(points)) != points:
            raise ValueError(f"`compute_curve` has the points {points}, but they must ascend.")
        if self.compute is not None:
            self.thresholds_at(self.compute)


def check_thresholds(field: str, thresholds: list[float]) -> None:
    """Raises a `ValueError` unless all thresholds can apply to sigmoid(logit)."""
    if any(not 0 <= threshold <= 1 for threshold in thresholds):
        raise ValueError(
            f"`{field}` is {thresholds}, but thresholds apply to sigmoid(logit) and must be between 0 and 1."
        )


def check_capacities(field: str, capacities: list[float]) -> None:
    """Raises a `ValueError` unless all capacities are shares of the tokens."""
    if any(not 0 < capacity <= 1 for capacity in capacities):
        raise ValueError(f"`{field}` is {capacities}, but a capacity must be above 0 and at most 1.")
