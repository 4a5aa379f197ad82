"""Layers that become one: a model is drawn, in the course of training, to one whose layers are shared.

A cut model has lost what its source knew, and must learn it again from a state that resembles nothing. Here training
begins with the source itself. After each step the layers that are to be one are drawn to their mean, so far that their
difference falls to nothing; what they lose by it, training gives back while it is little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from .distillation import DistillationTrainer, innermost


class ProgressiveSharing(TrainerCallback):
    """Draws groups of layers of a vanilla model, a copy of the teacher, together while it is trained.

        ProgressiveSharing(config.physical_layers, end=0.7).attach(trainer)

    Layers that are not equal when training ends are made so.

    Args:
        groups: layers that are to be one, as `config.physical_layers` of the shared model has them: for each unrolled
            layer the number of the layer that it becomes.
        begin, end: shares of the training between which the difference falls, linearly, from 1 to 0; after it the
            layers are equal and stay so.

    Raises:
        ValueError: unless `0 <= begin < end <= 1`.
    """

    def __init__(self, groups: Sequence[int], *, begin: float = 0.0, end: float = 0.7):
        if not 0 <= begin < end <= 1:
            raise ValueError(
                f"Sharing goes from {begin} to {end}, but must lie within training: 0 <= begin < end <= 1."
            )
        self.groups = list(groups)
        self.begin, self.end = begin, end
        self.distance = 1.0

    def attach(self, trainer: DistillationTrainer) -> None:
        """Adds this callback to a trainer.

        Raises:
            ValueError: unless there is a number for each layer of the trainer's model.
        """
        layers = innermost(trainer.model).model.layers
        if len(self.groups) != len(layers):
            raise ValueError(
                f"There are {len(self.groups)} numbers for {len(layers)} layers: give `physical_layers` of a "
                "configuration of the same unrolled depth."
            )
        together: dict[int, list[nn.Module]] = {}
        for layer, group in zip(layers, self.groups, strict=True):
            together.setdefault(group, []).append(layer)
        self.parameters = [
            same
            for members in together.values()
            if len(members) > 1
            for same in zip(*(list(layer.parameters()) for layer in members), strict=True)
        ]
        self.trainer = trainer
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.distance = self._wanted()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the state of before this step, since the last one must end at 0
        self._draw(self._wanted(ahead=0.0 if self.trainer.clock else 1 / max(state.max_steps, 1)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(0.0)

    def _wanted(self, ahead: float = 0.0) -> float:
        progress = min(self.trainer.progress() + ahead, 1.0)
        return min(1.0, max(0.0, (self.end - progress) / (self.end - self.begin)))

    @torch.no_grad()
    def _draw(self, distance: float) -> None:
        share = distance / self.distance if self.distance else 0.0
        self.distance = distance
        if share == 1:
            return
        for parameters in self.parameters:
            mean = torch.stack([p.detach() for p in parameters]).mean(0)
            for parameter in parameters:
                parameter.lerp_(mean.to(parameter), 1 - share) if share else parameter.copy_(mean)


@torch.no_grad()
def load_shared(model: PreTrainedModel, unrolled: PreTrainedModel) -> None:
    """Gives a recursive model the weights of a vanilla one, whose layers are equal where they are to be one.

    Args:
        model: a MoR; its routers stay as they are.
        unrolled: a vanilla model of its family and unrolled depth.

    Raises:
        ValueError: if layers that are to be one differ, or the models have different weights.
    """
    physical = model.config.physical_layers
    weights = unrolled.state_dict()
    taken: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        if name.startswith("model.layers."):
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            name = f"model.layers.{physical[int(layer)]}.{rest}"
            if name in taken and not torch.equal(taken[name], value):
                raise ValueError(
                    f"Layer {layer} differs in {rest} from the layer that it is to be one with: train with "
                    "`ProgressiveSharing` to the end before the weights are taken."
                )
        taken[name] = value
    own = tuple(f"model.{name}" for name in ("routers", "predictors", *model.model.initial_buffers))
    taken |= {name: value for name, value in model.state_dict().items() if name.startswith(own)}
    different = taken.keys() ^ model.state_dict().keys()
    if different:
        raise ValueError(f"The models differ in {min(different)}: give a vanilla model of the same family.")
    model.load_state_dict(taken)
