"""The cost of a step: seconds per part, tokens per second, operations per second."""

import contextlib
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from irlfast.common import dist
from irlfast.engine.hardware import peak_operations
from irlfast.models.costs import Costs, operations


class Lap(NamedTuple):
    """The end of a part of a step. Times are seconds on a CPU, and events on a GPU."""

    part: str
    end: Any
    collectives: list[tuple[Any, Any]]  # the beginning and end of each collective within the part


class Stopwatch:
    """Seconds per part of a step. A GPU records events, so only ``read`` waits for it."""

    def __init__(self) -> None:
        self.laps = [Lap("", self.now(), [])]
        self.collectives: list[tuple[Any, Any]] = []  # of the part that is running

    def now(self) -> Any:
        if dist.device().type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, part: str) -> None:
        """End the running part, which is named only now."""
        self.laps.append(Lap(part, self.now(), self.collectives))
        self.collectives = []

    def read(self) -> dict[str, float]:
        """Return the seconds of every part since the last reading, of ``communication``, and of ``all``.

        ``checkpoint`` is the time that training waited to write one: for a copy, and for the checkpoint before.
        """
        self.lap("data")
        if dist.device().type == "cuda":
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float, checkpoint=0.0)
        for before, lap in itertools.pairwise(self.laps):
            total = seconds_between(before.end, lap.end)
            communication = sum(seconds_between(begin, end) for begin, end in lap.collectives)
            seconds[lap.part] += total - communication
            seconds["communication"] += communication
            seconds["all"] += total
        self.laps = self.laps[-1:]
        return dict(seconds)


def seconds_between(begin: Any, end: Any) -> float:
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000


def meters(costs: Costs, counts: Counter[str], seconds: dict[str, float]) -> dict[str, float]:
    """Return seconds, each part's share of them, tokens per second, and operations per second and device.

    The shares add up to 1. Tokens are those of all processes, and operations those of the policy: the forward pass of
    a teacher is in the seconds alone. ``memory_gib`` is this process's memory. ``mfu``, the model FLOPs utilisation, is
    given on GPUs whose peak is known.
    """
    total = seconds.pop("all")
    rate = operations(costs, counts) / total / dist.world_size()
    row = {
        "seconds": total,
        "tokens_per_second": counts["tokens"] / total,
        "answer_tokens_per_second": counts["answer_tokens"] / total,
        "tflops": rate / 1e12,
        "memory_gib": memory_in_use() / 2**30,
        **{f"time/{part}": value / total for part, value in seconds.items()},
    }
    peak = peak_operations(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return row | ({"mfu": rate / peak} if peak else {})


def memory_in_use() -> int:
    """Return the bytes of this process: the peak of its tensors on a GPU, or what it holds on a CPU."""
    if dist.device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


@contextlib.contextmanager
def profiled(wanted: bool, path: Path) -> Iterator[Callable[[], None]]:
    """Give a function to call after every step. If ``wanted``, a profiler's trace of steps 3 to 5 goes to ``path``."""
    if not wanted:
        yield lambda: None
        return
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=0, active=3, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step
