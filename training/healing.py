"""Healing: a model that was cut out of its source learns from the source, state by state and token by token.

trainer = HealingTrainer(model, args, teacher=source, hidden_weight=Ramp(30.0, 3.0), train_dataset=stream)
CapacityAnnealing(sample, begin=0.6, end=0.9).attach(trainer)  # depth first, then routing
trainer.train()
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from transformers import PreTrainedModel

from .distillation import DistillationTrainer, innermost
from .hidden_matching import hidden_distance, matched_states
from .importance_start import start_by_importance, why_not_started_by_importance
from .router_start import start_routers, why_not_started
from .run_setup import of_first_process
from .schedules import Ramp, Schedule
from .training_checkpoints import KeptCallback


class HealingTrainer(DistillationTrainer):
    """`DistillationTrainer` that also draws hidden states to the teacher's, with a learning rate fit for each matrix.

    The loss is that of `DistillationTrainer` plus `hidden_weight` times the squared distance of the states at the
    boundaries of the recursions, relative to the teacher's (`hidden_matching`), a mean over tokens; the log has it as
    `hidden`.

    Args:
        hidden_weight: weight of the distance, or a function of the progress.
        hidden_states: where states are compared, `boundaries` or `all` layers.
        teacher, args, kwargs: of `DistillationTrainer` and `Trainer`. Without an optimizer of yours, that of `args`
            gets the groups of `relative_groups`: `args.learning_rate` is then relative to the size of each parameter.

    Raises:
        ValueError: a weight below 0, a weight decay, an optimizer class, or what `DistillationTrainer` refuses.
    """

    def __init__(
        self, *args: Any, hidden_weight: Schedule = 10.0, hidden_states: str = "boundaries", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if not callable(hidden_weight) and hidden_weight < 0:
            raise ValueError(f"hidden_weight={hidden_weight} would drive the states apart: give 0 or more.")
        if self.args.weight_decay or self.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                "weight_decay and optimizer_cls_and_kwargs would be ignored, since HealingTrainer groups the "
                "parameters itself: leave them out, or give an optimizer of yours by `optimizers`."
            )
        self.hidden_weight = hidden_weight
        self.hidden_states = hidden_states

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = relative_groups(trained, self.args.learning_rate)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def renew_rates(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes the learning rates relative to what the parameters are now, after they were set from outside.

        Whole groups of the optimizer are renewed, and what it remembers of the gradients of these parameters is
        dropped. It does nothing before the optimizer and its schedule exist, or without groups of `relative_groups`.
        """
        scheduler, wanted = self.lr_scheduler, set(parameters)
        if self.optimizer is None or scheduler is None:
            return
        for number, group in enumerate(self.optimizer.param_groups):
            size = _root_mean_square(group["params"])
            if not group.get("relative") or not size or wanted.isdisjoint(group["params"]):
                continue
            before = scheduler.base_lrs[number]
            scheduler.base_lrs[number] = group["initial_lr"] = self.args.learning_rate * size
            group["lr"] *= scheduler.base_lrs[number] / before
            for parameter in wanted.intersection(group["params"]):
                self.optimizer.state.pop(parameter, None)

    def _wanted_outputs(self, student: PreTrainedModel) -> dict[str, Any]:
        return {"output_hidden_states": True} if self._now(self.hidden_weight) else {}

    def _further_loss(
        self, outputs: Any, teacher_outputs: Any, known: torch.Tensor
    ) -> tuple[torch.Tensor | float, dict[str, torch.Tensor]]:
        weight = self._now(self.hidden_weight)
        if not weight:
            return 0.0, {}
        pairs = matched_states(innermost(self.model).config, self.teacher.config, self.hidden_states)
        mask = getattr(outputs, "routing_mask", None)
        distance = hidden_distance(outputs.hidden_states, teacher_outputs.hidden_states, pairs, mask)
        total = (distance * known).sum()
        return weight * total, {"hidden": total.detach()}


def relative_groups(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """Optimizer groups in which parameters move by the same share of their size per step.

    The entries of pretrained matrices differ in size, between kinds and between models, and a rate that is right for
    large ones destroys small ones. AdamW moves every entry by about its learning rate, so a rate in proportion to the
    root mean square of the parameter moves all alike; weights that begin at 0 move as the smallest others do.

    Args:
        model: its parameters that require a gradient are grouped.
        learning_rate: share of its size by which a parameter moves in a step.

    Returns:
        Groups for an optimizer without weight decay: one for each kind of parameter, all layers together.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # by name, not by size: a resumed optimizer must find the groups that it had
            groups.setdefault(re.sub(r"\.\d+\.", ".", name), []).append(parameter)
    sizes = {kind: _root_mean_square(parameters) for kind, parameters in groups.items()}
    least = min((size for size in sizes.values() if size > 0), default=1.0)
    return [
        {"params": parameters, "lr": learning_rate * (sizes[kind] or least), "weight_decay": 0.0, "relative": True}
        for kind, parameters in groups.items()
    ]


def _root_mean_square(parameters: list[nn.Parameter]) -> float:
    squares = sum(float(p.detach().float().square().sum()) for p in parameters)
    return math.sqrt(squares / sum(p.numel() for p in parameters))


class CapacityAnnealing(KeptCallback):
    """Depth first, then routing: every token runs everything until `begin`; then routers start, and capacities fall.

    They fall to those of the configuration, along half a cosine, until `end`.

        CapacityAnnealing(sample, begin=0.5, end=0.8).attach(trainer)

    Routers are started from what depth gains for the tokens of a sample: `start_routers` for a MoR,
    `start_by_importance` for a MoD, which also divides the capacity among the layers. Those that cannot be started so
    (`not_started` says why) learn from where they are. A checkpoint holds the capacities of its moment. A model whose
    capacities are all 1 stays as it is.

    Args:
        sample: token ids of shape `(batch, seq_len)` without pads, some thousand tokens.
        begin, end: shares of the training.

    Raises:
        ValueError: unless `0 <= begin <= end <= 1`.
    """

    def __init__(self, sample: Iterable[torch.Tensor], *, begin: float = 0.5, end: float = 0.8):
        self.sample = list(sample)
        self.way = Ramp(0.0, 1.0, begin, end)
        self.started = False
        self.not_started: str | None = None

    def attach(self, trainer: DistillationTrainer) -> None:
        """Adds this callback to a trainer.

        Raises:
            ValueError: if the trainer's model is not routed by expert choice, or anneals its capacities itself.
        """
        config = innermost(trainer.model).config
        reason = why_not_annealed(config)
        if reason is not None:
            raise ValueError(f"{reason}: leave this callback out.")
        self.trainer = trainer
        self.wanted = list(config.capacities)
        self.not_started = _WHY_NOT_STARTED[config.model_type](config)
        trainer.add_callback(self)

    def keep(self) -> dict[str, Any]:
        return {"started": self.started, "wanted": self.wanted}

    def restore(self, kept: dict[str, Any] | None, step: int) -> None:
        if kept is None:
            raise ValueError(
                f"The checkpoint of step {step} does not say whether its routers were started, as it was made without "
                "a CapacityAnnealing: resume without one, or start anew."
            )
        self.started, self.wanted = kept["started"], kept["wanted"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progress = self.trainer.progress()
        if progress >= self.way.begin:
            self._start()
        open_share = 1 - self.way(progress)
        self._model.config.capacities = [c + (1 - c) * open_share for c in self.wanted]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()

    def finish(self) -> None:
        """Routers started, capacities as wanted: where training ended before."""
        self._start()
        self._model.config.capacities = self.wanted

    @property
    def _model(self) -> PreTrainedModel:
        return innermost(self.trainer.model)

    def _start(self) -> None:
        if self.started or min(self.wanted) == 1:
            return
        self.started = True
        if self.not_started is not None:
            return
        model = self._model
        model.config.capacities = self.wanted
        _START[model.config.model_type](model, self.sample)
        routers = list(model.model.routers.parameters())
        # every process has measured it for itself, in arithmetic that need not round alike
        broadcast([p.data for p in routers])
        self.wanted = of_first_process(list(model.config.capacities), self.trainer.args)
        if isinstance(self.trainer, HealingTrainer):
            self.trainer.renew_rates(routers)


_START: dict[str, Callable[..., Any]] = {"mor": start_routers, "mod": start_by_importance}
_WHY_NOT_STARTED = {"mor": why_not_started, "mod": why_not_started_by_importance}


def why_not_annealed(config: Any) -> str | None:
    """Why the capacities of a model cannot be annealed, as a clause; `None` if they can."""
    routing = getattr(config, "routing", None)
    if routing != "expert_choice":
        return f"routing is {routing!r}, but only expert choice has capacities to anneal"
    if config.capacity_warmup_steps:
        return (
            f"capacity_warmup_steps is {config.capacity_warmup_steps}, so that the model anneals its capacities "
            "itself, by its own count of steps"
        )
    return None
