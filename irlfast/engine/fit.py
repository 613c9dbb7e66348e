"""The training loop: optimiser steps over planned batches, logged, checkpointed, and resumed with the same result."""

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from irlfast.common import dist, stop
from irlfast.common.artefacts import intact, keep_json
from irlfast.common.files import read_json, remove
from irlfast.common.messages import Progress, log
from irlfast.common.movement import in_small_units
from irlfast.common.time_left import CLOCK
from irlfast.config import Config
from irlfast.config.deepspeed import merged_settings
from irlfast.data.packing import PromptGroup
from irlfast.engine.agreement import Agreement
from irlfast.engine.alarms import LAST_ROWS, check_row, expert_drop, log_doubts, log_lessons
from irlfast.engine.bad_steps import BadSteps, WentBad, end_phase, lower_after, note_bad_step
from irlfast.engine.checkpoint import resume, save_checkpoint, save_model, save_teacher, unlogged
from irlfast.engine.deepspeed_engine import make_engine
from irlfast.engine.deepspeed_patches import release_zero3_engines, timed_collectives
from irlfast.engine.early import begin_early, note_staleness, save_early
from irlfast.engine.memory import OutOfMemory, TokenLimit, out_of_memory, phase_limit
from irlfast.engine.meters import Stopwatch, meters, profiled
from irlfast.engine.optim import set_lower_rate
from irlfast.engine.plan import Plan
from irlfast.engine.saving import check, saving_beside
from irlfast.engine.step import add, prepare_steps, train_step
from irlfast.engine.teacher import follow
from irlfast.losses.inputs import Loss, Metrics
from irlfast.runs.run import Run

Groups = Sequence[PromptGroup]
Model = Path | str  # a folder, or a name on the hub
Row = dict[str, Any]


def fit(
    run: Run,
    folder: Path,
    policy: Model,
    groups: Groups,
    loss: Loss,
    plan: Plan,
    teacher: Model | None = None,
) -> Path:
    """Train ``policy`` as planned and return the result's folder: ``folder/policy``, or ``folder/model`` for a reward.

    With a ``teacher``, the model that it begins as, the loss gets the teacher's hidden states, too
    (:mod:`irlfast.engine.teacher`). One that follows the policy is left in ``folder/teacher``, but not by SFT.

    A killed run loses at most ``save_steps`` steps: the same call continues from the last checkpoint in ``folder``.
    A single process that runs out of memory with ``max_tokens_per_batch: auto`` continues from there by itself, with
    half the tokens per batch. Steps whose loss or gradient is not finite are skipped (:mod:`irlfast.engine.bad_steps`).

    Raises:
        InputError: too many steps in a row were skipped, or ``on_spike`` is ``stop`` and a logged value is one; no
            policy is written then. Or the disk has no room for the phases that are left.
    """
    while not finished(folder):
        with contextlib.suppress(OutOfMemory, WentBad):
            train_phase(run, folder, policy, groups, loss, plan, teacher)
        release_zero3_engines()
        dist.free_memory()
    return folder / result_name(plan)


def finished(folder: Path) -> bool:
    """Return whether a phase is done, and the models that it left are intact; delete a checkpoint that a kill left."""
    done = dist.on_main(left_intact, folder)
    if done and dist.is_main():
        remove(folder / "checkpoint")
    return done


def left_intact(folder: Path) -> bool:
    """Return whether ``DONE``, and the models that it lists, are intact."""
    return intact(folder / "DONE") and all(intact(folder / model) for model in read_json(folder / "DONE"))


def result_name(plan: Plan) -> str:
    return "model" if plan.reward else "policy"


def train_phase(
    run: Run,
    folder: Path,
    policy: Model,
    groups: Groups,
    loss: Loss,
    plan: Plan,
    teacher: Model | None,
) -> None:
    """Train from the last checkpoint, or from the start, to the end of the phase; save the model."""
    run.check_room()
    config, checkpoint = run.config, folder / "checkpoint"
    log_doubts(phase_of(run, folder), plan, groups)
    plan = plan._replace(lower_after=dist.on_main(lower_after, folder, plan.learning_rate))
    engine = make_engine(policy, loss, plan, config, groups, teacher)
    limit = phase_limit(config, groups, engine.module.prepared.layout, plan.steps[0].size, checkpoint)
    begin_early(run, folder, plan)
    progress = resume(engine, checkpoint, plan)
    if plan.lower_after is not None:
        set_lower_rate(engine.lr_scheduler, plan.lower_after)
    with stop.held(f"the end of {phase_of(run, folder)}"):
        try:
            last = train_steps(run, folder, engine, policy, groups, plan, progress, limit)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(limit, checkpoint) from error
        if dist.is_main():
            log_lessons(phase_of(run, folder), run.metrics_log.rows(phase_of(run, folder)))
        CLOCK.finish()
        left = [result_name(plan)]
        save_model(engine, policy, folder / left[0], run.encoder, plan.reward, config)
        if plan.stage is not None and engine.module.teacher and engine.module.teacher.followed:
            left.append("teacher")
            save_teacher(engine, policy, folder / left[1], run.encoder, config)
        left += note_staleness(folder, plan, last)
        engine.destroy()
        if dist.is_main():
            keep_json(folder / "DONE", left)
        dist.barrier()


def train_steps(
    run: Run, folder: Path, engine: Any, policy: Model, groups: Groups, plan: Plan, progress: Row, limit: TokenLimit
) -> int:
    """Take the steps that are left; log every ``logging_steps`` and save every ``save_steps`` steps.

    Return the last step. The phase started from ``policy``.

    Raises:
        Preempted: a process was asked to stop. There is a checkpoint of the last step, if it was a good one.
    """
    config, phase, checkpoint = run.config, phase_of(run, folder), folder / "checkpoint"
    last, done, clipping = len(plan.steps), progress["step"], merged_settings(config)["gradient_clipping"]
    steps = prepare_steps(plan.steps[done:], groups, engine.module.prepared.layout, limit)
    recent = dist.on_main(lambda: run.metrics_log.start_phase(phase, done)[-LAST_ROWS:])
    CLOCK.train(phase, done / last)
    sums, grad_norm = unlogged(checkpoint, done), progress["grad_norm"]  # sums are over the steps since the last logged
    counts: Counter[str] = Counter()  # and so are counts, but without the steps before the phase was resumed
    bad = BadSteps(folder, phase, plan, config.max_bad_steps, progress["bad_steps"], progress["back_to"])
    watch, agreement = Stopwatch(), Agreement(config.preemption_grace, done, done + 1)
    with (
        in_small_units(phase),
        Progress(phase, last, "step", done) as shown,
        profiled(config.profile and dist.is_main(), folder / "trace.json") as profile_step,
        timed_collectives(watch),
        saving_beside(phase, config.async_save) as saving,
    ):
        for step, prepared in enumerate(steps, done + 1):
            check(saving)
            if agreement.to_stop(step - 1):
                if not bad.in_a_row:
                    save_checkpoint(engine, checkpoint, progress | {"back_to": bad.back_to}, sums, plan, saving)
                raise stop.Preempted(f"preempted at step {step - 1} of {phase}")
            taken = train_step(engine, prepared, clipping, watch)
            follow(engine.module.teacher, step, config)
            limit.fit_to_memory(step - done, prepared.largest())
            counts += prepared.counts
            if math.isfinite(taken.grad_norm):
                sums, grad_norm = add(sums, taken.metrics), taken.grad_norm
                bad.end_row()
            else:
                note_bad_step(bad, step, engine, taken, prepared, groups)
            progress = {"step": step, "bad_steps": bad.count, "grad_norm": grad_norm}
            save_early(run, folder, engine, policy, plan, step)
            profile_step()
            shown.advance()
            CLOCK.train(phase, step / last)
            if not sums or (step % config.logging_steps and step < last):
                continue
            row = {"phase": phase, **position(plan, step, len(groups)), **means(sums), **progress}
            row |= {"learning_rate": engine.get_lr()[0], **meters(engine.module.prepared.costs, counts, watch.read())}
            sums, counts = {}, Counter()
            run.metrics_log.write(row)
            shown.show(postfix(row))
            check_row(row, recent, config)
            recent = [*recent, row][-LAST_ROWS:]
            if falls_too_far(row, config):
                break
            if config.save_steps and step % config.save_steps == 0 and step < last and not bad.in_a_row:
                bad.back_to = step
                save_checkpoint(engine, checkpoint, progress | {"back_to": step}, sums, plan, saving)
                watch.lap("checkpoint")
    end_phase(bad, engine, groups, limit)
    return progress["step"]


def falls_too_far(row: Row, config: Config) -> bool:
    """Return, and say, whether the demonstrations' log-likelihood in a logged row ends the phase."""
    too_far = config.max_expert_drop is not None and expert_drop(row) > config.max_expert_drop
    if too_far:
        log(f"{row['phase']} ends at step {row['step']}: {expert_drop(row):.2f} nats are more than max_expert_drop")
    return too_far


def phase_of(run: Run, folder: Path) -> str:
    """Return the name of a phase: the path of its folder in the run."""
    return folder.relative_to(run.output).as_posix()


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


def postfix(row: dict[str, Any]) -> str:
    """Return the metrics that the progress shows."""
    shown = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies", "logp": "logps/chosen"}
    metrics = [f"{label} {row[name]:.3g}" for label, name in shown.items() if name in row]
    metrics += [f"{row['answer_tokens_per_second']:,.0f} answer tokens/s", f"memory {row['memory_gib']:.2f} GiB"]
    return "  ".join([*metrics, *([f"MFU {row['mfu']:.0%}"] if "mfu" in row else [])])
