"""Several processes on one step, by torch's own DistributedDataParallel.

`torchrun --nproc-per-node 2 -m mv2v_engine.training.dit ...`; without torchrun there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from mv2v_engine.parallel.device import usable_device

T = TypeVar("T")


def join(name: str) -> torch.device:
    """Meet the other processes of this `torchrun`, if it is one; "cuda" is then one GPU each.

    Returns:
        the device to train on.

    Raises:
        RequestError: it cannot be used.
    """
    if not dist.is_torchelastic_launched():
        return usable_device(name)
    is_cuda = name.startswith("cuda")
    device = usable_device(f"cuda:{dist.get_node_local_rank()}" if is_cuda else name)
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_cuda else "gloo")
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def data_parallel(module: nn.Module) -> nn.Module:
    """The module with gradients averaged over processes.

    Modules that a step's token plan leaves out (mergers, tokenizers) get no gradient.
    """
    if not dist.is_initialized():
        return module
    return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)


def own_generator(shared: torch.Generator) -> torch.Generator:
    """A generator of this process alone, following from one that is equal in all."""
    seed = int(torch.randint(2**48, (), generator=shared))
    return torch.Generator().manual_seed(seed + rank())


def first_says(value: float) -> float:
    """Process 0's value in every process: clocks differ, schedules must not."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    dist.broadcast(tensor, 0)
    return float(tensor)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in process 0, which alone runs it, in every process."""
    value: list[Any] = [make() if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(value, 0)
    result: T = value[0]
    return result


def leave() -> bool:
    """Part from the other processes; whether this is the one, process 0, that has work left."""
    is_first = rank() == 0
    if dist.is_initialized():
        dist.destroy_process_group()
    return is_first
