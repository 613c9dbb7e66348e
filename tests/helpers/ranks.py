"""A function run by several processes of one gloo process group."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch._dynamo  # imported by a call with a group: once here, instead of once on each rank
import torch.distributed as dist

PATIENCE = 120  # seconds


def on_ranks(count: int, function: Callable[[int], Any]) -> list[Any]:
    """The function's results on ``count`` ranks, which are forks of this process.

    Raises:
        AssertionError: the function failed on some rank, or did not end; the message has the rank's traceback.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        ranks = [context.Process(target=run, args=(r, count, store, function, pipes[r][1])) for r in range(count)]
        for rank in ranks:
            rank.start()
        outcomes = [result.recv() if result.poll(PATIENCE) else "no result" for result, _ in pipes]
        for rank in ranks:
            rank.kill()
            rank.join()
    failures = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
    assert not failures, "\n".join(failures)
    return [outcome[0] for outcome in outcomes]


def run(rank: int, count: int, store: str, function: Callable[[int], Any], outcome: Connection) -> None:
    """Send ``(result,)``, or a traceback."""
    torch.set_num_threads(1)  # a fork has no OpenMP threads: it would wait for those of its parent
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
        outcome.send((function(rank),))
        dist.barrier()  # a rank that ends early would close the connections of the others
    except BaseException:
        outcome.send(traceback.format_exc())
    finally:
        os._exit(0)  # without the exit handlers of the test run that was forked
