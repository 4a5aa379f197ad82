"""What all runs of this package tell `Trainer` alike, and what they check first."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from transformers import TrainingArguments


# so many tokens of the text start routers and calibrate them
ROUTER_TOKENS = 8192


def world_size() -> int:
    """Processes that the launcher (accelerate, torchrun) has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def quiet_arguments() -> dict[str, Any]:
    """Arguments of a run that shows a line of its own instead of `Trainer`'s bars and reports, on what there is."""
    accelerated = torch.accelerator.is_available()
    return {
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": accelerated,
        "use_cpu": not accelerated,
    }


def of_first_process(value: Any, args: TrainingArguments) -> Any:
    """What the first process has found, in all of them; starts their group, where there are several."""
    assert args.device is not None
    return broadcast_object_list([value])[0]


def hold_precision(args: TrainingArguments) -> TrainingArguments:
    """Lets the arguments alone say in which precision is computed, where a launcher's file says another one."""
    args.mixed_precision = "bf16" if args.bf16 else "no"
    return args


def refuse_sharding(what: str) -> None:
    """Raises a `ValueError` where accelerate was told to divide the weights among processes."""
    for engine, flag in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if parse_flag_from_env(flag):
            raise ValueError(
                f"{what} reads and sets whole weights, which {engine} divides among processes: launch it without, so "
                "that each process has all of them (DDP), or with one process."
            )


def refuse_several_gpus(args: TrainingArguments) -> None:
    """Raises a `ValueError` where `Trainer` would spread one process over several GPUs."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would copy the model at every step: start one process per GPU with "
            "torchrun or `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one."
        )
