"""Runs a training recipe with `Trainer`: checkpoints that load at any moment, resume with the next token, a card."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, set_seed

from ..configuration.backbone_config import BACKBONES, MOE_BACKBONES
from ..conversion.complete_loading import load_complete
from ..conversion.convert import convert
from ..conversion.recipe_fields import ARCHITECTURES
from ..conversion.source_checkpoint import card_data, open_source
from ..model_cards.trained_card import Origin, write_trained_card
from .jrt_collator import JRTCollator
from .progress import TrainingProgress
from .router_start import start_routers
from .routing_health import RoutingHealthCallback
from .run_setup import ROUTER_TOKENS, hold_precision, quiet_arguments, refuse_several_gpus, world_size
from .sharding import FullPrecisionRouters
from .text_stream import StreamCallback, TextStream
from .training_checkpoints import checkpoint_to_resume, train_from
from .training_plan import TrainingPlan, model_config, packing_of, plan_training
from .training_recipe import TrainingRecipe


_CONVERTED = "converted"


@dataclass(frozen=True)
class TrainingResult:
    """What a run did.

    Attributes:
        output: the complete checkpoint.
        steps, tokens: of the whole run, those before a resume included.
        loss: mean of the steps since the last log.
        eval_loss: on `data.eval_text`, `None` without one.
        log: the trainer's log.
    """

    output: Path
    steps: int
    tokens: int
    loss: float | None
    eval_loss: float | None
    log: list[dict[str, Any]]


def run_training(recipe: TrainingRecipe, *, resume: bool = False, show: bool = True) -> TrainingResult:
    """Trains as the recipe says, evaluates, and leaves a complete checkpoint in `training.output`.

    Args:
        recipe: of the run.
        resume: go on behind the newest complete checkpoint in the output folder; begin anew if there is none.
        show: whether to show a line of progress.

    Raises:
        ValueError: for a recipe that does not fit this machine or its text, and for an output folder with checkpoints
            that are not to be resumed.
    """
    output = Path(recipe.training.output)
    newest = checkpoint_to_resume(output, resume)
    trainer, stream = make_trainer(recipe, resume=newest is not None, show=show)
    train_from(trainer, newest)
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = TrainingResult(
        output=output,
        steps=trainer.state.global_step,
        tokens=trainer.state.global_step * recipe.training.batch_tokens,
        loss=losses[-1] if losses else None,
        eval_loss=metrics.get("eval_loss"),
        log=trainer.state.log_history,
    )
    if trainer.is_world_process_zero():
        trainer.save_state()
        plan = plan_training(recipe, trainer.args.world_size)
        echoed = recipe.without_paths()
        write_trained_card(output, plan.config, echoed.to_yaml(), _facts(plan, result), _origin(recipe, echoed))
    return result


def make_trainer(recipe: TrainingRecipe, *, resume: bool = False, show: bool = True) -> tuple[Trainer, TextStream]:
    """A `Trainer` for a recipe, ready to train, and the text that it reads; for changes that no recipe tells."""
    model_config(recipe)  # what does not fit is said before anything is made
    args = training_arguments(recipe)
    refuse_several_gpus(args)
    set_seed(recipe.training.seed)
    model, tokenizer = _model_and_tokenizer(recipe, args, resume)
    if recipe.model.start_routers and not resume:
        sample = islice(_text(recipe, "joined", tokenizer), max(1, ROUTER_TOKENS // recipe.training.seq_len))
        rows = torch.stack([row["input_ids"] for row in sample])
        # through nn.Module, since transformers types its own `to` as without arguments
        torch.nn.Module.to(model, args.device)
        start_routers(model, rows.split(recipe.training.rows))
    stream = _text(recipe, packing_of(recipe, model.config), tokenizer)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=stream,
        eval_dataset=_eval_rows(recipe, model.config, tokenizer),
        data_collator=_collator(recipe, model, stream),
        processing_class=tokenizer,
        callbacks=[FullPrecisionRouters()],
    )
    StreamCallback(stream).attach(trainer)
    TrainingProgress(recipe.training.batch_tokens, show=show).attach(trainer)
    passes = getattr(model.config, "routed_passes", [])
    if recipe.training.log_routing and any(not routed_pass.always for routed_pass in passes):
        RoutingHealthCallback().attach(trainer)
    return trainer, stream


def training_arguments(recipe: TrainingRecipe) -> TrainingArguments:
    """The recipe in the words of transformers; this also starts the processes' group, where there are several."""
    training, optimizer = recipe.training, recipe.optimizer
    kind, options = _schedule(recipe)
    given = {
        **quiet_arguments(),
        "optim": "adamw_torch",
        "prediction_loss_only": True,
        **recipe.arguments,
    }
    checkpointing: dict[str, Any] = {}
    if training.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    args = TrainingArguments(
        output_dir=training.output,
        max_steps=recipe.steps,
        per_device_train_batch_size=training.rows,
        per_device_eval_batch_size=training.rows,
        gradient_accumulation_steps=recipe.accumulation(world_size()),
        learning_rate=optimizer.learning_rate,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=options,
        warmup_steps=_steps(recipe.schedule.warmup, recipe.steps),
        bf16=training.precision == "bf16",
        seed=training.seed,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=training.keep_checkpoints,
        eval_strategy="no" if training.eval_steps is None or recipe.data.eval_text is None else "steps",
        eval_steps=training.eval_steps,
        logging_steps=training.log_steps,
        **checkpointing,
        **given,
    )
    return hold_precision(args)


def _schedule(recipe: TrainingRecipe) -> tuple[str, dict[str, Any]]:
    schedule = recipe.schedule
    if schedule.kind == "cosine":
        return "cosine_with_min_lr", {"min_lr_rate": schedule.floor}
    if schedule.kind == "wsd":
        decay = _steps(schedule.decay, recipe.steps)
        return "warmup_stable_decay", {
            "num_decay_steps": decay,
            "decay_type": "linear",
            "min_lr_ratio": schedule.floor,
        }
    if schedule.floor:
        raise ValueError(f"`schedule.floor` is {schedule.floor}, but only `cosine` and `wsd` have one: leave it out.")
    return {"linear": "linear", "constant": "constant_with_warmup"}[schedule.kind], {}


def _steps(given: float | int, steps: int) -> int:
    """Steps, where a number below 1 is a share of all."""
    return int(given) if given >= 1 else math.ceil(given * steps)


def _model_and_tokenizer(recipe: TrainingRecipe, args: TrainingArguments, resume: bool) -> tuple[PreTrainedModel, Any]:
    part = recipe.model
    source: str | Path | None = part.source
    if part.conversion is not None:
        converted = Path(recipe.training.output) / _CONVERTED
        with args.main_process_first(local=False, desc="conversion"):
            if not (resume and converted.is_dir()) and args.process_index == 0:
                if converted.is_dir():
                    shutil.rmtree(converted)
                converted.parent.mkdir(parents=True, exist_ok=True)
                convert(part.source, converted, part.conversion, revision=part.revision, quiet=True)
        source = converted
    revision = part.revision if part.conversion is None else None
    tokenizer = _tokenizer(str(source or part.tokenizer), revision)
    dtype = torch.bfloat16 if recipe.training.precision == "pure_bf16" else torch.float32
    options = {"dtype": dtype} | ({"attn_implementation": part.attention} if part.attention else {})
    if source is not None:
        return load_complete(source, str(part.source), revision=revision, **options), tokenizer
    config = model_config(recipe)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name not in part.config:
            setattr(config, name, getattr(tokenizer, name))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`model.config.vocab_size` is {config.vocab_size}, but the tokenizer has {len(tokenizer)} tokens: give "
            "at least as many."
        )
    return AutoModelForCausalLM.from_config(config, **options), tokenizer


def _tokenizer(name: str, revision: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:
        raise ValueError(
            f"No tokenizer can be read from {name!r} ({' '.join(str(error).split())[:200]}): give the folder or Hub "
            "id of one."
        ) from error


def _text(recipe: TrainingRecipe, packing: str, tokenizer: Any) -> TextStream:
    data = recipe.data
    return TextStream(
        data.text,
        tokenizer,
        recipe.training.seq_len,
        config=data.config,
        split=data.split,
        column=data.column,
        packing=packing,
        shuffle_buffer=data.shuffle_buffer,
        seed=recipe.training.seed,
    )


def _eval_rows(recipe: TrainingRecipe, config: Any, tokenizer: Any) -> list[dict[str, torch.Tensor]] | None:
    data = recipe.data
    if data.eval_text is None:
        return None
    stream = TextStream(
        data.eval_text,
        tokenizer,
        recipe.training.seq_len,
        config=data.eval_config,
        split=data.eval_split,
        column=data.column,
        packing=packing_of(recipe, config),
        epochs=1,
    )
    return list(islice(stream, max(1, data.eval_tokens // recipe.training.seq_len)))


def _collator(recipe: TrainingRecipe, model: PreTrainedModel, stream: TextStream) -> Any:
    config: Any = model.config
    if config.model_type != "jrt" or not config.prefix_length:
        return stream.collate
    return JRTCollator.from_model_config(config, mask_token_id=config.mask_token_id, seed=recipe.training.seed)


def _origin(recipe: TrainingRecipe, echoed: TrainingRecipe) -> Origin | None:
    """Whose terms of use the model inherits."""
    part = recipe.model
    if part.source is None:
        return None
    if part.conversion is not None:
        folder = Path(recipe.training.output) / _CONVERTED
        data = card_data(folder, "base_model", "license", "license_name", "license_link")
        return Origin(str(echoed.model.source), data.pop("base_model", None), data, folder)
    found = open_source(part.source, revision=part.revision, allowed=(*ARCHITECTURES, *BACKBONES, *MOE_BACKBONES))
    return Origin(str(echoed.model.source), found.base_model, found.license, found.folder)


def _facts(plan: TrainingPlan, result: TrainingResult) -> dict[str, str]:
    """What the card says of the run."""
    facts = {
        "parameters": f"{plan.parameters.total:,}",
        "text": str(plan.recipe.without_paths().data.text or "the pydoc topics"),
        "tokens": f"{result.tokens:,}",
        "steps": f"{result.steps:,}",
        "training FLOPs": f"{plan.flops:.3g} (computed from the configuration)",
    }
    if result.loss is not None:
        facts["last training loss"] = f"{result.loss:.4f}"
    if result.eval_loss is not None:
        facts["loss on the evaluation text"] = f"{result.eval_loss:.4f} nats per token"
    return facts
