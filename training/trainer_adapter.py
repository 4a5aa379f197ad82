"""What a trainer must tell a routed model when it makes the loss itself, as TRL's trainers do: one call."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import Trainer


def routed_backbone(model: nn.Module) -> nn.Module | None:
    """The routed base model in a model that may be wrapped (PEFT, DDP, FSDP, compile); `None` if there is none."""
    for module in model.modules():
        # by what it holds: it may be of the remote code; and not by `hasattr`, since wrappers answer for their content
        if {"router_loss_scale", "initial_buffers"} <= vars(module).keys():
            return module
    return None


def adapt_trainer(trainer: Trainer) -> Trainer:
    """Makes a `Trainer` that computes its loss outside of the model right for a routed one; call it before `train`.

    Needed for TRL's `SFTTrainer`, `DPOTrainer`, `GRPOTrainer` and their like, harmless for others and for models
    without routers. It sees to it that

    - the router loss has the scale of the loss: under gradient accumulation, over processes and with fp16, it is the
      one that a large batch would have, or, where the trainer takes the mean over micro-batches, their mean;
    - a reference model lets tokens in as the trained model does, which takes the top-k in training, so that at the
      begin both give the same probabilities;
    - a pass without gradient (reference, old policy) moves no running mean, balancing bias or capacity step;
    - TRL leaves the balancing loss of a backbone with experts to the model, which has it among its router losses.

    Args:
        trainer: already made, since TRL wraps the model itself.

    Returns:
        The same trainer.
    """
    model: Any = trainer.model
    backbone = routed_backbone(model)
    if backbone is None:
        return trainer
    if hasattr(trainer, "aux_loss_enabled"):
        trainer.aux_loss_enabled = False
    _keep_state_without_gradient(backbone)
    reference = getattr(trainer, "ref_model", None)
    other = None if reference is None else routed_backbone(reference)
    if other is not None and other is not backbone:
        other.register_forward_pre_hook(functools.partial(_route_alike, backbone))
        _keep_state_without_gradient(other)
    _tell_scale(trainer, backbone.router_loss_scale)
    return trainer


def _tell_scale(trainer: Trainer, scale: Any) -> None:
    """Within `training_step` the model knows the scale of the loss, and the items of the step if the trainer does."""
    training_step = trainer.training_step

    @functools.wraps(training_step)
    def told(model: nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        # a trainer that divides by the items of the whole step sums over micro-batches; the others take a mean
        summed = num_items_in_batch is not None and getattr(trainer, "loss_is_scaled_for_ga", None) is not False
        scale.step_items = num_items_in_batch if summed else None
        scale.outside = _scale_of_items(trainer) if summed else 1.0 / trainer.current_gradient_accumulation_steps
        if trainer.accelerator.scaler is not None:
            scale.outside *= trainer.accelerator.scaler.get_scale()
        try:
            return training_step(model, inputs, num_items_in_batch)
        finally:
            scale.step_items = scale.outside = None

    trainer.training_step = told  # type: ignore[method-assign]


def _scale_of_items(trainer: Trainer) -> float:
    """What undoes the mean of the gradients over processes, where each divides by the items of them all."""
    if not trainer.args.average_tokens_across_devices:
        return 1.0
    return float(trainer.accelerator.num_processes // trainer.get_tp_size())


def _route_alike(policy: nn.Module, reference: nn.Module, args: tuple) -> None:
    """Sets the mode of routing only: dropout is a matter of the modules below."""
    reference.training = policy.training


def _keep_state_without_gradient(backbone: nn.Module) -> None:
    """Puts the buffers of the routing back after a forward pass in training mode without gradient."""
    kept: dict[str, torch.Tensor] = {}

    def keep(module: Any, args: tuple) -> None:
        kept.clear()
        if module.training and not torch.is_grad_enabled():
            kept.update({name: getattr(module, name).clone() for name in module.initial_buffers})

    def put_back(module: nn.Module, args: tuple, output: Any) -> None:
        for name, value in kept.items():
            getattr(module, name).copy_(value)

    backbone.register_forward_pre_hook(keep)
    backbone.register_forward_hook(put_back)
