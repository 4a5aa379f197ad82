"""What the processes of a distributed run tell each other inside a forward pass, and when they must keep in step.

Everything here is the identity in a single process. The group is the default one: ranks of a tensor-parallel group
count the same tokens several times, which changes no mean and no quantile.
"""

import torch
from torch import nn


def number_of_ranks() -> int:
    """Processes that train or evaluate together; 1 without `torch.distributed`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


@torch.no_grad()
def sum_over_ranks(counts: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's tensor, which all of them must pass in the same shape."""
    if number_of_ranks() > 1:
        counts = counts.detach().clone()
        torch.distributed.all_reduce(counts)
    return counts


@torch.no_grad()
def join_ranks(values: torch.Tensor) -> torch.Tensor:
    """Every rank's values, of shape `(number,)`, one behind the other; ranks may have different numbers of them."""
    ranks = number_of_ranks()
    if ranks == 1:
        return values
    own = torch.zeros(ranks, dtype=torch.long, device=values.device)
    own[torch.distributed.get_rank()] = len(values)
    sizes = sum_over_ranks(own).tolist()
    if not any(sizes):
        return values
    padded = values.new_zeros(max(sizes))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def ranks_keep_step(layers: nn.ModuleList, training: bool) -> bool:
    """Whether a layer that this rank has no token for must run nevertheless, since other ranks may have some.

    That is so where its weights are gathered from all ranks when it runs (FSDP, ZeRO-3), and in training where every
    gradient is waited for (DDP).
    """
    if number_of_ranks() == 1 or not len(layers):
        return False
    return training or _is_sharded(layers[0])


def _is_sharded(layer: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    # DeepSpeed marks the parameters that it has divided
    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in layer.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in layer.parameters()
    )
