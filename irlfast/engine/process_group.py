"""Starting and ending the process group of a run, which DeepSpeed needs for one process too."""

import datetime
import os
import socket

import torch
import torch.distributed

from irlfast.common import dist, ranks
from irlfast.common.files import InputError
from irlfast.engine.deepspeed_patches import give_timeout_to_groups, skip_shared_memory_collectives
from irlfast.engine.interfaces import advice, choose_interface

NO_LIMIT = datetime.timedelta(days=365)
BEHIND = datetime.timedelta(minutes=10)  # a collective fails later than the watchdog, which says more about a hang


def init_process_group(stall_timeout: float = 0.0) -> None:
    """Make the process group of all processes. A run without a launcher becomes a group of one process.

    The group meets below the names of this start of the processes: after a restart by ``torchrun --max-restarts`` it
    would meet the addresses of the processes before (https://github.com/pytorch/pytorch/issues/167288).

    A collective may wait for ``stall_timeout`` seconds, and some more, in DeepSpeed's own groups, too (0: no limit).
    A second run of the same process keeps the group of the first.

    Raises:
        InputError: the processes do not reach each other, or GLOO_SOCKET_IFNAME names no interface of this machine.
    """
    if torch.distributed.is_initialized():
        return
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
    timeout = datetime.timedelta(seconds=stall_timeout) + BEHIND if stall_timeout else NO_LIMIT
    choose_interface()
    ranks.meet()
    names = f"{ranks.STORE.prefix if ranks.STORE else ''}group"
    try:
        torch.distributed.init_process_group(
            backend,
            store=torch.distributed.PrefixStore(names, ranks.connect(ranks.JOINED_WITHIN)),
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            timeout=timeout,
            device_id=dist.device() if backend == "nccl" and ranks.world_size() > 1 else None,  # as DeepSpeed gives it
        )
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise InputError(advice(error)) from error
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)
    give_timeout_to_groups(timeout)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def destroy_process_group() -> None:
    """Wait for all processes, which have done their work, and part from them."""
    ranks.meet()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    ranks.leave()
