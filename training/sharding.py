"""Routers in full precision where FSDP2 computes in lower precision."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..modeling.token_routing import RouterBank


def keep_routers_in_fp32(model: nn.Module) -> None:
    """Shards the routers of `model` by themselves, before an engine shards the rest.

    FSDP2 casts the weights that it gathers to the lower precision of its policy, also those that a model keeps in
    fp32; modules that are sharded already it leaves alone. To be called on every rank, with the process group started.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for module in list(model.modules()):
        if isinstance(module, RouterBank) and not isinstance(module, FSDPModule):
            fully_shard(module)


class FullPrecisionRouters(TrainerCallback):
    """Keeps the routers in fp32 where accelerate shards by FSDP2 in bf16 or fp16; does nothing elsewhere.

    To be given to the trainer when it is made: `Trainer(..., callbacks=[FullPrecisionRouters()])`.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        from accelerate.state import AcceleratorState

        engine = AcceleratorState()
        plugin = getattr(engine, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and engine.mixed_precision != "no":
            keep_routers_in_fp32(model)
