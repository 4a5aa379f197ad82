"""The tensors that no vanilla source has: routers, predictors, buffers; and whether they let every token through."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch

from ..modeling.routed_model import RoutedPreTrainedModel
from ..modeling.token_routing import activate, logit_threshold
from .checkpoint_writer import TargetTensor
from .errors import ConversionError
from .tensor_source import TensorSource


ROUTER_DTYPE = torch.float32
# sigmoid, tanh and softmax (against zeros) of this logit are 1.0 exactly in fp32
OPEN_LOGIT = 20.0
ROUTING_PREFIXES = (
    "model.routers.",
    "model.predictors.",
    "model.balancing_bias",
    "model.threshold_ema",
    "model.routing_step",
)


def fresh_tensors(
    model: RoutedPreTrainedModel, *, router_init: str, seed: int, open_bias: float = 0.0
) -> list[TargetTensor]:
    """Routers, predictors and buffers of a new model.

    Args:
        model: the new model, whose values are not read.
        router_init (`str`):
            `on`: output weights of zero and a bias of `open_bias` (for token choice on the deepest choice alone), so
            that all tokens have one constant score; `random`: N(0, initializer_range), as in the papers' code.
        seed (`int`): each tensor is drawn from its own generator.
        open_bias (`float`): logit at which the architecture lets a token through with a gate of exactly 1.

    Routers are fp32 in a model of any type.
    """
    routers = [
        TargetTensor(
            name,
            tuple(tensor.shape),
            ROUTER_DTYPE,
            _router_values(model.config, name, tensor, router_init, seed, open_bias),
        )
        for name, tensor in model.state_dict().items()
        if name.startswith(ROUTING_PREFIXES[:2])
    ]
    return routers + fresh_buffers(model)


def fresh_buffers(model: RoutedPreTrainedModel) -> list[TargetTensor]:
    """The state of the routing that training moves, as it is before the first step."""
    state = model.state_dict()
    targets = []
    for buffer, value in model.model.initial_buffers.items():
        tensor = state[f"model.{buffer}"]
        targets.append(
            TargetTensor(
                f"model.{buffer}",
                tuple(tensor.shape),
                tensor.dtype,
                _filled(tensor, value),
                finite=math.isfinite(value),
            )
        )
    return targets


def routers_are_open(config: Any, weights: TensorSource) -> bool:
    """Whether these routers send every token through every pass with a gate of exactly 1, whatever the token is.

    Args:
        config (`MoRConfig` or `MoDConfig`): their model.
        weights (`TensorSource`): its checkpoint.

    Raises:
        ConversionError: if the checkpoint lacks them.
    """
    if not config.num_routers:
        return all(routed_pass.always for routed_pass in config.routed_passes)
    if config.model_type == "mor":
        return _recursion_is_open(config, weights)
    return _depth_is_open(config, weights)


def _recursion_is_open(config: Any, weights: TensorSource) -> bool:
    by_rank = config.inference_rule == "topk" and not all(routed_pass.always for routed_pass in config.routed_passes)
    if config.gating != "interpolate" or by_rank:
        return False
    groups = ["routers"] + (["predictors"] if config.inference_rule == "predictor" else [])
    for group in groups:
        logits = _constant_logits(weights, group)
        if logits is None:
            return False
        if config.routing == "token_choice":
            gates = logits.softmax(-1) if config.router_activation == "softmax" else logits.sigmoid()
            scores = gates * (config.router_alpha or 1.0)
            if "model.balancing_bias" in weights.infos:
                scores = scores + weights.read("model.balancing_bias")
            gate, chosen = gates[:, -1], bool((scores[:, :-1] < scores[:, -1:]).all())
        else:
            gate = logits.sigmoid() if config.router_activation == "sigmoid" else logits.tanh()
            chosen = bool((logits.sigmoid() >= max(config.current_thresholds)).all())
        if not (chosen and bool((gate * (config.router_alpha or 1.0) == 1).all())):
            return False
    return True


def _depth_is_open(config: Any, weights: TensorSource) -> bool:
    logits = _constant_logits(weights, "routers")
    if config.gate != "straight_through" and (
        logits is None or not bool((activate(logits, config.gate, config.router_alpha) == 1).all())
    ):
        return False
    routed = [i for i, routed_pass in enumerate(config.routed_passes) if not routed_pass.always]
    if not routed:
        return True
    if config.inference_rule == "topk":
        return False
    if config.inference_rule == "predictor":
        logits = _constant_logits(weights, "predictors")
    if config.inference_rule == "ema_threshold" and config.compute is None:
        thresholds = _read(weights, "model.threshold_ema").tolist()
    else:
        thresholds = [logit_threshold(threshold) for threshold in config.current_thresholds]
    return logits is not None and all(float(logits[i, 0]) >= thresholds[i] for i in routed)


def _constant_logits(weights: TensorSource, group: str) -> torch.Tensor | None:
    """Logits of shape `(num_routers, out)` where they are the same for every token, else `None`."""
    weight = _read(weights, f"model.{group}.weight")
    if bool(weight.any()):
        return None
    bias = f"model.{group}.bias"
    return weights.read(bias).float() if bias in weights.infos else torch.zeros(weight.shape[:2])


def _read(weights: TensorSource, name: str) -> torch.Tensor:
    if name not in weights.infos:
        raise ConversionError(f"The weights lack {name}; the checkpoint is incomplete.")
    return weights.read(name)


def _filled(like: torch.Tensor, value: float) -> Callable[[], torch.Tensor]:
    return lambda: torch.full(like.shape, value, dtype=like.dtype)


def _router_values(
    config: Any, name: str, tensor: torch.Tensor, router_init: str, seed: int, open_bias: float
) -> Callable[[], torch.Tensor]:
    kind, shape = name.rsplit(".", 1)[1], tensor.shape

    def make() -> torch.Tensor:
        if kind == "bias":
            value = torch.zeros(shape)
            if router_init == "on":
                value[:, -1] = open_bias
            return value
        if kind == "weight" and router_init == "on":
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        std = getattr(config, "initializer_range", None) or 1 / math.sqrt(config.hidden_size)
        return torch.randn(shape, generator=generator) * std

    return make
