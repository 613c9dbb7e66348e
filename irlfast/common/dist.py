"""This process's rank and device, and torch.distributed's collectives, which one process skips.

``torchrun`` sets the variables read here. Without them, the run is one process.
``engine/process_group.py`` starts the process group. All but :func:`all_reduce` first wait until every process is here
(:func:`irlfast.common.ranks.meet`), so that no collective waits for the long work of one process.
"""

import gc
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed

from irlfast.common.ranks import meet, rank, world_size

T = TypeVar("T")


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """Return this process's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def barrier() -> None:
    if world_size() > 1:
        meet()
        torch.distributed.barrier()


def all_gather_object(value: T) -> list[T]:
    """Return every process's ``value``, in the order of ranks."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        meet()
        torch.distributed.all_gather_object(values, value)
    return values


def broadcast_object(value: T | None) -> T:
    """Return the main process's ``value``, in every process."""
    values: list[Any] = [value]
    if world_size() > 1:
        meet()
        torch.distributed.broadcast_object_list(values)
    return values[0]


def on_main(function: Callable[..., T], *arguments: Any) -> T:
    """Return, in every process, what ``function`` returns in the main one, which alone calls it."""
    return broadcast_object(function(*arguments) if is_main() else None)


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """Sum ``values`` over all processes, in place, and return them."""
    if world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


def free_memory() -> None:
    """Give back the memory of deleted objects, and wait for all processes: vLLM takes what is free on a GPU."""
    gc.collect()  # an engine and its model hold each other
    torch.cuda.empty_cache()
    if torch.cuda.is_available() and hasattr(torch.accelerator, "empty_host_cache"):  # not in every torch
        torch.accelerator.empty_host_cache()  # of copies for checkpoints
    barrier()
