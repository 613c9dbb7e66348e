"""Statistics of figures: 95% intervals, paired tests between two models, and the prompts that a difference needs.

A figure has one value per prompt. Where a prompt has several samples, that value is their mean: samples of one prompt
are alike, so prompts are what is drawn at random (cluster by prompt). docs/evaluation.md says which interval and
which test each kind of figure has, and how often the intervals contain the true value in simulations.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import normal_sample_size_one_tail
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

LEVEL = 0.95
POWER = 0.8  # the chance that a test shows a difference which exists
RESAMPLES = 4999  # of the bootstrap and of the permutation test
SEED = 0
BCA_PROMPTS = 5000  # at most: BCa leaves out each prompt once, which costs the square of their number
ROUNDING = 1e-12  # values closer than that, relative to the largest one, are equal
ELEMENTS = 2**19  # of resampled values in memory at a time


class Interval(NamedTuple):
    mean: float
    low: float | None  # None where there are fewer than three prompts
    high: float | None


# ---------------------------------------------------------------- intervals


def mean_interval(values: np.ndarray, weights: np.ndarray | None = None) -> Interval:
    """Return the mean of ``values [P]`` with a bootstrap interval over prompts.

    With ``weights [P]``, the mean is Σ weight·value / Σ weight: the mean per token where a weight counts tokens.

    The bootstrap is BCa; the percentile bootstrap above 5,000 prompts, where skewness no longer matters. A bootstrap of
    few values is too narrow, by Student's t and by n − 1 in the variance; its level is raised as Hesterberg does
    (2015, The American Statistician 69:371, "expanded percentile").
    """
    count = len(values)
    mean = float(np.average(values, weights=weights))
    if count < 3:
        return Interval(mean, None, None)
    if np.ptp(values) <= ROUNDING * max(1.0, np.abs(values).max()):  # every resample has this mean
        return Interval(mean, mean, mean)
    tail = stats.norm.sf(stats.t.isf((1 - LEVEL) / 2, count - 1) * math.sqrt(count / (count - 1)))
    result = stats.bootstrap(
        (values,) if weights is None else (values * weights, weights),
        np.mean if weights is None else ratio,
        paired=weights is not None,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, ELEMENTS // count),
        confidence_level=1 - 2 * tail,
        method="BCa" if count <= BCA_PROMPTS else "percentile",
        rng=np.random.default_rng(SEED),
    )
    return Interval(mean, *map(float, result.confidence_interval))


def ratio(totals: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    return totals.sum(axis) / weights.sum(axis)


def share_interval(values: np.ndarray) -> Interval:
    """Return the mean of shares ``values [P]``, each from 0 to 1, with Wilson's interval.

    A prompt with one yes or no counts as one. Where a value is the share of several samples, the count is the effective
    number of independent samples, p(1 − p) over the variance of the mean (Franco et al. 2019, Journal of Survey
    Statistics and Methodology 7:334). Prompts without any variance count as one each.
    """
    mean, variance = float(values.mean()), float(values.var())
    count = len(values) * (mean * (1 - mean) / variance if variance > 0 else 1)
    low, high = proportion_confint(mean * count, count, alpha=1 - LEVEL, method="wilson")
    return Interval(mean, float(low), float(high))


def share_difference_interval(differences: np.ndarray) -> Interval:
    """Return the mean of paired differences of shares ``[P]`` with the interval of Bonett and Price.

    A prompt that gained 1 and a prompt that lost 1 are added to the sample (2012, Journal of Educational and Behavioral
    Statistics 37:479). So two models that answered all prompts alike are not said to be equal for sure.
    """
    low, high = DescrStatsW(with_two_more(differences)).zconfint_mean(alpha=1 - LEVEL)
    return Interval(float(differences.mean()), max(-1.0, float(low)), min(1.0, float(high)))


def with_two_more(differences: np.ndarray) -> np.ndarray:
    return np.append(differences, [1.0, -1.0])


# ---------------------------------------------------------------- tests


def permutation_p(differences: np.ndarray) -> np.ndarray:
    """Return the two-sided p-values ``[F]`` of paired differences ``[F, P]``, by swapping the models of random prompts.

    The test is exact where all 2^P swaps are fewer than ``RESAMPLES``.
    """
    if differences.shape[1] < 2:  # both swaps of a single prompt are as far from 0, and SciPy refuses them
        return np.ones(len(differences))
    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        axis=-1,
        n_resamples=RESAMPLES,
        batch=max(1, 4 * ELEMENTS // differences.size),
        rng=np.random.default_rng(SEED),
    )
    return np.asarray(result.pvalue)


def mcnemar_p(values: np.ndarray, baseline: np.ndarray) -> float:
    """Return the exact two-sided p-value that two models are right equally often, from 0/1 ``values [P]`` of both."""
    right, base_right = values > 0.5, baseline > 0.5
    table = [[np.sum(a & b) for b in (base_right, ~base_right)] for a in (right, ~right)]
    return float(mcnemar(table, exact=True).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values (1979, Scandinavian Journal of Statistics 6:65), in the given order."""
    return multipletests(p_values, method="holm")[1].tolist() if len(p_values) else []


def prompts_needed(deviation: float, difference: float) -> int:
    """Return how many prompts show a mean ``difference`` at the level of 5% in 80% of all evaluations.

    ``deviation`` is the standard deviation of the differences per prompt. The count is that of a single test: Holm's
    correction for several figures needs more prompts.
    """
    tail = (1 - LEVEL) / 2
    count = normal_sample_size_one_tail(difference, POWER, tail, std_null=deviation, std_alternative=deviation)
    return max(2, math.ceil(count))


# ---------------------------------------------------------------- several seeds


class Pooled(NamedTuple):
    mean: float
    low: float | None  # of the 95% interval; None with one seed
    high: float | None
    p: float | None  # two-sided, of the hypothesis that the mean is 0


def pooled(values: np.ndarray) -> Pooled:
    """Return the mean of ``values [seeds, prompts]`` with its interval over both new seeds and new prompts.

    The values are those of one model per seed, or its paired differences from a baseline.

    Seeds and prompts are crossed random effects: the same prompts are answered under every seed. With the mean squares
    of the two-way analysis of variance, the variance of the mean is (MS_seed + max(MS_prompt − MS_rest, 0)) / (S·P).
    Student's t has the degrees of freedom of Hillis (2007, Statistics in Medicine 26:596), who analyses many readers
    and many cases: a seed is a reader, a prompt a case.
    """
    seeds, prompts = values.shape
    mean = float(values.mean())
    if seeds < 2 or prompts < 2:
        return Pooled(mean, None, None, None)
    by_seed, by_prompt = values.mean(1), values.mean(0)
    rest = values - by_seed[:, None] - by_prompt[None, :] + mean
    of_seed = prompts * by_seed.var(ddof=1)
    of_prompt = seeds * by_prompt.var(ddof=1)
    of_rest = (rest**2).sum() / ((seeds - 1) * (prompts - 1))
    if of_seed > 0:
        both = of_seed + max(of_prompt - of_rest, 0.0)
        freedom = (seeds - 1) * (both / of_seed) ** 2
    else:  # every seed has the same mean, so that only prompts differ
        both, freedom = max(of_prompt, of_rest), prompts - 1
    if both == 0:  # all values are equal, as those of two policies with equal answers
        return Pooled(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    error = math.sqrt(both / (seeds * prompts))
    half = float(stats.t.isf((1 - LEVEL) / 2, freedom)) * error
    return Pooled(mean, mean - half, mean + half, 2 * float(stats.t.sf(abs(mean) / error, freedom)))
