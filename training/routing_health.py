"""Logs of what the routers do, taken from the forward passes of training themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..analysis.routing_statistics import RoutingMeter, RoutingStatistics
from .trainer_adapter import routed_backbone


logger = logging.get_logger(__name__)


class RoutingHealthCallback(TrainerCallback):
    """Adds figures of `RoutingStatistics` to the logs of a trainer, over the tokens since the last log:

        trainer = Trainer(...)
        RoutingHealthCallback().attach(trainer)

    They are taken from the passes that compute the loss: no pass is added, and a pass without gradient (evaluation,
    reference, generation) or the recomputation of gradient checkpointing is not counted. Figures are over all
    processes. `3` stands for the number of a pass in `config.routed_passes`; those that every token enters are left
    out.

    | logged | meaning |
    |---|---|
    | `routing/mean_depth` | passes per token |
    | `routing/untouched` | share of tokens that entered none of the passes |
    | `routing/share_3` | share of tokens that entered |
    | `routing/dead_3` | share of positions at which no token of any row entered; 2/3 means collapse by position |
    | `routing/accuracy_3` | expert choice: share of candidates for which the causal rule agrees with top-k |
    | `routing/recall_3` | of the tokens in top-k, the share that the causal rule lets in |
    | `routing/entropy_3` | of the scores, in nats; token choice: of the mean choice, by block |
    | `routing/max_violation_0` | token choice: largest load over the mean load - 1, by block |

    Raises:
        ValueError: when training begins, for a model that routes nothing.
    """

    def __init__(self) -> None:
        self.meter: RoutingMeter | None = None
        self._hooks: list[Any] = []
        self._attached = False

    def attach(self, trainer: Trainer) -> RoutingHealthCallback:
        """Adds the callback to a trainer, before those that report logs elsewhere (wandb, tensorboard)."""
        trainer.callback_handler.callbacks.insert(0, self)
        self._attached = True
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        backbone = routed_backbone(model)
        if backbone is None:
            raise ValueError(
                f"This {model.config.model_type!r} model has no routers whose health could be logged: leave the "
                "callback out, or train a model with routing."
            )
        if not self._attached and args.report_to:
            logger.warning(
                "RoutingHealthCallback was passed in `callbacks`, so that %s will not see its figures: call "
                "`RoutingHealthCallback().attach(trainer)` instead.",
                ", ".join(args.report_to),
            )
        self._remove_hooks()
        self.meter = RoutingMeter(backbone)
        self._hooks = [
            backbone.register_forward_pre_hook(_ask_for_routing, with_kwargs=True),
            backbone.register_forward_hook(self._record, with_kwargs=True),
        ]

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._remove_hooks()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.meter is None or logs is None or "loss" not in logs or not self.meter.sums:
            return
        self.meter.add_ranks()
        figures = log_entries(self.meter.result(), self.meter.avoidable)
        logs.update(figures)
        state.log_history[-1].update(figures)
        self.meter = RoutingMeter(self.meter.model)

    def _record(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if _learns(backbone) and self.meter is not None:
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            self.meter.update(output, mask if mask is not None and mask.ndim == 2 else None, top_k_entered=True)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def log_entries(figures: RoutingStatistics, passes: list[int]) -> dict[str, float]:
    """The figures of the given passes under the names of the logs; without those that nothing was seen of (NaN)."""
    entries = {"routing/mean_depth": figures.mean_depth, "routing/untouched": figures.untouched}
    by_pass = {
        "share": figures.shares,
        "dead": figures.dead_ratio,
        "accuracy": figures.accuracy,
        "recall": figures.recall,
    }
    by_block = {"max_violation": figures.max_violation}
    (by_block if figures.max_violation else by_pass)["entropy"] = figures.entropy
    for name, values in by_pass.items():
        entries.update({f"routing/{name}_{number}": values[number] for number in passes if values})
    for name, values in by_block.items():
        entries.update({f"routing/{name}_{block}": value for block, value in enumerate(values)})
    return {name: value for name, value in entries.items() if value == value}


def _learns(backbone: nn.Module) -> bool:
    return backbone.training and torch.is_grad_enabled()


def _ask_for_routing(backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    return (args, {**kwargs, "output_routing": True}) if _learns(backbone) else None
