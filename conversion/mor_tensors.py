"""The tensors of a MoR that no vanilla source has: routers, predictors and buffers."""

import math
import zlib
from collections.abc import Callable

import torch

from ..configuration.configuration_mor import MoRConfig
from .checkpoint_writer import TargetTensor


ROUTER_WIDTHS = {"linear": 0, "mlp": 2, "wide_mlp": 4}
ROUTER_DTYPE = torch.float32
# sigmoid, tanh and softmax (against zeros) of this logit are 1.0 exactly in fp32
OPEN_LOGIT = 20.0


def router_shapes(config: MoRConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one set of routers: `weight`, and `expand_weight` and `bias` where the configuration has them."""
    if config.routing == "none":
        return {}
    outputs = config.num_recursions if config.routing == "token_choice" else 1
    routers, hidden = config.num_routers, config.hidden_size
    width = ROUTER_WIDTHS[config.router_type] * hidden
    shapes: dict[str, tuple[int, ...]] = {"weight": (routers, outputs, width or hidden)}
    if width:
        shapes["expand_weight"] = (routers, width, hidden)
    if config.router_bias:
        shapes["bias"] = (routers, outputs)
    return shapes


def fresh_tensors(config: MoRConfig, *, router_init: str, seed: int) -> list[TargetTensor]:
    """Routers, predictors and buffers of a new model.

    With `router_init="on"` every token runs every recursion with a gate of exactly 1: the output weights are zero and
    the bias is `OPEN_LOGIT` (for token choice that of the deepest choice alone). With `"random"` the weights are
    N(0, initializer_range), as in the paper's code. Routers are fp32 in a model of any type.

    Args:
        config (`MoRConfig`): the new model.
        router_init (`str`): `on` or `random`.
        seed (`int`): each tensor is drawn from its own generator.
    """
    targets = []
    groups = ["routers"] + (["predictors"] if config.inference_rule == "predictor" else [])
    for group in groups:
        for kind, shape in router_shapes(config).items():
            name = f"model.{group}.{kind}"
            targets.append(
                TargetTensor(name, shape, ROUTER_DTYPE, _router_values(config, name, shape, router_init, seed))
            )
    return targets + buffers(config)


def buffers(config: MoRConfig) -> list[TargetTensor]:
    """The loss-free balancing bias and the step of the capacity warm-up, at zero."""
    targets = []
    if config.routing == "token_choice" and config.balancing == "loss_free":
        shape = (len(config.recursive_blocks), config.num_recursions)
        targets.append(TargetTensor("model.balancing_bias", shape, torch.float32, lambda: torch.zeros(shape)))
    if config.capacity_warmup_steps > 0:
        targets.append(TargetTensor("model.routing_step", (), torch.int64, lambda: torch.zeros((), dtype=torch.int64)))
    return targets


def routers_are_open(
    config: MoRConfig, weight: torch.Tensor, bias: torch.Tensor | None, balancing_bias: torch.Tensor | None = None
) -> bool:
    """Whether these routers send every token through every recursion with a gate of exactly 1, whatever it is.

    Args:
        config (`MoRConfig`): their model.
        weight, bias (`torch.Tensor`): of shape `(num_routers, out, width)` and `(num_routers, out)`.
        balancing_bias (`torch.Tensor`, *optional*): of shape `(num_blocks, num_recursions)`, for token choice.
    """
    if config.gating != "interpolate" or bias is None or bool(weight.any()):
        return False
    logits = bias.float()
    if config.routing == "token_choice":
        gates = logits.softmax(-1) if config.router_activation == "softmax" else logits.sigmoid()
        scores = gates * (config.router_alpha or 1.0) + (0 if balancing_bias is None else balancing_bias)
        gate, chosen = gates[:, -1], bool((scores[:, :-1] < scores[:, -1:]).all())
    else:
        gate = logits.sigmoid() if config.router_activation == "sigmoid" else logits.tanh()
        chosen = bool((logits.sigmoid() >= torch.tensor(config.router_thresholds or [0.5]).max()).all())
    return chosen and bool((gate * (config.router_alpha or 1.0) == 1).all())


def _router_values(
    config: MoRConfig, name: str, shape: tuple[int, ...], router_init: str, seed: int
) -> Callable[[], torch.Tensor]:
    kind = name.rsplit(".", 1)[1]

    def make() -> torch.Tensor:
        if kind == "bias":
            value = torch.zeros(shape)
            if router_init == "on":
                value[:, -1] = OPEN_LOGIT
            return value
        if kind == "weight" and router_init == "on":
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        std = getattr(config, "initializer_range", None) or 1 / math.sqrt(config.hidden_size)
        return torch.randn(shape, generator=generator) * std

    return make
