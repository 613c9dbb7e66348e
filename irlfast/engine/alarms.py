"""Alarms: signs in the logged values that training goes wrong, or teaches nothing."""

from collections.abc import Sequence
from typing import Any

from irlfast.common.files import InputError
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.engine.plan import Plan

Row = dict[str, Any]  # a row of metrics.jsonl

WATCHED = ("loss", "grad_norm", "rewards/margins", "logps/chosen")
LAST_ROWS = 20  # a value is compared with those of this many rows before it,
FEWEST_ROWS = 8  # if there are at least so many
SPIKE = 10.0  # standard deviations from their median, as their median absolute deviation estimates it,
LEAST_DEVIATION = 0.01  # which is taken to be at least this share of the median, or this number
HIGH_RATE = 0.1  # weights of language models are about 0.02
LOW_RATE = 1e-9  # of all steps together: float32 rounds a weight of 0.02 by as much
NOTABLE_DROP = 0.5  # nats per demonstration; the warning comes before the policy collapses
DROP_WARNING = (
    "the demonstrations' log-likelihood is {:.2f} nats below the reference's; "
    "lower learning_rate, raise beta, or set nll_weight (0.2, say)"
)


def log_doubts(phase: str, plan: Plan, groups: Sequence[PromptGroup]) -> None:
    """Warn, at the start of a phase, if nothing can be learned in it."""
    rate, steps = plan.learning_rate, len(plan.steps)
    if rate >= HIGH_RATE:
        log(f"warning: {phase}: with a learning rate of {rate:g}, each step moves every weight by about {rate:g}")
    if rate * steps <= LOW_RATE:
        log(f"warning: {phase}: {steps:,} steps with a learning rate of {rate:g} move no weight by a notable amount")
    if groups[0].advantages and not any(each.any() for group in groups for each in group.advantages):
        log(f"warning: {phase}: all advantages are 0, because each prompt's answers have the same reward")


def check_row(row: Row, before: list[Row], config: Config) -> None:
    """Warn of a newly logged row, in view of the phase's rows ``before`` it. What the last of these had is not new.

    Raises:
        InputError: there is a spike, and ``on_spike`` is ``stop``.
    """
    where = f"{row['phase']}, step {row['step']}"
    if expert_drop(row) > NOTABLE_DROP and not any(expert_drop(last) > NOTABLE_DROP for last in before[-1:]):
        log(f"warning: {where}: {DROP_WARNING.format(expert_drop(row))}")
    if config.on_spike == "ignore":
        return
    for name, usual in spikes(row, before).items():
        if any(name in spikes(last, before[:-1]) for last in before[-1:]):
            continue
        sentence = f"{where}: {name} is {row[name]:.4g}, and was about {usual:.4g} before"
        if config.on_spike == "stop":
            raise InputError(f"{sentence}; see metrics.jsonl, and try a lower learning_rate, or on_spike: warn")
        log(f"warning: {sentence}")


def spikes(row: Row, before: Sequence[Row]) -> dict[str, float]:
    """Return the watched values of a row that are far from those before, with the median of those."""
    if len(before) < FEWEST_ROWS:
        return {}  # before SciPy is imported
    import numpy as np
    from scipy.stats import median_abs_deviation

    far = {}
    for name in WATCHED:
        values = [each[name] for each in before if name in each]
        if name not in row or len(values) < FEWEST_ROWS:
            continue
        median = float(np.median(values))
        deviation = max(median_abs_deviation(values, scale="normal"), LEAST_DEVIATION * max(1.0, abs(median)))
        if abs(row[name] - median) > SPIKE * deviation:
            far[name] = median
    return far


def expert_drop(row: Row) -> float:
    """Return by how many nats per demonstration the policy is below the reference; 0 without a reference."""
    return row["logps/reference"] - row["logps/chosen"] if "logps/reference" in row else 0.0


def log_lessons(phase: str, rows: Sequence[Row]) -> None:
    """Warn, at the end of a phase, if the rows that it logged show that nothing was learned."""
    if rows and not any(row["grad_norm"] for row in rows):
        log(f"warning: {phase}: nothing was learned, because the gradient was 0 at all {len(rows):,} logged steps")
    elif len(rows) > 1 and all(abs(row["loss"] - rows[0]["loss"]) <= 1e-7 * abs(rows[0]["loss"]) for row in rows):
        log(f"warning: {phase}: the loss did not move: it was {rows[0]['loss']:.4g} at all {len(rows):,} logged steps")
