"""The training loop: optimiser steps over planned batches, logged, checkpointed, and resumed with the same result."""

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from irlfast.common import dist
from irlfast.common.files import InputError, remove, write_text
from irlfast.common.messages import Progress, log
from irlfast.data.packing import PromptGroup
from irlfast.engine.checkpoint import resume, save_checkpoint, save_model, save_teacher
from irlfast.engine.deepspeed_engine import make_engine
from irlfast.engine.deepspeed_patches import release_zero3_engines, timed_collectives
from irlfast.engine.memory import OutOfMemory, TokenLimit, out_of_memory, phase_limit
from irlfast.engine.meters import Stopwatch, meters, profiled
from irlfast.engine.plan import Plan
from irlfast.engine.step import add, prepare_steps, train_step
from irlfast.engine.teacher import follow
from irlfast.losses.inputs import Loss, Metrics
from irlfast.runs.run import Run

NOTABLE_DROP = 0.5  # nats per demonstration; the warning comes before the policy collapses
DROP_WARNING = (
    "the demonstrations' log-likelihood is {:.2f} nats below the reference's; "
    "lower learning_rate, raise beta, or set nll_weight (0.2, say)"
)


def fit(
    run: Run,
    folder: Path,
    policy: Path | str,
    groups: Sequence[PromptGroup],
    loss: Loss,
    plan: Plan,
    teacher: Path | str | None = None,
) -> Path:
    """Train ``policy`` as planned and return the result's folder: ``folder/policy``, or ``folder/model`` for a reward.

    With a ``teacher``, the model that it begins as, the loss gets the teacher's hidden states, too
    (:mod:`irlfast.engine.teacher`). A teacher that follows the policy is left in ``folder/teacher``.

    A killed run loses at most ``save_steps`` steps: the same call continues from the last checkpoint in ``folder``.
    A single process that runs out of memory with ``max_tokens_per_batch: auto`` continues from there by itself, with
    half the tokens per batch.

    Raises:
        InputError: the loss or its gradient is not finite; no policy is written then.
    """
    while not (folder / "DONE").exists():
        with contextlib.suppress(OutOfMemory):
            train_phase(run, folder, policy, groups, loss, plan, teacher)
        release_zero3_engines()
        dist.free_memory()
    return folder / result_name(plan)


def result_name(plan: Plan) -> str:
    return "model" if plan.reward else "policy"


def train_phase(
    run: Run,
    folder: Path,
    policy: Path | str,
    groups: Sequence[PromptGroup],
    loss: Loss,
    plan: Plan,
    teacher: Path | str | None,
) -> None:
    """Train from the last checkpoint, or from the start, to the end of the phase; save the model."""
    config, checkpoint = run.config, folder / "checkpoint"
    engine = make_engine(policy, loss, plan, config, groups, teacher)
    limit = phase_limit(config, groups, engine.module.prepared.layout, plan.micro_batch, checkpoint)
    done = resume(engine, checkpoint, config)
    try:
        train_steps(run, folder, engine, groups, plan, done, limit)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(limit, checkpoint) from error
    save_model(engine, policy, folder / result_name(plan), run.encoder, plan.reward, config)
    if engine.module.teacher and engine.module.teacher.followed:
        save_teacher(engine, policy, folder / "teacher", run.encoder, config)
    engine.destroy()
    if dist.is_main():
        write_text(folder / "DONE", "")
        remove(checkpoint)
    dist.barrier()


def train_steps(
    run: Run, folder: Path, engine: Any, groups: Sequence[PromptGroup], plan: Plan, done: int, limit: TokenLimit
) -> None:
    """Take the steps after the first ``done``; log every ``logging_steps`` and save every ``save_steps`` steps."""
    config, phase, last = run.config, folder.relative_to(run.output).as_posix(), len(plan.steps)
    steps = prepare_steps(plan.steps[done:], groups, engine.module.prepared.layout, limit)
    run.metrics_log.start_phase(phase, done)
    sums: Metrics = {}  # sums and counts are over the steps since the last logged one
    counts: Counter[str] = Counter()
    watch = Stopwatch()
    warned = False
    with (
        Progress(phase, last, "step", done) as progress,
        profiled(config.profile and dist.is_main(), folder / "trace.json") as profile_step,
        timed_collectives(watch),
    ):
        for step, prepared in enumerate(steps, done + 1):
            metrics, grad_norm = train_step(engine, prepared, config.max_grad_norm, watch)
            if engine.module.teacher:
                follow(engine.module.teacher, step, config)
            limit.fit_to_memory(step - done, prepared.largest())
            sums, counts = add(sums, metrics), counts + prepared.counts
            profile_step()
            progress.advance()
            # A CPU checks the norm of every step. A GPU would wait for it, so there only logged steps are checked.
            finite = dist.device().type != "cpu" or math.isfinite(grad_norm or 0.0)
            if finite and step % config.logging_steps and step < last:
                continue
            row = {"phase": phase, **position(plan, step, len(groups)), **means(sums)}
            row |= {"grad_norm": float(grad_norm or 0.0), "learning_rate": engine.get_lr()[0]}
            row |= meters(engine.module.prepared.costs, counts, watch.read())
            sums, counts = {}, Counter()
            run.metrics_log.write(row)
            progress.show(postfix(row))
            check_finite(row)
            drop = expert_drop(row)
            if drop > NOTABLE_DROP and not warned:
                warned = True
                log(f"warning: {phase}, step {step}: {DROP_WARNING.format(drop)}")
            if config.max_expert_drop and drop > config.max_expert_drop:
                log(f"{phase} ends at step {step}: {drop:.2f} nats are more than max_expert_drop")
                break
            if config.save_steps and step % config.save_steps == 0 and step < last:
                save_checkpoint(engine, folder / "checkpoint", step, config)


def position(plan: Plan, step: int, group_count: int) -> dict[str, Any]:
    """Return where the run is: stage, step and epoch, as in metrics.jsonl."""
    stage = -1 if plan.stage is None else plan.stage  # metrics.jsonl writes SFT's stage as -1
    return {"stage": stage, "step": step, "epoch": step * plan.steps[0].size / group_count}


def means(sums: Metrics) -> dict[str, float]:
    """Return means over the prompt groups of all processes. Only here do metrics leave the device."""
    names = sorted(sums)
    values = dist.all_reduce(torch.stack([sums[name].double() for name in names])).tolist()
    totals = dict(zip(names, values, strict=True))
    count = totals.pop("count")
    return {name: value / count for name, value in totals.items()}


def check_finite(row: dict[str, Any]) -> None:
    """Raise an InputError where the loss or the gradient is not finite: clipping would turn the gradient into zeros."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise InputError(f"{row['phase']}, step {row['step']}: {name} is {row[name]}; try a lower learning_rate")


def expert_drop(row: dict[str, Any]) -> float:
    """Return by how many nats per demonstration the policy is below the reference; 0 without a reference."""
    return row["logps/reference"] - row["logps/chosen"] if "logps/reference" in row else 0.0


def postfix(row: dict[str, Any]) -> str:
    """Return the metrics that the progress bar shows."""
    shown = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies", "logp": "logps/chosen"}
    metrics = [f"{label} {row[name]:.3g}" for label, name in shown.items() if name in row]
    utilisation = [f"MFU {row['mfu']:.0%}"] if "mfu" in row else []
    return "  ".join([*metrics, f"{row['answer_tokens_per_second']:,.0f} answer tokens/s", *utilisation])
