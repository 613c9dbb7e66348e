"""A function run by several processes of one gloo process group."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def on_ranks(count: int, function: Callable[[int], Any]) -> list[Any]:
    """The function's results on ``count`` ranks, which are forks of this process.

    Raises:
        AssertionError: the function failed on some rank; the message has the rank's traceback.
    """
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        ranks = [context.Process(target=run, args=(r, count, store, function, results)) for r in range(count)]
        for rank in ranks:
            rank.start()
        given = dict(results.get() for _ in ranks)
        for rank in ranks:
            rank.join()
    failures = [f"rank {rank}: {result}" for rank, result in given.items() if isinstance(result, str)]
    assert not failures, "\n".join(failures)
    return [given[rank][0] for rank in range(count)]


def run(rank: int, count: int, store: str, function: Callable[[int], Any], results: Any) -> None:
    """Put ``(rank, (result,))`` or ``(rank, traceback)``."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
        results.put((rank, (function(rank),)))
    except BaseException:
        results.put((rank, traceback.format_exc()))
    finally:
        os._exit(0)  # without the exit handlers of the test run that was forked
