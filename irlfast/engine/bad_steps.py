"""Bad steps: steps whose loss or gradient is not finite, which :func:`irlfast.engine.step.train_step` skips.

Here they are counted, and the rows behind them are named. After ``max_bad_steps`` in a row, the phase goes back to its
last checkpoint and continues with a tenth of the learning rate (``lower_rate.json``). After as many again, the run
stops. No checkpoint is written between bad steps, so that a phase goes back to a state before all of them. Nor does it
go back to a checkpoint that a preemption left: a run that is preempted ends like one that is not.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from irlfast.common import dist
from irlfast.common.artefacts import intact, keep_json, notes
from irlfast.common.files import InputError, read_json, remove
from irlfast.common.messages import log
from irlfast.data.packing import PromptGroup, pack
from irlfast.engine.checkpoint import remove_after
from irlfast.engine.memory import TokenLimit
from irlfast.engine.plan import Plan
from irlfast.engine.step import PreparedStep, TakenStep, prepare_step

LOWER_RATE = "lower_rate.json"
NAMED = 10  # lines of data/rows.jsonl that a message names


class WentBad(Exception):
    """Raised in every process after too many bad steps: ``fit`` continues from the checkpoint with a lower rate."""


@dataclasses.dataclass
class BadSteps:
    """The bad steps of a phase."""

    folder: Path
    phase: str
    plan: Plan
    most: int  # max_bad_steps
    count: int  # in the whole phase
    back_to: int  # the last step at which save_steps asked for a checkpoint
    in_a_row: list[int] = dataclasses.field(default_factory=list)  # the numbers of the last steps, while they are bad
    rows: list[int] = dataclasses.field(default_factory=list)  # of data/rows.jsonl, behind the steps in a row

    def end_row(self) -> None:
        """Note that a step was good."""
        self.in_a_row, self.rows = [], []


def note_bad_step(
    bad: BadSteps, step: int, engine: Any, taken: TakenStep, prepared: PreparedStep, groups: Sequence[PromptGroup]
) -> None:
    """Count a step that was skipped, and name its rows. After ``max_bad_steps`` in a row, go back or stop."""
    what, rows = rows_behind(engine, taken, prepared, groups)
    bad.count += 1
    bad.in_a_row.append(step)
    bad.rows = sorted({*bad.rows, *rows})
    log(f"warning: {bad.phase}, step {step} is skipped: its {what} is not finite; see {lines(rows)}")
    if len(bad.in_a_row) == bad.most:
        go_back_or_stop(bad)


def end_phase(bad: BadSteps, engine: Any, groups: Sequence[PromptGroup], limit: TokenLimit) -> None:
    """Say how many steps were skipped. Go back or stop, if the last ones were, and the model is why.

    The model is not why, if the loss of the last good step is still finite.
    """
    if bad.count:
        steps = f"{bad.count:,} of {len(bad.plan.steps):,} steps were skipped"
        log(f"warning: {bad.phase}: {steps}, because their loss or gradient was not finite")
    if not bad.in_a_row:
        return
    first = bad.in_a_row[0]
    layout = engine.module.prepared.layout
    if first == 1 or not is_sound(engine, prepare_step(bad.plan.steps[first - 2], groups, layout, limit.tokens)):
        go_back_or_stop(bad)


def rows_behind(
    engine: Any, taken: TakenStep, prepared: PreparedStep, groups: Sequence[PromptGroup]
) -> tuple[str, list[int]]:
    """Return ``loss`` and the rows of the prompt groups whose loss is not finite, or ``gradient`` and all rows.

    A micro-batch has one loss. So each group of a bad micro-batch runs once more alone, but not under ZeRO-3, where
    the processes cannot run a model apart.
    """
    losses = zip(prepared.numbers, taken.losses, strict=True)
    suspects = [i for numbers, loss in losses if not math.isfinite(loss) for i in numbers]
    if engine.zero_optimization_stage() < 3:
        suspects = [i for i in suspects if not has_finite_loss(engine, groups[i], prepared)] or suspects
    own = [i for numbers in prepared.numbers for i in numbers]
    each = dist.all_gather_object(([groups[i].row for i in suspects], [groups[i].row for i in own]))
    suspected, all_rows = ({row for part in parts for row in part if row >= 0} for parts in zip(*each, strict=True))
    return ("loss", sorted(suspected)) if suspected else ("gradient", sorted(all_rows))


@torch.no_grad()
def has_finite_loss(engine: Any, group: PromptGroup, prepared: PreparedStep) -> bool:
    batch = pack([group], engine.module.prepared.layout).to(dist.device())
    return math.isfinite(engine.module(batch, prepared.normalisers)[0])


@torch.no_grad()
def is_sound(engine: Any, prepared: PreparedStep) -> bool:
    """Return whether the loss of a step that was good is still finite, in every process."""
    loss, _ = engine(prepared.batches[0].to(dist.device()), prepared.normalisers)
    return not dist.all_reduce((~loss.isfinite()).float()).item()


def go_back_or_stop(bad: BadSteps) -> NoReturn:
    """Note the lower rate, and the step after which it holds, in the phase's folder.

    Raises:
        WentBad: always, in every process, if the rate was not lowered before.
        InputError: it was.
    """
    first, last = bad.in_a_row[0], bad.in_a_row[-1]
    which = f"step {first}" if first == last else f"steps {first} to {last}"
    steps = f"{bad.phase}, {which}: loss or gradient were not finite"
    if bad.plan.lower_after is not None:
        raise InputError(
            f"{steps}, also with a tenth of the learning rate; look at {lines(bad.rows)}, and try a lower "
            "learning_rate, or a higher max_bad_steps, with the same command"
        )
    step = bad.back_to
    log(f"warning: {steps}; the phase goes back to step {step}, and continues with a tenth of the learning rate")
    if dist.is_main():
        note = {"after_step": step, "bad_steps": bad.in_a_row, "rows": bad.rows}
        keep_json(bad.folder / LOWER_RATE, note | {"learning_rate": bad.plan.learning_rate})
        remove_after(bad.folder / "checkpoint", step)
    dist.barrier()
    raise WentBad


def lower_after(folder: Path, learning_rate: float) -> int | None:
    """Return the step after which a phase has a tenth of its ``learning_rate``, or None.

    A note about another rate is void: the user has given a lower one since. If ``lower_rate.json`` is lost, the
    checkpoints are deleted, and the phase comes to the same point once more.
    """
    path = folder / LOWER_RATE
    if intact(path):
        note = read_json(path)
        return note["after_step"] if note.get("learning_rate", learning_rate) == learning_rate else None
    if path.name in notes(folder):
        remove(folder / "checkpoint")
    return None


def lines(rows: Sequence[int]) -> str:
    """Name lines of data/rows.jsonl, which count from 1."""
    if not rows:
        return "data/rows.jsonl"
    named = ", ".join(f"{row + 1:,}" for row in rows[:NAMED])
    more = f" and {len(rows) - NAMED:,} more" if len(rows) > NAMED else ""
    return f"line{'s' * (len(rows) > 1)} {named}{more} of data/rows.jsonl"
