"""The early policy of a stage, which answers the prompts of the next stage while this one trains on.

With ``async_sampling``, the policy is saved as ``early`` in the stage's folder after the step ``plan.early``. This step
follows from the plan, never from the clock, so that a run which was killed draws the same answers. A phase that goes
back to a step before it after bad steps keeps the early policy that it has.
"""

from pathlib import Path
from typing import Any

from irlfast.common import dist
from irlfast.common.artefacts import intact, keep_json
from irlfast.common.files import read_json
from irlfast.common.movement import at_length
from irlfast.engine.checkpoint import remove_after, save_model
from irlfast.engine.plan import Plan
from irlfast.runs.run import Run

EARLY = "early"
STALENESS = "staleness.json"


def begin_early(run: Run, folder: Path, plan: Plan) -> None:
    """Before a phase is resumed: have an early policy that is there answer, or see to it that the steps make it."""
    if plan.early is None or plan.stage is None:
        return
    if dist.on_main(intact, folder / EARLY):
        run.ask_early(plan.stage, folder / EARLY)
    elif dist.is_main():
        remove_after(folder / "checkpoint", plan.early - 1)
    dist.barrier()


def save_early(run: Run, folder: Path, engine: Any, start: Path | str, plan: Plan, step: int) -> None:
    """After the step ``plan.early``, save the early policy, unless it is there, and have it answer.

    The phase started from the model ``start``.
    """
    if step != plan.early or plan.stage is None or dist.on_main(intact, folder / EARLY):
        return
    with at_length(f"{folder.name}, writing the early policy"):
        save_model(engine, start, folder / EARLY, run.encoder, None, run.config)
        dist.barrier()
        run.ask_early(plan.stage, folder / EARLY)
        dist.barrier()  # the main process may load the policy for long, to compare the servers with it


def note_staleness(folder: Path, plan: Plan, last: int) -> list[str]:
    """Write ``staleness.json`` at the end of a phase after ``last`` steps; return the names of what the phase leaves.

    A phase that ended before ``plan.early`` has no early policy: its own policy answers the next stage's prompts.
    """
    if plan.early is None or not dist.on_main(intact, folder / EARLY):
        return []
    if dist.is_main():
        steps = {"sampled_after_step": plan.early, "steps": last, "staleness": max(0, last - plan.early)}
        keep_json(folder / STALENESS, steps)
    return [EARLY, STALENESS]


def has_early(folder: Path) -> bool:
    """Return whether a finished phase left an early policy."""
    return dist.on_main(lambda: (folder / "DONE").exists() and EARLY in read_json(folder / "DONE"))


def staleness_of(policy: Path | str) -> int:
    """Return the optimiser steps that a finished stage took after it saved ``policy``; 0 where it is not early."""
    if not isinstance(policy, Path) or policy.name != EARLY:
        return 0
    return read_json(policy.parent / STALENESS)["staleness"]
