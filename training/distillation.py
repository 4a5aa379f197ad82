"""A Trainer that teaches a student with the distributions of a frozen teacher, normally the model it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.modeling_outputs import CausalLMOutput

from ..modeling.decoder_backbone import FAMILIES
from ..modeling.heads import CausalLMHead, RoutedCausalLMOutputWithPast
from .distillation_loss import Head, chunked_distillation_loss
from .run_setup import refuse_several_gpus
from .schedules import Schedule, value_at


class DistillationTrainer(Trainer):
    """`Trainer` whose training loss is `(1 - weight) * CE + weight * KL(teacher || student) + router loss`.

    CE and KL are sums over the tokens with a label, divided once by their number in the whole optimizer step; so
    gradient accumulation gives the gradient of one large batch. Logits exist for `chunk` tokens at a time only: beyond
    the hidden states, training needs a few fp32 matrices of `(chunk, vocab)`. The logged `loss` is the whole, `ce`,
    `kl` and `router_loss` are its parts, per token, over all processes. Evaluation reports the student's own
    cross-entropy.

    The student may be wrapped (PEFT, DDP): only the `forward` of the innermost model is exchanged, and only during the
    call, as TRL does it.

    Args:
        teacher (`PreTrainedModel`): a causal language model with the student's vocabulary. It is frozen, set to eval
            mode and moved to the trainer's device; it does not have to be of the student's family.
        distillation_weight: share of the KL term, 0 to 1, or a function of the progress (see `schedules`).
        temperature: of the KL term, above 0.
        chunk: tokens whose logits exist at one time.
        clock: the progress that schedules follow, 0 to 1; by default the share of the steps.
        args, kwargs: of `Trainer`.

    Raises:
        ValueError: weight, temperature or chunk out of range, vocabularies of different size, a model whose head is
            not known, another definition of the loss, or several GPUs in one process.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        distillation_weight: Schedule = 1.0,
        temperature: float = 1.0,
        chunk: int = 512,
        clock: Callable[[], float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if not callable(distillation_weight) and not 0.0 <= distillation_weight <= 1.0:
            raise ValueError(f"distillation_weight={distillation_weight} is not a share: give a number from 0 to 1.")
        if not temperature > 0.0:
            raise ValueError(f"temperature={temperature} divides the logits: give a number above 0.")
        if chunk < 1:
            raise ValueError(f"chunk={chunk} holds no token: give a number of at least 1.")
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError(
                "label_smoothing_factor and compute_loss_func would change the loss that distillation defines itself: "
                "leave them out."
            )
        refuse_several_gpus(self.args)
        student = innermost(self.model)
        sizes = [model.config.get_text_config().vocab_size for model in (teacher, student)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The teacher has a vocabulary of {sizes[0]} and the student one of {sizes[1]}: distillation compares "
                "their distributions token by token, so give a teacher with the student's tokenizer."
            )
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.distillation_weight = distillation_weight
        self.temperature = temperature
        self.clock = clock
        self.chunk = chunk
        self._teacher_head = logits_of(self.teacher)
        self._student_head = logits_of(student)
        self._sums: dict[str, torch.Tensor] = {}
        self._micro_batches = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The distillation loss in training mode, the plain loss of the model in evaluation mode.

        Raises:
            ValueError: without `labels` in the inputs.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "labels" not in inputs:
            raise ValueError(
                "The batch has no `labels`: add them (a copy of `input_ids`, -100 where nothing is learned)."
            )
        with exchanged_forward(innermost(model), self._distillation_forward):
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss * self._world_scale(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _world_scale(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """What undoes the mean over processes where every process divides by the items of them all."""
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            return self.accelerator.num_processes
        return 1

    def _distillation_forward(
        self,
        student: PreTrainedModel,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        **inputs: Any,
    ) -> RoutedCausalLMOutputWithPast | CausalLMOutput:
        inputs.pop("return_dict", None)
        wanted = self._wanted_outputs(student)
        with torch.no_grad():
            teacher_outputs = backbone_of(self.teacher)(**inputs, use_cache=False, **wanted)
        teacher_hidden = teacher_outputs.last_hidden_state
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        items = targets.ne(-100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        own: dict[str, Any] = {}
        if isinstance(student, CausalLMHead):
            own = {"adds_router_loss": True, "num_items_in_batch": items, "output_routing": bool(wanted)}
        outputs = backbone_of(student)(**inputs, **own, use_cache=False, **wanted)
        head = student.get_output_embeddings()
        logits = partial(self._student_head, project=head.forward)

        def chunked_loss(head: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return chunked_distillation_loss(
                hidden_states,
                teacher_hidden.flatten(0, 1),
                targets.flatten(),
                logits,
                self._teacher_head,
                tuple(head.parameters()),
                weight=self._now(self.distillation_weight),
                temperature=self.temperature,
                chunk=self.chunk,
            )

        # the head's own call, so that engines that divide its weights gather them once for all chunks
        with exchanged_forward(head, chunked_loss):
            loss, cross_entropy, kl = head(outputs.last_hidden_state.flatten(0, 1))
        further, sums = self._further_loss(outputs, teacher_outputs, targets.ne(-100))
        loss = (loss + further) / items
        aux_loss = getattr(outputs, "aux_loss", None)
        parts = {name: value / items for name, value in {"ce": cross_entropy, "kl": kl, **sums}.items()}
        if aux_loss is not None:
            loss = loss + aux_loss
            parts["router_loss"] = aux_loss.detach()
        scale = self._world_scale(num_items_in_batch)
        self._note({name: part * scale for name, part in parts.items()}, num_items_in_batch is not None)
        if aux_loss is None:
            return CausalLMOutput(loss=loss)
        return RoutedCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss)

    def _now(self, schedule: Schedule) -> float:
        return value_at(schedule, self.progress())

    def progress(self) -> float:
        """Share of the training that is over, which schedules follow: of the steps, or of the time with a clock."""
        if self.clock is not None:
            return self.clock()
        return min(1.0, self.state.global_step / max(self.state.max_steps, 1))

    def _wanted_outputs(self, student: PreTrainedModel) -> dict[str, Any]:
        """What else both models shall give."""
        return {}

    def _further_loss(
        self, outputs: Any, teacher_outputs: Any, known: torch.Tensor
    ) -> tuple[torch.Tensor | float, dict[str, torch.Tensor]]:
        """A sum over the tokens in `known`, `(batch, seq_len)`, to be added to the loss, and its parts for the log."""
        return 0.0, {}

    def _note(self, parts: dict[str, torch.Tensor], summed: bool) -> None:
        """Collects the parts of the loss; divided by the items of the step they add up, else they are averaged."""
        share = 1.0 if summed else 1.0 / self.args.gradient_accumulation_steps
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach() * share
        self._micro_batches += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._micro_batches:
            steps = self._micro_batches / self.args.gradient_accumulation_steps
            for name, value in self._sums.items():
                logs[name] = (self.accelerator.reduce(value, reduction="mean") / steps).item()
            self._sums, self._micro_batches = {}, 0
        super().log(logs, start_time)


def innermost(model: Any) -> PreTrainedModel:
    """The model itself, without DDP, torch.compile and PEFT around it."""
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """What computes the hidden states that the head reads."""
    return getattr(model, model.base_model_prefix)


def logits_of(model: PreTrainedModel) -> Callable[..., torch.Tensor]:
    """A function from the hidden states that the head reads to logits, as `model` itself computes them.

    Its argument `project` stands for the head's own call.

    Raises:
        ValueError: for a model without a head, or one of a family that this package does not know.
    """
    name = getattr(model.config, "backbone", model.config.model_type)
    if name not in FAMILIES or model.get_output_embeddings() is None:
        raise ValueError(
            f"How {type(model).__name__} makes logits of hidden states is not known: give a causal language model of "
            f"one of the families {', '.join(sorted(FAMILIES))}."
        )
    finish = FAMILIES[name].finish_logits

    def head(hidden_states: torch.Tensor, project: Head | None = None) -> torch.Tensor:
        # looked up at each call, since adapters replace it
        logits = (project or model.get_output_embeddings())(hidden_states)
        return logits if finish is None else finish(model.config, logits)

    return head


@contextmanager
def exchanged_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context `model(...)` calls `forward(model, ...)`; hooks and wrappers around the model stay."""
    present = "forward" in vars(model)
    before = model.forward
    model.forward = lambda *args, **kwargs: forward(model, *args, **kwargs)
    try:
        yield
    finally:
        if present:
            model.forward = before
        else:
            del model.forward
