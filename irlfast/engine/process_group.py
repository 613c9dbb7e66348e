"""Starting and ending the process group of a run, which DeepSpeed needs for one process too."""

import datetime
import os
import socket

import torch
import torch.distributed

from irlfast.common import dist
from irlfast.engine.deepspeed_patches import skip_shared_memory_collectives

TIMEOUT = datetime.timedelta(hours=24)  # the slowest process may sample for hours while the others wait


def init_process_group() -> None:
    """Join the other processes. A run without ``torchrun`` becomes a group of one process."""
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")  # it warns of every optimiser that is not its own
    skip_shared_memory_collectives()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.device())
    # A CPU multiplies numbers below 1e-38 up to 150 times more slowly. Gradients of settled pairs are that small.
    torch.set_flush_denormal(True)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, timeout=TIMEOUT, verbose=False)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def destroy_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
