"""The processes that lead engines of vLLM, and the GPUs of each engine.

Every process trains on its own GPU. The first process of each group of ``vllm_tensor_parallel_size`` GPUs also leads
the engine that runs on the group.
"""

import os
from collections.abc import Sequence

import torch

from irlfast.common import dist


def led_gpus(own: int, visible: Sequence[str], size: int) -> list[str]:
    """Return the GPUs of the engine that a process leads, its own the first; none if it leads no engine.

    A group that is not whole, at the end of a machine's GPUs, has no engine.

    Args:
        own: the place of the process's own GPU among the visible ones.
        visible: the names of GPUs as in CUDA_VISIBLE_DEVICES: numbers, or UUIDs of GPUs or of their parts (MIG).
        size: GPUs per engine.
    """
    group = [*visible[own : own + size]]
    return group if own % size == 0 and len(group) == size else []


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process sees."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in named.split(",")] if named.strip() else [str(gpu) for gpu in range(count)]
    return names[:count]  # CUDA leaves out what follows a name that it does not know


def engine_gpus(size: int) -> list[str] | None:
    """Return the GPUs of the engine that this process leads; none if it leads no engine.

    None where nothing is to be chosen: on a CPU, or without a launcher, so that vLLM takes the GPUs that it finds.
    """
    if not torch.cuda.is_available() or "LOCAL_RANK" not in os.environ:
        return None
    return led_gpus(dist.device().index, visible_gpus(), size)


def leads_engine(size: int) -> bool:
    """Return whether this process leads an engine of ``size`` GPUs. On a CPU, each process counts as a GPU."""
    gpus = engine_gpus(size)
    return bool(gpus) if gpus is not None else int(os.environ.get("LOCAL_RANK", 0)) % size == 0
