"""The processes of a run: who this one is, and waiting for the others. torchrun's variables say; none means one."""

import datetime
import gc
import os
import socket
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
    """This process's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def start() -> None:
    """Join the other processes through DeepSpeed, which wants torchrun's variables even for one process."""
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")  # it warns of every optimiser that is not its own
    # Its shared-memory CPU collectives compile for 30 s at the first use, and crash without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    # A CPU multiplies numbers below 1e-38, as gradients of settled pairs are, up to 150 times more slowly.
    torch.set_flush_denormal(True)
    # Sampling a stage can keep the slowest process busy for hours while the others wait.
    deepspeed.init_distributed(
        "nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=24), verbose=False
    )


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


def free_memory() -> None:
    """Give back what GPUs hold for objects that are gone; none goes on before all have, as vLLM takes the rest."""
    gc.collect()  # an engine and its model hold each other
    torch.cuda.empty_cache()
    barrier()


def all_gather(value: T) -> list[T]:
    """Every process's ``value``, in the order of ranks."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def from_main(value: T | None) -> T:
    """The main process's ``value``, in every process."""
    values: list[Any] = [value]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    if world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


def stop() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
