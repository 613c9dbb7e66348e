"""The questions of lm-eval's tasks: each model's values on them, and paired tests between two models."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from irlfast.evaluation.table import Numbers, compare, shares_among

Board = Mapping[str, Any]  # leaderboard/NAME.json of a model


def values_of(figures: Mapping[str, Any], answer: Mapping[str, Any], task: str) -> dict[str, list[float]]:
    """Return the value of every question for each figure of a task that is their mean, and of which more is better.

    Args:
        figures: what :func:`irlfast.evaluation.leaderboard.figures_of` returns for the task.
        answer: the worker's line on the task, with ``report`` and ``questions``.
    """
    values = {}
    for name, figure in figures.items():
        part, _, metric = name.rpartition(": ")
        part = part or task
        leaves = leaves_of(part, answer["report"])
        each = [value for leaf in leaves for value in answer["questions"].get(leaf, {}).get(metric, [])]
        more = [answer["report"]["higher_is_better"].get(leaf, {}).get(metric.partition(",")[0]) for leaf in leaves]
        numbers = [value for value in each if isinstance(value, bool | int | float)]
        if all(more) and len(numbers) == len(each) == figure["count"] and np.isclose(np.mean(numbers), figure["mean"]):
            values[name] = [float(value) for value in numbers]
    return values


def leaves_of(part: str, report: Mapping[str, Any]) -> list[str]:
    """Return the tasks of a group, or the task itself."""
    members = report["group_subtasks"].get(part)
    return [leaf for member in members for leaf in leaves_of(member, report)] if members else [part]


def differences_of(boards: Mapping[str, Board]) -> dict[str, dict[str, Any]]:
    """Compare every model with the first one on the same questions: name -> "task: metric" -> the difference.

    A difference is as in ``figures.json``: its mean, 95% interval, p-value by McNemar's or the permutation test, and
    the verdict after Holm's correction over the model's figures. A task counts if both models have it under the same
    conditions: version of lm-eval, shots, settings and data.
    """
    baseline, *others = boards
    result = {}
    for name in others:
        own, base = figures_on_same(boards[name], boards[baseline]), figures_on_same(boards[baseline], boards[name])
        result[name] = compare(own, base, shares_among([own, base]))
    return result


def figures_on_same(board: Board, other: Board) -> Numbers:
    """Return a board's values ``[questions]`` on the tasks that the other board has under the same conditions."""
    figures = {
        f"{task}: {metric}": np.array(values)
        for task, measured in board["tasks"].items()
        if conditions_of(board, task) == conditions_of(other, task)
        for metric, values in measured.get("questions", {}).items()
    }
    return Numbers(figures, {}, np.array([]), np.array([]))


def conditions_of(board: Board, task: str) -> dict[str, Any] | None:
    """Return the conditions of a task apart from the model, or None if the board lacks the task."""
    measured = board["tasks"].get(task)
    return measured and {name: value for name, value in measured["conditions"].items() if name != "model"}
