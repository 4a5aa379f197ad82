"""Ranks for the distributed mixins of transformers: what the sdist does not carry of `distributed_testing_utils`.

The mixins need five helpers: which device and backend the ranks use, how a rank finds its device, and how ranks are
started. Everything runs on CPU processes over gloo, which is all that the suite needs to compare sharded with whole
models.
"""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """A CPU rank has no device to select."""


def _start_rank_processes(function: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Runs `function(rank, *args)` in `nprocs` fresh processes and raises what the first failing one raised."""
    mp.spawn(function, args=args, nprocs=nprocs, join=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _rank_main(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    dist.init_process_group(_get_distributed_backend(), rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator factory: the decorated `function(rank, *args)` runs in `world_size` processes of one gloo group."""

    def start(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            _start_rank_processes(_rank_main, (world_size, _free_port(), function, args), world_size)

        return call

    return start
