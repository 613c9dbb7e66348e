"""The figures of a policy: one value per held-out row, higher is better."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.protocol.generate import Row, is_right_sum, modes_of
from benchmarks.rewards import distance
from irlfast.data.packing import PromptGroup
from irlfast.evaluation.measure import text
from irlfast.runs.run import Run
from irlfast.sampling.generation import sample, sample_groups
from irlfast.sampling.scoring import score
from irlfast.sampling.shards import DRAWN, GREEDY

Figures = dict[str, list[float]]  # figure -> value per row
MODE_SAMPLES = 8


def words(run: Run, policy: Path, rows: Sequence[Row], folder: Path, best_of: int) -> Figures:
    answers = answer(run, policy, folder, best_of)
    both = [(row["completion"].split(), each.split()) for row, each in zip(rows, answers, strict=True)]
    return {
        "exact": [float(expert == own) for expert, own in both],
        "phonemes": [1 - distance(expert, own) / len(expert) for expert, own in both],
        "likelihood": likelihood(run, policy, folder),
    }


def sums(run: Run, policy: Path, rows: Sequence[Row], folder: Path, best_of: int) -> Figures:
    answers = answer(run, policy, folder, best_of)
    return {
        "exact": [float(is_right_sum(row["prompt"], each)) for row, each in zip(rows, answers, strict=True)],
        "likelihood": likelihood(run, policy, folder),
    }


def modes(run: Run, policy: Path, rows: Sequence[Row], folder: Path, best_of: int) -> Figures:
    groups = sample_groups(run, policy, run.held_out, MODE_SAMPLES, folder / "drawn", DRAWN)
    valid, covered = [], []
    for row, group in zip(rows, groups, strict=True):
        answers, right = [text(run, ids) for ids in group.answers], modes_of(row["prompt"])
        valid.append(sum(each in right for each in answers) / MODE_SAMPLES)
        covered.append(len(set(right) & set(answers)) / len(right))
    return {"valid": valid, "covered": covered, "likelihood": likelihood(run, policy, folder)}


def gap(run: Run, policy: Path, rows: Sequence[Row], folder: Path, best_of: int) -> Figures:
    """Return log π(chosen) − log π(rejected), whether it is positive, and log π(chosen)."""
    pairs = [PromptGroup(x.prompt_ids, (x.answer_ids, x.rejected_ids)) for x in run.held_out if x.rejected_ids]
    chosen, rejected = np.array(
        [[logps.double().sum().item() for logps in both] for both in score(run, policy, pairs, folder / "scores")]
    ).T
    differences = (chosen - rejected).tolist()
    return {"gap": differences, "preferred": [float(x > 0) for x in differences], "likelihood": chosen.tolist()}


def solutions(run: Run, policy: Path, rows: Sequence[Row], folder: Path, best_of: int) -> Figures:
    return {"likelihood": likelihood(run, policy, folder)}


def answer(run: Run, policy: Path, folder: Path, best_of: int) -> list[str]:
    """Return the policy's greedy answer to each held-out prompt, or the likeliest of ``best_of`` samples."""
    if not best_of:
        return [text(run, ids) for ids in sample(run, policy, run.held_out, folder / "greedy", GREEDY)]
    groups = sample_groups(run, policy, run.held_out, best_of, folder / "drawn", DRAWN)
    scores = score(run, policy, groups, folder / "drawn.safetensors")
    best = [max(range(best_of), key=lambda k, own=own: own[k].sum().item()) for own in scores]
    return [text(run, group.answers[k]) for group, k in zip(groups, best, strict=True)]


def likelihood(run: Run, policy: Path, folder: Path) -> list[float]:
    """Return the log-probability in nats of each held-out demonstration."""
    groups = [PromptGroup(x.prompt_ids, (x.answer_ids,)) for x in run.held_out]
    return [own[0].double().sum().item() for own in score(run, policy, groups, folder / "likelihood.safetensors")]


class Judge(NamedTuple):
    figures: Callable[[Run, Path, Sequence[Row], Path, int], Figures]
    main: str  # the figure that is compared
    chooses: str  # the figure by which rates are chosen on the validation rows
    shown: dict[str, str]  # figure -> column of the table


JUDGES = {
    "words": Judge(
        words,
        *("phonemes", "phonemes"),
        {"phonemes": "phoneme accuracy", "exact": "exact match", "likelihood": "log-likelihood (nats)"},
    ),
    "sums": Judge(sums, "exact", "exact", {"exact": "right result", "likelihood": "log-likelihood (nats)"}),
    "modes": Judge(
        modes,
        *("valid", "valid"),
        {"valid": "valid samples", "covered": "modes covered", "likelihood": "log-likelihood (nats)"},
    ),
    "gap": Judge(
        gap, "gap", "gap", {"gap": "gap (nats)", "preferred": "gap above 0", "likelihood": "log π(chosen) (nats)"}
    ),
    "text": Judge(solutions, "likelihood", "likelihood", {"likelihood": "log-likelihood (nats)"}),
}


def means(figures: Figures) -> dict[str, float]:
    return {name: math.fsum(values) / len(values) for name, values in figures.items()}
