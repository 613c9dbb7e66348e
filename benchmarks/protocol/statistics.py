"""Paired comparisons over seeds and prompts: an interval of the mean difference, and Holm's correction."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95


class Gain(NamedTuple):
    mean: float
    low: float | None  # of the 95% interval; None with one seed
    high: float | None
    p: float | None  # two-sided, of the hypothesis that the gain is 0


def paired_gain(differences: np.ndarray) -> Gain:
    """Return the mean of ``differences [seeds, prompts]`` with its interval over both new seeds and new prompts.

    Seeds and prompts are crossed random effects: the same prompts are answered under every seed. With the mean squares
    of the two-way analysis of variance, the variance of the mean is (MS_seed + max(MS_prompt − MS_rest, 0)) / (S·P).
    Student's t has the degrees of freedom of Hillis (2007, Statistics in Medicine 26:596), who analyses many readers
    and many cases: a seed is a reader, a prompt a case.
    """
    seeds, prompts = differences.shape
    mean = float(differences.mean())
    if seeds < 2 or prompts < 2:
        return Gain(mean, None, None, None)
    by_seed, by_prompt = differences.mean(1), differences.mean(0)
    rest = differences - by_seed[:, None] - by_prompt[None, :] + mean
    of_seed = prompts * by_seed.var(ddof=1)
    of_prompt = seeds * by_prompt.var(ddof=1)
    of_rest = (rest**2).sum() / ((seeds - 1) * (prompts - 1))
    both = of_seed + max(of_prompt - of_rest, 0.0)
    if of_seed == 0:  # every seed has the same mean, as two policies with equal answers have
        return Gain(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    error = math.sqrt(both / (seeds * prompts))
    freedom = (seeds - 1) * (both / of_seed) ** 2
    half = float(student.ppf((1 + LEVEL) / 2, freedom)) * error
    p = 2 * float(student.sf(abs(mean) / error, freedom))
    return Gain(mean, mean - half, mean + half, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values (1979, Scandinavian Journal of Statistics 6:65), in the given order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
