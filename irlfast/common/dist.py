"""The processes of a run: this one's rank and device, and torch.distributed's collectives, which one process skips.

``torchrun`` sets the variables read here. Without them, the run is one process.
``engine/process_group.py`` starts the process group.
"""

import gc
import os
from typing import Any, TypeVar

import torch
import torch.distributed

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """Return this process's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


def all_gather_object(value: T) -> list[T]:
    """Return every process's ``value``, in the order of ranks."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def broadcast_object(value: T | None) -> T:
    """Return the main process's ``value``, in every process."""
    values: list[Any] = [value]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """Sum ``values`` over all processes, in place, and return them."""
    if world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


def free_memory() -> None:
    """Give back the GPU memory of deleted objects, and wait for all processes: vLLM takes what is free."""
    gc.collect()  # an engine and its model hold each other
    torch.cuda.empty_cache()
    barrier()
