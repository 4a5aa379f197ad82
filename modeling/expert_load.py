"""The load-balancing loss of backbones whose MLPs are mixtures of experts (MoDE, MoD paper, section 4.3)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .decoder_backbone import expert_load_loss, family_of, has_experts
from .layer_runner import LayerRunner
from .router_loss import RouterLossTerms


@contextmanager
def watch_experts(model: nn.Module, runner: LayerRunner, losses: RouterLossTerms) -> Iterator[None]:
    """Adds the family's own balancing loss over what the expert routers saw inside the block: routed tokens only.

    As in transformers, only where `config.output_router_logits` asks for it; weighted by `router_aux_loss_coef`.

    Args:
        model: holds `config` and `layers`.
        runner: knows which of the tokens that a layer computes count.
        losses: gets the loss at the end of the block.
    """
    config = model.config
    family = family_of(config)
    if not (model.training and family.num_experts and config.output_router_logits and config.router_aux_loss_coef):
        yield
        return
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def record(gate: nn.Module, args: tuple, output: tuple[torch.Tensor, Any, Any]) -> None:
        # picked below: gradient checkpointing would miss an operation here when it computes the layer again
        seen.append((output[0], runner.mlp_tokens))

    hooks = [layer.mlp.gate.register_forward_hook(record) for layer in model.layers if has_experts(layer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if seen:
        experts = getattr(config, family.num_experts) + getattr(config, "num_noop_experts", 0)
        counted = tuple(logits if tokens is None else logits[tokens.flatten()] for logits, tokens in seen)
        losses.add_mean(expert_load_loss(config, counted, experts), config.router_aux_loss_coef)
