"""One optimiser step: its batches, prepared while the step before runs, and its forward and backward passes.

A step whose loss or gradient is not finite changes neither weights nor optimiser, in any process. So the norm of the
gradient is known before the update: the one value for which a step waits for a GPU. Metrics stay on the GPU until they
are logged.
"""

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.data.batching import micro_batches
from irlfast.data.packing import Batch, Layout, PromptGroup, learned, pack, token_counts
from irlfast.engine.deepspeed_patches import keep_head_whole
from irlfast.engine.memory import TokenLimit
from irlfast.engine.meters import Stopwatch
from irlfast.losses.inputs import Metrics, Normalisers


class PreparedStep(NamedTuple):
    """A step before it runs."""

    numbers: list[list[int]]  # of the prompt groups in each of this process's micro-batches
    batches: list[Batch]  # this process's micro-batches, in host memory
    normalisers: Normalisers
    counts: Counter[str]  # of all processes: see token_counts

    def largest(self) -> int:
        """Return the number of tokens of the largest forward pass, padding included."""
        passes = [read for batch in self.batches for read in (batch, batch.teacher) if read is not None]
        return max(read.input_ids.numel() for read in passes)


class TakenStep(NamedTuple):
    """A step after it ran."""

    metrics: Metrics  # summed over this process's micro-batches
    losses: list[Tensor]  # of this process's micro-batches
    grad_norm: float  # of the gradient of all processes; if it is not finite, the step changed nothing


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
    other_tokens = sum(len(answer) for group in chosen for answer in group.answers[1:])
    normalisers = Normalisers(step.size / ranks, expert_tokens / ranks, other_tokens / ranks)
    batches = []
    shares = micro_batches(step.tolist(), groups, layout, limit, dist.rank(), ranks)
    for numbers in shares:
        # Without a group, this process runs a batch that scores nothing: the others wait for its gradients.
        batch = pack([groups[i] for i in numbers], layout) if numbers else pack(groups[:1], layout).unscored()
        batches.append(batch.pinned())
    return PreparedStep(shares, batches, normalisers, token_counts(chosen, layout))


def train_step(engine: Any, prepared: PreparedStep, max_grad_norm: float, watch: Stopwatch) -> TakenStep:
    """Take one optimiser step. If a loss or the gradient is not finite, only the learning rate's schedule goes on."""
    sums: Metrics = {}
    losses = []
    keep_head_whole(engine)
    with reduced_together(engine):
        for number, batch in enumerate(prepared.batches, 1):
            on_device = batch.to(dist.device())
            watch.lap("data")
            engine.set_gradient_accumulation_boundary(number == len(prepared.batches))
            loss, metrics = engine(on_device, prepared.normalisers)
            watch.lap("forward")
            engine.backward(nan_unless_finite(loss))
            sums = add(sums, metrics)
            losses.append(loss.detach())
            watch.lap("backward")
    watch.lap("backward")
    norm = None
    if isinstance(engine.optimizer, torch.optim.Optimizer):  # without ZeRO, DeepSpeed neither clips nor checks
        norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), max_grad_norm or math.inf))
        if not math.isfinite(norm):
            engine.optimizer.zero_grad()  # an optimiser leaves parameters without a gradient as they are
    engine.step()
    if not engine.was_step_applied():
        skip_scheduled_rate(engine)
    watch.lap("optimizer")
    return TakenStep(sums, losses, float(engine.get_global_grad_norm()) if norm is None else norm)


def nan_unless_finite(loss: Tensor) -> Tensor:
    """Return the loss, or NaN in place of an infinite one, so that the whole gradient is NaN then."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def skip_scheduled_rate(engine: Any) -> None:
    """Let the schedule go on after a step that DeepSpeed's ZeRO has skipped, because the rate belongs to the step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a schedule that goes on before the first update
        engine.lr_scheduler.step()


def reduced_together(engine: Any) -> contextlib.AbstractContextManager:
    """Reduce a CPU's gradients once, after the last micro-batch. ZeRO-2 and 3 would reduce, and wait, after each.

    Until then the gradients are summed in the dtype of the weights, so that bfloat16 with sums in fp32 goes without.
    """
    of_weights, of_sums = engine.get_data_types()
    if dist.device().type == "cpu" and engine.zero_optimization_stage() > 1 and of_weights == of_sums:
        return engine.coalesce_grad_reduction()
    return contextlib.nullcontext()


def add(sums: Metrics, metrics: Metrics) -> Metrics:
    return {name: sums.get(name, 0) + value for name, value in metrics.items()}
