"""One optimiser step: its batches, made while the step before runs; forward and backward passes; and what it cost.

Nothing here waits for a GPU: figures stay on it, and its clock is read when they are logged.
"""

import contextlib
import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from irlfast.common import dist
from irlfast.data.packing import Batch, Layout, PromptGroup, learned, micro_batches, pack, token_counts
from irlfast.engine.memory import Limit
from irlfast.losses.inputs import Metrics, Normalisers
from irlfast.models.attention import operations

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 operations a second, from the data sheets
COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_gather", "all_gather_coalesced", "all_gather_into_tensor"),
)


class Prepared(NamedTuple):
    """A step before it runs: this process's batches in host memory, and what all processes' are together."""

    batches: list[Batch]
    share: Normalisers
    work: Counter[str]  # tokens, answer_tokens, and seen: tokens that a token sees, summed


def prepare(
    steps: Sequence[np.ndarray], groups: Sequence[PromptGroup], layout: Layout, limit: Limit
) -> Iterator[Prepared]:
    """Every step with its batches, made by a thread one step ahead, of at most ``limit.tokens`` each."""

    def batch_of(part: list[int]) -> Batch:
        # Without segments, a process goes through one all the same: the others wait for its gradients.
        return pack([groups[i] for i in part], layout) if part else pack(groups[:1], layout).unscored()

    def make(step: np.ndarray, limit: int) -> Prepared:
        chosen = [groups[i] for i in step]
        micro = micro_batches(step.tolist(), groups, layout, limit, dist.rank(), dist.world_size())
        experts = sum(len(learned(group.answers[0], group)) for group in chosen)
        share = Normalisers(step.size / dist.world_size(), experts / dist.world_size())
        return Prepared([batch_of(part).pinned() for part in micro], share, token_counts(chosen, layout))

    with ThreadPoolExecutor(1) as worker:
        ahead = worker.submit(make, steps[0], limit.tokens)
        for number, following in enumerate([*steps[1:], None], 1):
            prepared = ahead.result()
            if following is not None:
                ahead = worker.submit(make, following, limit.tokens)
            yield prepared
            limit.refit(number, max(batch.input_ids.numel() for batch in prepared.batches))


def train_step(engine: Any, prepared: Prepared, max_grad_norm: float, watch: "Stopwatch") -> tuple[Metrics, Any]:
    """One optimiser step through this process's micro-batches; returns their summed figures and the gradient's norm."""
    total: Metrics = {}
    with reduced_together(engine):
        for number, batch in enumerate(prepared.batches, 1):
            on_device = batch.to(dist.device())
            watch.lap("data")
            engine.set_gradient_accumulation_boundary(number == len(prepared.batches))
            loss, metrics = engine(on_device, prepared.share)
            watch.lap("forward")
            engine.backward(loss)
            total = add(total, metrics)
            watch.lap("backward")
    watch.lap("backward")
    norm = None
    if isinstance(engine.optimizer, torch.optim.Optimizer):  # without ZeRO, DeepSpeed tells no norm
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), max_grad_norm or math.inf)
    engine.step()
    watch.lap("optimizer")
    return total, engine.get_global_grad_norm() if norm is None else norm


def reduced_together(engine: Any) -> contextlib.AbstractContextManager:
    """Within it, a CPU's gradients add up, to be reduced at its end; ZeRO-2 and 3 would wait for that every time."""
    if dist.device().type == "cpu" and engine.zero_optimization_stage() > 1:
        return engine.coalesce_grad_reduction()
    return contextlib.nullcontext()


def add(total: Metrics, metrics: Metrics) -> Metrics:
    return {name: total.get(name, 0) + value for name, value in metrics.items()}


# ---------------------------------------------------------------- what it cost


@contextlib.contextmanager
def profiled(wanted: bool, path: Path) -> Iterator[Callable[[], None]]:
    """A function to call after every step; a torch profiler trace of steps 3 to 5 is written to ``path`` if wanted."""
    if not wanted:
        yield lambda: None
        return
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=0, active=3, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step


class Stopwatch:
    """Seconds by part of a step. On a GPU the marks are events, so that only ``read`` waits."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, Any, list[tuple[Any, Any]]]] = [("", self.now(), [])]
        self.inside: list[tuple[Any, Any]] = []  # when communication began and ended, within the part that is running

    def now(self) -> Any:
        if dist.device().type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, part: str) -> None:
        self.marks.append((part, self.now(), self.inside))
        self.inside = []

    def read(self) -> dict[str, float]:
        """Seconds of every part since the last reading, and of all."""
        self.lap("data")
        if dist.device().type == "cuda":
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (_, sooner, _), (part, later, inside) in itertools.pairwise(self.marks):
            span, apart = span_of(sooner, later), sum(span_of(*each) for each in inside)
            for name, value in ((part, span - apart), ("communication", apart), ("all", span)):
                seconds[name] += value
        self.marks = self.marks[-1:]
        return dict(seconds)

    @contextlib.contextmanager
    def telling_communication(self) -> Iterator[None]:
        """Within it, the time in DeepSpeed's collectives is taken from the part of the step that calls them.

        That is what the step waits for: collectives on another stream of a GPU, beside the backward pass, and those
        that are waited for later, which are ZeRO-3's, lie where they did.
        """
        from deepspeed.comm import comm

        def timed(collective: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                if dist.device().type == "cuda" and torch.cuda.current_stream() != torch.cuda.default_stream():
                    return collective(*args, **kwargs)
                begun = self.now()
                result = collective(*args, **kwargs)
                self.inside.append((begun, self.now()))
                return result

            return call

        clocked = {name: timed(getattr(comm.cdb, name)) for name in COLLECTIVES if hasattr(comm.cdb, name)}
        vars(comm.cdb).update(clocked)  # before the class's own
        try:
            yield
        finally:
            for name in clocked:
                delattr(comm.cdb, name)


def span_of(sooner: Any, later: Any) -> float:
    return later - sooner if isinstance(later, float) else sooner.elapsed_time(later) / 1000


def meters(model: Any, found: Counter[str], seconds: dict[str, float]) -> dict[str, float]:
    """Seconds and their split, tokens a second over all processes, operations a second and device, MFU on known GPUs.

    The split's parts add up to 1; see :meth:`Stopwatch.telling_communication`.
    """
    spent = seconds.pop("all")
    rate = operations(model, found) / spent / dist.world_size()
    row = {
        "seconds": spent,
        "tokens_per_second": found["tokens"] / spent,
        "answer_tokens_per_second": found["answer_tokens"] / spent,
        "tflops": rate / 1e12,
        **{f"time/{part}": share / spent for part, share in seconds.items()},
    }
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((peak for gpu, peak in PEAK.items() if gpu in name), None)
    return row | ({"mfu": rate / peak} if peak else {})
