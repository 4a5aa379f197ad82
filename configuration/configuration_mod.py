"""Configuration of Mixture-of-Depths (MoD, arXiv 2404.02258)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .backbone_config import BACKBONES, MOE_BACKBONES, fields_of_source
from .config_basics import check_choice
from .routed_config import RoutedConfig, RoutedPass, check_capacities


MOD_ROUTINGS = ("expert_choice", "stochastic")
TRAINING_PATHS = ("gathered", "masked")
ROUTING_UNITS = ("block", "attention", "mlp")
# gate -> default of `router_alpha`, None where the gate has no such factor
GATES: dict[str, float | None] = {"raw": 1.0, "sigmoid": 1.0, "one_plus_tanh": 0.2, "straight_through": None}
# fields that say nothing without learned routers, with the value that stands for "not given"
_LEARNED: dict[str, Any] = {
    "gate": "raw",
    "router_alpha": None,
    "router_bias": False,
    "inference_rule": "threshold",
    "router_thresholds": None,
    "aux_loss_coef": 0.001,
    "router_z_loss_coef": 0.0,
    "compute": None,
    "compute_curve": None,
}


@strict
class MoDConfig(RoutedConfig):
    r"""
    Every field of the backbone's own configuration stands beside these.

    Args:
        backbone (`str`, *optional*, defaults to `"llama"`):
            Family of the decoder layers, see `BACKBONES`, and `MOE_BACKBONES` for MoDE (paper, section 4.3).
        num_hidden_layers (`int`, *optional*, defaults to 32):
            Number of layers.
        routed_layers (`list[int]`, *optional*):
            Layers that tokens can pass by; by default every other one, the first dense (paper, section 4.1).
        capacity (`float` or `list[float]`, *optional*, defaults to 0.125):
            Share of a row's tokens that a routed layer takes in training, in (0, 1]; one number, or one for each
            routed layer. A capacity of 1 routes nothing: every token enters.
        capacity_multiple (`int`, *optional*, defaults to 1):
            In training the number of selected tokens is rounded up to a multiple of this.
        capacity_warmup_steps (`int`, *optional*, defaults to 0):
            Training forward passes over which capacities fall from 1 along a cosine.
        routing (`str`, *optional*, defaults to `"expert_choice"`):
            `expert_choice` (section 3.3), or `stochastic`, the paper's control: tokens are drawn at random, their
            updates are not gated, and there is no router.
        routing_unit (`str`, *optional*, defaults to `"block"`):
            What a token passes by: the whole `block` (the paper), or only its `attention` or its `mlp`.
        gate (`str`, *optional*, defaults to `"raw"`):
            Factor on the update of a selected token, r being the router's logit: `raw` r (equation 1), `sigmoid`,
            `one_plus_tanh` 1 + alpha tanh(r), or `straight_through`, which is exactly 1 with the gradient of the
            sigmoid.
        router_alpha (`float`, *optional*):
            Factor on the gate, in `one_plus_tanh` on its tanh (0.2 by default there, else 1).
        router_bias (`bool`, *optional*, defaults to `False`):
            Adds a bias to the router's logits.
        inference_rule (`str`, *optional*, defaults to `"threshold"`):
            Decision outside training: `threshold` on the router's score (section 3.5, first method), `predictor`, a
            small MLP on detached inputs (second method), `ema_threshold`, a running mean of the scores at the edge of
            the top-k in training, or `topk`, which looks at future tokens and only serves to measure.
        router_thresholds (`list[float]`, *optional*):
            Thresholds on sigmoid(logit), one per routed layer; 0.5 each by default.
        predictor_hidden_size (`int`, *optional*):
            Inner width of the predictor; half of `hidden_size` by default.
        ema_decay (`float`, *optional*, defaults to 0.99):
            Decay of the running mean of `ema_threshold`.
        aux_loss_coef (`float`, *optional*, defaults to 0.001):
            Weight of the binary cross-entropy that teaches the causal rule the top-k membership.
        router_z_loss_coef (`float`, *optional*, defaults to 0.0):
            Weight of the squared logits.
        always_route_first (`int`, *optional*, defaults to 0):
            The first tokens of every row, or packed document, that enter every routed layer (attention sinks).
        training_path (`str`, *optional*, defaults to `"gathered"`):
            `gathered` computes only the tokens that enter (the paper); `masked` computes all in training, with the
            same result, so that the routers learn from those that stay out too, which get the gradient of their gate
            through its value 0.
        num_noop_experts (`int`, *optional*, defaults to 0):
            Integrated MoDE: experts without parameters and without effect, beside those of an MoE backbone.

    Raises:
        ValueError: for every invalid field or combination, with the field, the value and what is allowed.
    """

    model_type = "mod"
    # as in the configurations of both MoE backbones
    attribute_map = {"num_experts": "num_local_experts"}
    backbones: ClassVar[tuple[str, ...]] = BACKBONES + MOE_BACKBONES
    inference_rules: ClassVar[tuple[str, ...]] = ("threshold", "predictor", "ema_threshold", "topk")

    routed_layers: list[int] | None = None
    capacity: float | int | list[float | int] = 0.125
    capacity_multiple: int = 1
    routing: str = "expert_choice"
    routing_unit: str = "block"
    gate: str = "raw"
    router_alpha: float | int | None = None
    predictor_hidden_size: int | None = None
    ema_decay: float | int = 0.99
    always_route_first: int = 0
    training_path: str = "gathered"
    num_noop_experts: int = 0

    def __post_init__(self, **kwargs):
        self._resolve_layers()
        self._resolve_routing()
        super().__post_init__(**kwargs)
        self._resolve_experts()
        self.repeat_layer_fields(list(range(self.num_hidden_layers)))

    def _resolve_layers(self) -> None:
        depth = self.num_hidden_layers
        if self.routed_layers is None:
            self.routed_layers = list(range(1, depth, 2))
        layers = self.routed_layers
        if sorted(set(layers)) != layers or any(not 0 <= layer < depth for layer in layers):
            raise ValueError(
                f"`routed_layers` is {layers}, but must be ascending layers from 0 to {depth - 1} "
                f"(`num_hidden_layers` is {depth})."
            )
        if isinstance(self.capacity, list) and len(self.capacity) != len(layers):
            raise ValueError(
                f"`capacity` has {len(self.capacity)} entries, but must be one number or have one for each of the "
                f"{len(layers)} routed layers."
            )
        check_capacities("capacity", self.capacities)

    def _resolve_routing(self) -> None:
        check_choice("routing", self.routing, MOD_ROUTINGS)
        check_choice("routing_unit", self.routing_unit, ROUTING_UNITS)
        check_choice("gate", self.gate, tuple(GATES))
        check_choice("training_path", self.training_path, TRAINING_PATHS)
        if self.routing == "stochastic":
            for field, default in _LEARNED.items():
                if getattr(self, field) != default:
                    raise ValueError(
                        f"`{field}` is {getattr(self, field)!r}, but routing='stochastic' has no router; leave it out."
                    )
        else:
            if self.router_thresholds is None:
                self.router_thresholds = [0.5] * len(self.routed_layers)
            if len(self.router_thresholds) != len(self.routed_layers):
                raise ValueError(
                    f"`router_thresholds` has {len(self.router_thresholds)} entries, but must have one for each of "
                    f"the {len(self.routed_layers)} routed layers."
                )
            self._resolve_alpha()
        if self.inference_rule not in ("predictor", "topk") and self.predictor_hidden_size is not None:
            raise ValueError(
                f"`predictor_hidden_size` is {self.predictor_hidden_size}, but only inference_rule='predictor' has "
                "predictors; leave it out."
            )
        for field, least in (("capacity_multiple", 1), ("always_route_first", 0), ("num_noop_experts", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"`{field}` is {getattr(self, field)}, but must be at least {least}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` is {self.ema_decay}, but must be at least 0 and below 1.")
        self._check_shared()

    def _resolve_alpha(self) -> None:
        default = GATES[self.gate]
        if default is None and self.router_alpha is not None:
            raise ValueError(
                f"`router_alpha` is {self.router_alpha}, but gate={self.gate!r} is always 1; leave it out."
            )
        self.router_alpha = default if self.router_alpha is None else self.router_alpha
        if self.router_alpha is not None and self.router_alpha <= 0:
            raise ValueError(f"`router_alpha` is {self.router_alpha}, but must be positive.")

    def _resolve_experts(self) -> None:
        if self.num_noop_experts and self.backbone not in MOE_BACKBONES:
            raise ValueError(
                f"`num_noop_experts` is {self.num_noop_experts}, but {self.backbone} has no experts; use a "
                f"backbone of {', '.join(map(repr, MOE_BACKBONES))}."
            )
        if self.inference_rule == "predictor" and self.predictor_hidden_size is None:
            self.predictor_hidden_size = max(self.hidden_size // 2, 1)
        if self.predictor_hidden_size is not None and self.predictor_hidden_size < 1:
            raise ValueError(f"`predictor_hidden_size` is {self.predictor_hidden_size}, but must be at least 1.")

    def validate_routing(self) -> None:
        """Run by transformers at construction and before saving."""
        self._resolve_layers()
        self._resolve_routing()

    @property
    def capacities(self) -> list[float]:
        """Capacity of each routed layer."""
        return list(self.capacity) if isinstance(self.capacity, list) else [self.capacity] * len(self.routed_layers)

    @capacities.setter
    def capacities(self, capacities: list[float]) -> None:
        self.capacity = capacities[0] if len(set(capacities)) == 1 else list(capacities)

    @property
    def routed_passes(self) -> list[RoutedPass]:
        """One for each routed layer."""
        return [
            RoutedPass((layer,), capacity, capacity == 1, self.routing_unit)
            for layer, capacity in zip(self.routed_layers, self.capacities, strict=True)
        ]

    @property
    def num_routers(self) -> int:
        return len(self.routed_layers) if self.routing == "expert_choice" else 0

    @classmethod
    def from_backbone(cls, source_config: PreTrainedConfig, **mod_fields: Any) -> "MoDConfig":
        """The configuration of a MoD of the same layers as a vanilla model.

        Args:
            source_config (`PreTrainedConfig`): configuration of a family in `BACKBONES` or `MOE_BACKBONES`.
            mod_fields: fields of this class.

        Raises:
            ValueError: for a family that is not supported or an invalid combination of fields.
        """
        return cls(**{**fields_of_source(source_config, cls.backbones), **mod_fields})
