"""Several processes that train one model together, as torchrun starts them: each holds a part of every weight.

Fully sharded data parallel (Zhao et al. 2023; torch's fully_shard): layers are gathered when they run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dapji.training.network import Network


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Joins the processes that torchrun started, if it did. Gives the device of this one."""
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    local = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield local
    finally:
        dist.destroy_process_group()


def shard(network: Network) -> None:
    """Each rank keeps a part of every layer, and of the rest. Does nothing in a process alone."""
    if dist.is_initialized():
        mesh = init_device_mesh(network.device.type, (dist.get_world_size(),))
        for index in range(network.config.n_layers):
            fully_shard(network.get_submodule(f"layers.{index}"), mesh=mesh)
        fully_shard(network, mesh=mesh)


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return not dist.is_initialized() or dist.get_rank() == 0


def together() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()
