"""Configuration of Mixture-of-Recursions (MoR, arXiv 2507.10524)."""

from typing import Any, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .backbone_config import PER_LAYER_FIELDS, fields_of_source, first_uses
from .config_basics import check_choice
from .routed_config import RoutedConfig, RoutedPass, check_capacities


SHARINGS = ("cycle", "sequence", "middle_cycle", "middle_sequence")
ROUTINGS = ("expert_choice", "token_choice", "none")
ROUTER_TYPES = {"linear": 0, "mlp": 2, "wide_mlp": 4}  # inner width as a multiple of the hidden size
ROUTER_ACTIVATIONS = {"expert_choice": ("sigmoid", "tanh"), "token_choice": ("softmax", "sigmoid"), "none": ()}
ROUTER_ALPHAS = {"expert_choice": 0.1, "token_choice": 1.0, "none": None}
GATINGS = ("weighted", "additive", "interpolate")
BALANCINGS = ("loss", "loss_free")
KV_MODES = ("recursion", "shared")
# fields that only some routings use, with the value that stands for "not given"
_EXPERT, _TOKEN, _ROUTED = ("expert_choice",), ("token_choice",), ("expert_choice", "token_choice")
USED_BY = {
    "capacities": (None, _EXPERT),
    "router_thresholds": (None, _EXPERT),
    "capacity_warmup_steps": (0, _EXPERT),
    "inference_rule": ("threshold", _EXPERT),
    "aux_loss_coef": (0.001, _EXPERT),
    "compute": (None, _EXPERT),
    "compute_curve": (None, _EXPERT),
    "balancing": ("loss", _TOKEN),
    "balancing_coef": (0.1, _TOKEN),
    "balancing_update_rate": (0.001, _TOKEN),
    "gating": ("weighted", _ROUTED),
    "router_type": ("linear", _ROUTED),
    "router_bias": (False, _ROUTED),
    "router_activation": (None, _ROUTED),
    "router_alpha": (None, _ROUTED),
    "router_z_loss_coef": (0.0, _ROUTED),
}
FUSED_QKV_BACKBONES = ("phi3",)


class RecursiveBlock(NamedTuple):
    """Consecutive layers that are applied `num_recursions` times.

    Attributes:
        start: first unrolled index, which is also the first KV cache slot.
        layers: physical layers of one pass; pass r, layer j uses slot `start + r * len(layers) + j`.
    """

    start: int
    layers: tuple[int, ...]


@strict
class MoRConfig(RoutedConfig):
    r"""
    Every field of the backbone's own configuration stands beside these.

    Args:
        backbone (`str`, *optional*, defaults to `"llama"`):
            Family of the decoder layers, see `BACKBONES`.
        num_hidden_layers (`int`, *optional*, defaults to 32):
            Unrolled depth: `prelude_layers + num_recursions * num_shared_layers + coda_layers`.
        num_recursions (`int`, *optional*, defaults to 2):
            N_r, how often a shared layer can be applied.
        sharing (`str`, *optional*, defaults to `"middle_cycle"`):
            Which unrolled layers share parameters (paper, Table 1). `cycle`: the whole shared block is repeated;
            `sequence`: each shared layer is repeated in place. The `middle_` forms have unique layers around them.
        prelude_layers, coda_layers (`int`, *optional*):
            Unique layers before and after; 1 and 1 for the `middle_` forms, else 0 and 0.
        routing (`str`, *optional*, defaults to `"expert_choice"`):
            `expert_choice` (section 2.2.1), `token_choice`, or `none` for a plain recursive transformer.
        capacities (`list[float]`, *optional*):
            Expert choice: share of all tokens that enters recursion r in training, non-increasing, in (0, 1]. Defaults
            to (N_r - r) / N_r for r = 0 .. N_r - 1. A capacity of 1 routes nothing: every token enters.
        capacity_warmup_steps (`int`, *optional*, defaults to 0):
            Training forward passes over which capacities fall from 1 along a cosine.
        router_type (`str`, *optional*, defaults to `"linear"`):
            `linear`, `mlp` (hidden width x2) or `wide_mlp` (x4, as in the paper's text).
        router_bias (`bool`, *optional*, defaults to `False`):
            Adds a bias to the router's logits. Conversion uses it to start with every token at full depth.
        router_activation (`str`, *optional*):
            G in equation 2.1: `sigmoid` (default) or `tanh` for expert choice; `softmax` (default) or `sigmoid` for
            token choice.
        router_alpha (`float`, *optional*):
            Factor on the gate; 0.1 for expert choice, 1.0 for token choice.
        gating (`str`, *optional*, defaults to `"weighted"`):
            With f the block and g the gate: `weighted` H + g f(H) (the paper), `additive` H + f(H), `interpolate`
            H + g (f(H) - H), which is f(H) exactly at g = 1.
        inference_rule (`str`, *optional*, defaults to `"threshold"`):
            Expert choice outside training: `threshold` on the router's score, `predictor` (a second router trained on
            detached inputs to predict membership), or `topk`, which looks at future tokens and only serves to measure.
        router_thresholds (`list[float]`, *optional*):
            Thresholds on sigmoid(logit), 0.5 each by default: one per recursion, or one per block and recursion, block
            by block.
        aux_loss_coef (`float`, *optional*, defaults to 0.001):
            Expert choice: weight of the binary cross-entropy that teaches the causal rule the top-k membership.
        router_z_loss_coef (`float`, *optional*, defaults to 0.0):
            Weight of the squared log-sum-exp of the router's logits.
        balancing (`str`, *optional*, defaults to `"loss"`):
            Token choice: `loss` (weight `balancing_coef`) or `loss_free` (a bias on the choice, moved by
            `balancing_update_rate` after every training forward pass).
        kv_mode (`str`, *optional*, defaults to `"recursion"`):
            `recursion`: each recursion keeps the keys and values of the tokens that entered it; `shared`: all
            recursions read those of the first one.
        recursion_rank (`int`, *optional*, defaults to 0):
            Rank of the difference that each recursion adds to every matrix of the shared layers (relaxed recursion,
            arXiv 2410.20672), those of keys and values left out where `kv_mode` is "shared"; 0 for none.
        recursion_norms (`bool`, *optional*, defaults to `False`):
            Gives each recursion its own norms in the shared layers.

    Raises:
        ValueError: for every invalid field or combination, with the field, the value and what is allowed.
    """

    model_type = "mor"

    num_recursions: int = 2
    sharing: str = "middle_cycle"
    prelude_layers: int | None = None
    coda_layers: int | None = None
    routing: str = "expert_choice"
    capacities: list[float | int] | None = None
    router_type: str = "linear"
    router_activation: str | None = None
    router_alpha: float | int | None = None
    gating: str = "weighted"
    balancing: str = "loss"
    balancing_coef: float | int = 0.1
    balancing_update_rate: float | int = 0.001
    kv_mode: str = "recursion"
    recursion_rank: int = 0
    recursion_norms: bool = False

    def __post_init__(self, **kwargs):
        self._resolve_sharing()
        self._resolve_routing()
        super().__post_init__(**kwargs)
        self.repeat_layer_fields(self.physical_layers)

    def _resolve_sharing(self) -> None:
        check_choice("sharing", self.sharing, SHARINGS)
        unique = 1 if self.sharing.startswith("middle_") else 0
        self.prelude_layers = unique if self.prelude_layers is None else self.prelude_layers
        self.coda_layers = unique if self.coda_layers is None else self.coda_layers
        for field, least in (("num_recursions", 1), ("prelude_layers", 0), ("coda_layers", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"`{field}` is {getattr(self, field)}, but must be at least {least}.")
        if unique and not self.prelude_layers + self.coda_layers:
            raise ValueError(
                f"`sharing` is {self.sharing!r} with no prelude and no coda layer; use "
                f"{self.sharing.removeprefix('middle_')!r} or give `prelude_layers` or `coda_layers`."
            )
        if self.recursion_rank < 0:
            raise ValueError(f"`recursion_rank` is {self.recursion_rank}, but must be 0 (none) or positive.")
        for field in ("recursion_rank", "recursion_norms"):
            if getattr(self, field) and self.num_recursions == 1:
                raise ValueError(
                    f"`{field}` is {getattr(self, field)}, but with one recursion nothing is shared; leave it out or "
                    "use `num_recursions` of 2 or more."
                )
        looped = self.num_hidden_layers - self.prelude_layers - self.coda_layers
        if looped < self.num_recursions or looped % self.num_recursions:
            fits = max(looped // self.num_recursions, 1) * self.num_recursions
            raise ValueError(
                f"`num_hidden_layers` is {self.num_hidden_layers}, of which {self.prelude_layers} prelude and "
                f"{self.coda_layers} coda layers leave {looped}, but a positive multiple of `num_recursions` "
                f"({self.num_recursions}) is needed; use num_hidden_layers="
                f"{fits + self.prelude_layers + self.coda_layers} or change the prelude and coda."
            )

    def _resolve_routing(self) -> None:
        check_choice("routing", self.routing, ROUTINGS)
        check_choice("router_type", self.router_type, tuple(ROUTER_TYPES))
        check_choice("gating", self.gating, GATINGS)
        check_choice("balancing", self.balancing, BALANCINGS)
        check_choice("kv_mode", self.kv_mode, KV_MODES)
        activations = ROUTER_ACTIVATIONS[self.routing]
        if self.routing == "expert_choice":
            self._resolve_capacities()
        for field, (default, users) in USED_BY.items():
            if self.routing not in users and getattr(self, field) != default:
                allowed = " or ".join(map(repr, users))
                raise ValueError(
                    f"`{field}` is {getattr(self, field)!r}, but only routing={allowed} uses it; "
                    f"leave it out with routing={self.routing!r}."
                )
        if self.routing != "none":
            self.router_activation = self.router_activation or activations[0]
            if self.router_activation not in activations:
                raise ValueError(
                    f"`router_activation` is {self.router_activation!r}, but must be one of "
                    f"{', '.join(map(repr, activations))} with routing={self.routing!r}."
                )
            if self.router_alpha is None:
                self.router_alpha = 1.0 if self.gating == "interpolate" else ROUTER_ALPHAS[self.routing]
            if self.router_alpha <= 0:
                raise ValueError(f"`router_alpha` is {self.router_alpha}, but must be positive.")
        for field in ("balancing_coef", "balancing_update_rate"):
            if getattr(self, field) < 0:
                raise ValueError(f"`{field}` is {getattr(self, field)}, but must be zero or positive.")
        self._check_shared()
        if self.kv_mode == "shared" and self.backbone in FUSED_QKV_BACKBONES:
            raise ValueError(
                f"`kv_mode` is 'shared', but {self.backbone} computes queries, keys and values in one product, so "
                "that keys and values cannot be skipped; use kv_mode='recursion'."
            )

    def _resolve_capacities(self) -> None:
        n = self.num_recursions
        if self.capacities is None:
            self.capacities = [(n - r) / n for r in range(n)]
        if self.router_thresholds is None:
            self.router_thresholds = [0.5] * n
        if len(self.capacities) != n:
            raise ValueError(
                f"`capacities` has {len(self.capacities)} entries, but must have one per recursion "
                f"(`num_recursions` is {n})."
            )
        if len(self.router_thresholds) not in (n, self.num_routers):
            raise ValueError(
                f"`router_thresholds` has {len(self.router_thresholds)} entries, but must have one per recursion "
                f"(`num_recursions` is {n})"
                + (f" or one per router ({self.num_routers})." if self.num_routers != n else ".")
            )
        check_capacities("capacities", self.capacities)
        if sorted(self.capacities, reverse=True) != self.capacities:
            raise ValueError(
                f"`capacities` is {self.capacities}, but must be non-increasing: a token that left never comes back."
            )
        if self.kv_mode == "shared" and self.capacities[0] != 1:
            raise ValueError(
                f"`kv_mode` is 'shared' and `capacities` starts with {self.capacities[0]}, but the keys and values "
                "that all recursions read come from the first one, which every token must enter; set the first "
                "capacity to 1.0 or use kv_mode='recursion'."
            )

    def validate_routing(self) -> None:
        """Run by transformers at construction and before saving."""
        self._resolve_sharing()
        self._resolve_routing()

    @property
    def num_shared_layers(self) -> int:
        """Layers of the shared block (b in the paper), each of which is applied up to `num_recursions` times."""
        return (self.num_hidden_layers - self.prelude_layers - self.coda_layers) // self.num_recursions

    @property
    def num_physical_layers(self) -> int:
        """Layers that exist: prelude, shared and coda."""
        return self.prelude_layers + self.num_shared_layers + self.coda_layers

    @property
    def physical_layers(self) -> list[int]:
        """Physical layer of each unrolled layer (paper, Table 1)."""
        p, b, n = self.prelude_layers, self.num_shared_layers, self.num_recursions
        sequence = self.sharing.endswith("sequence")
        shared = [p + (i // n if sequence else i % b) for i in range(b * n)]
        return [*range(p), *shared, *range(p + b, p + b + self.coda_layers)]

    @property
    def recursive_blocks(self) -> list[RecursiveBlock]:
        """One block of all shared layers for the cycle forms, one block per shared layer for the sequence forms."""
        p, b, n = self.prelude_layers, self.num_shared_layers, self.num_recursions
        if self.sharing.endswith("sequence"):
            return [RecursiveBlock(p + i * n, (p + i,)) for i in range(b)]
        return [RecursiveBlock(p, tuple(range(p, p + b)))]

    @property
    def routed_passes(self) -> list[RoutedPass]:
        """One for each block and recursion, block by block."""
        n = self.num_recursions
        shares = self.capacities if self.routing == "expert_choice" else [(n - r) / n for r in range(n)]
        passes = []
        for block in self.recursive_blocks:
            width = len(block.layers)
            for r in range(n):
                start = block.start + r * width
                slots = tuple(range(start, start + width))
                share = 1.0 if self.routing == "none" else shares[r]
                always = self.routing == "none" or (r == 0 if self.routing == "token_choice" else share == 1)
                passes.append(RoutedPass(slots, share, always, writes_kv=r == 0 or self.kv_mode == "recursion"))
        return passes

    @property
    def varies_by_recursion(self) -> bool:
        """Whether shared layers have parameters of their own at each recursion."""
        return self.recursion_rank > 0 or self.recursion_norms

    @property
    def num_routers(self) -> int:
        """Expert choice has a router per block and recursion, token choice one per block."""
        per_block = {"expert_choice": self.num_recursions, "token_choice": 1, "none": 0}[self.routing]
        return per_block * len(self.recursive_blocks)

    @classmethod
    def from_backbone(
        cls,
        source_config: PreTrainedConfig,
        *,
        num_recursions: int,
        source_layers: list[int] | None = None,
        **mor_fields: Any,
    ) -> "MoRConfig":
        """The configuration of a MoR built from a vanilla one.

        Args:
            source_config (`PreTrainedConfig`): configuration of a family in `BACKBONES`.
            num_recursions (`int`): N_r.
            source_layers (`list[int]`, *optional*):
                For each physical layer the source layer whose attention type (window, rotary or none) it takes;
                by default the source layer at the physical layer's first unrolled position.
            mor_fields: fields of this class. `num_hidden_layers` defaults to the depth of the source.

        Raises:
            ValueError: for a family that is not supported or an invalid combination of fields.
        """
        family = fields_of_source(source_config, cls.backbones)
        depth = source_config.num_hidden_layers
        fields = {**family, "num_recursions": num_recursions, **mor_fields}
        per_layer = [name for name in PER_LAYER_FIELDS if family.get(name) is not None and name not in mor_fields]
        for name in per_layer:
            fields.pop(name)
        if "layer_types" in per_layer:
            fields["layer_types"] = ["full_attention"] * fields["num_hidden_layers"]
        shape = cls(**fields)
        uses = first_uses(shape.physical_layers)
        source = (
            [uses[layer] for layer in range(shape.num_physical_layers)] if source_layers is None else source_layers
        )
        used = bool(per_layer) or source_layers is not None
        if used and (len(source) != shape.num_physical_layers or max(source) >= depth):
            raise ValueError(
                f"`source_layers` is {source}, but must name one of the {depth} source layers for each of the "
                f"{shape.num_physical_layers} physical layers."
            )
        for name in per_layer:
            fields[name] = [family[name][source[layer]] for layer in shape.physical_layers]
        return cls(**fields)
