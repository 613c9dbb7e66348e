"""The verdict of a page: is one policy better than another on held-out prompts, and do the statistics support it?"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from irlfast.evaluation.figures import figure_of
from irlfast.evaluation.table import Numbers, compare, means, read_numbers, shares_among
from irlfast.reports.files import RunFiles, column, number
from irlfast.reports.metrics import TRAINING_KEYS
from irlfast.reports.render import show, with_ends

JUDGED = ("exact_match", "nll", "reward_accuracy", "preference_accuracy")  # figures that the verdict is about
BY_DEFINITION = {"reward_accuracy": 0.5, "preference_accuracy": 0.5}  # of a policy that is its own reference: a coin's

CHANGED_ROWS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # InputError, or hostile values


class Change(NamedTuple):
    """A figure of two policies, as texts. ``sign`` is 1 for better, -1 for worse, 0 where no difference is shown."""

    name: str
    before: str
    after: str
    sign: int
    words: str


def compare_policies(run: RunFiles) -> list[Change]:
    """Compare the first policy of a run with the kept one on the same held-out prompts."""
    if not run.evals or run.first == run.kept:
        return []
    try:
        first, kept = (judged_numbers(run.folder / phase) for phase in (run.first, run.kept))
        changes = changes_of(first, kept)
    except CHANGED_ROWS as error:
        run.notes.append(f"The policies are not compared: {error}.")
        changes = []
    return [*broken(run), *changes]


def judged_numbers(folder: Path, names: Sequence[str] = JUDGED) -> Numbers:
    """Read the named figures of a policy's answers; a figure with an infinite value is left out.

    Raises:
        InputError: there are no answers, or their rows have no figures.
    """
    numbers = read_numbers(folder, "answers.jsonl")
    judged = {name: numbers.figures[name] for name in names if name in numbers.figures}
    return numbers._replace(figures={name: values for name, values in judged.items() if not np.isinf(values).any()})


def changes_of(first: Numbers, kept: Numbers) -> list[Change]:
    """Return the change of each figure that both policies have. Holm's correction is over these figures.

    Raises:
        ValueError: the policies have answers to different numbers of prompts.
    """
    given = {
        name: np.where(np.isnan(kept.figures[name]), np.nan, value)
        for name, value in BY_DEFINITION.items()
        if name in kept.figures and name not in first.figures
    }
    first = first._replace(figures=first.figures | given)
    shares = shares_among([first, kept])
    before, after = means(first, shares), means(kept, shares)
    changes = []
    for name, difference in compare(kept, first, shares).items():
        form, scale = (".1%", 100) if name in shares else (",.2f", 1)
        start = show(before[name]["mean"], form) if name in given else with_ends(before[name], form)
        words = f"{with_ends(difference, '+,.2f', scale)} {'points' if scale == 100 else figure_of(name).unit}, "
        words += f"p = {difference['p_holm']:.2g} on {difference['count']:,} prompts: {difference['verdict']}"
        sign = {True: 1, False: -1, None: 0}[difference["better"]]
        changes.append(Change(figure_of(name).title, start, with_ends(after[name], form), sign, words))
    return changes


def broken(run: RunFiles) -> list[Change]:
    """Return the judged figures that the first policy has, and that are no longer finite for the kept one."""
    changes = []
    for name in JUDGED:
        before, after = (number(run.evals[phase].get(name)) for phase in (run.first, run.kept))
        if math.isfinite(before) and math.isinf(after):
            changes.append(Change(figure_of(name).title, show(before), "not finite", -1, "no longer a finite number"))
    return changes


def headline(changes: list[Change], first: str, kept: str) -> tuple[str, str]:
    """Return a verdict in one to three words, and a sentence that gives its reason."""
    if first and first == kept:
        return "No change", f"The final policy is the first one ({first}): no later one was evaluated and kept."
    if not changes:
        return "Not known yet", "No two policies of this run have been compared."
    names = {sign: " and ".join(change.name for change in changes if change.sign == sign) for sign in (1, -1, 0)}
    verdict = "No difference shown"
    if names[1] or names[-1]:
        verdict = "Worse" if not names[1] else "Mixed" if names[-1] else "Improved"
    phrases = {1: "better on", -1: "worse on", 0: "not shown to differ on"}
    parts = "; ".join(f"{phrase} {names[sign]}" for sign, phrase in phrases.items() if names[sign])
    return verdict, f"Against {first}, {kept} is {parts} (95% level, Holm's correction)."


def list_warnings(changes: list[Change], metrics: dict[str, np.ndarray]) -> list[str]:
    """Warn of demonstrations that became less likely, and of logged values that are not finite."""
    warnings = [
        f"The log-likelihood of the demonstrations fell: nll {change.before} → {change.after}. "
        "The policy has moved away from the answers it was given to learn."
        for change in changes
        if change.name == figure_of("nll").title and change.sign == -1
    ]
    for key in TRAINING_KEYS:
        count = sum(int(np.isinf(column(rows, key)).sum()) for rows in metrics.values())
        if count:
            warnings.append(f"{key}: {count:,} logged value{'s are' if count > 1 else ' is'} not finite.")
    return warnings
