"""One optimiser step: its batches, prepared while the step before runs, and its forward and backward passes.

Nothing here waits for a GPU: metrics stay on it until they are logged.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from irlfast.common import dist
from irlfast.data.batching import micro_batches
from irlfast.data.packing import Batch, Layout, PromptGroup, learned, pack, token_counts
from irlfast.engine.memory import TokenLimit
from irlfast.engine.meters import Stopwatch
from irlfast.losses.inputs import Metrics, Normalisers


class PreparedStep(NamedTuple):
    """A step before it runs."""

    batches: list[Batch]  # this process's micro-batches, in host memory
    normalisers: Normalisers
    counts: Counter[str]  # of all processes: see token_counts

    def largest(self) -> int:
        """Return the number of tokens of the largest forward pass, padding included."""
        passes = [read for batch in self.batches for read in (batch, batch.teacher) if read is not None]
        return max(read.input_ids.numel() for read in passes)


def prepare_steps(
    steps: Sequence[np.ndarray], groups: Sequence[PromptGroup], layout: Layout, limit: TokenLimit
) -> Iterator[PreparedStep]:
    """Yield every step with its batches of at most ``limit.tokens`` tokens. A thread prepares one step ahead.

    A limit that is changed after a step holds from the second next step on, because the next one is prepared already.
    """
    with ThreadPoolExecutor(1) as worker:
        ahead = worker.submit(prepare_step, steps[0], groups, layout, limit.tokens)
        for following in steps[1:]:
            prepared = ahead.result()
            ahead = worker.submit(prepare_step, following, groups, layout, limit.tokens)
            yield prepared
        yield ahead.result()


def prepare_step(step: np.ndarray, groups: Sequence[PromptGroup], layout: Layout, limit: int) -> PreparedStep:
    """Pack this process's share of a step into micro-batches of at most ``limit`` tokens."""
    ranks = dist.world_size()
    chosen = [groups[i] for i in step]
    expert_tokens = sum(len(learned(group.answers[0], group)) for group in chosen)
    normalisers = Normalisers(step.size / ranks, expert_tokens / ranks)
    batches = []
    for numbers in micro_batches(step.tolist(), groups, layout, limit, dist.rank(), ranks):
        # Without a group, this process runs a batch that scores nothing: the others wait for its gradients.
        batch = pack([groups[i] for i in numbers], layout) if numbers else pack(groups[:1], layout).unscored()
        batches.append(batch.pinned())
    return PreparedStep(batches, normalisers, token_counts(chosen, layout))


def train_step(engine: Any, prepared: PreparedStep, max_grad_norm: float, watch: Stopwatch) -> tuple[Metrics, Any]:
    """Take one optimiser step; return the summed metrics of this process's micro-batches and the gradient's norm."""
    sums: Metrics = {}
    with reduced_together(engine):
        for number, batch in enumerate(prepared.batches, 1):
            on_device = batch.to(dist.device())
            watch.lap("data")
            engine.set_gradient_accumulation_boundary(number == len(prepared.batches))
            loss, metrics = engine(on_device, prepared.normalisers)
            watch.lap("forward")
            engine.backward(loss)
            sums = add(sums, metrics)
            watch.lap("backward")
    watch.lap("backward")
    norm = None
    if isinstance(engine.optimizer, torch.optim.Optimizer):  # without ZeRO, DeepSpeed does not give the norm
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), max_grad_norm or math.inf)
    engine.step()
    watch.lap("optimizer")
    return sums, engine.get_global_grad_norm() if norm is None else norm


def reduced_together(engine: Any) -> contextlib.AbstractContextManager:
    """Reduce a CPU's gradients once, after the last micro-batch. ZeRO-2 and 3 would reduce, and wait, after each."""
    if dist.device().type == "cpu" and engine.zero_optimization_stage() > 1:
        return engine.coalesce_grad_reduction()
    return contextlib.nullcontext()


def add(sums: Metrics, metrics: Metrics) -> Metrics:
    return {name: sums.get(name, 0) + value for name, value in metrics.items()}
