"""Curves of an evaluation: pass@k, best of n, perplexity by position, and calibration of the implicit reward."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from irlfast.evaluation.figures import REWARDS, SAMPLED, figure_of
from irlfast.evaluation.statistics import mean_interval, share_interval

Point = dict[str, Any]

# ---------------------------------------------------------------- several samples of a prompt


def pass_curves(samples: dict[str, np.ndarray], shares: set[str]) -> dict[str, list[Point]]:
    """Return pass@k for k = 1, 2, 4, … n, for each figure of samples ``[P, n]`` that is a share.

    It is the chance that one of k samples is right, without bias (arXiv 2107.03374, eq. 1): the best of k by the very
    figure that is measured.
    """
    curves = {}
    for name, values in samples.items():
        known = values[~np.isnan(values).any(1)]
        if SAMPLED + name in shares and name != "ended" and len(known):
            curves[name] = [
                {"n": n, **share_interval(each)._asdict(), "count": len(each)} for n, each in best_of_each(known, known)
            ]
    return curves


def best_of_curves(samples: dict[str, np.ndarray]) -> dict[str, list[Point]]:
    """Return what the best of n = 1, 2, 4, … samples by each reward has, of every figure of which more is better.

    Prompts whose samples do not all have all of these figures are left out.
    """
    higher = [name for name in samples if figure_of(name).better == "higher" and name != "ended"]
    curves = {}
    for reward in samples:
        if reward.partition("/")[0] not in REWARDS:
            continue
        complete = ~np.isnan(np.stack([samples[name] for name in higher])).any((0, 2))
        points: dict[int, Point] = {}
        for name in higher if complete.any() else []:
            for n, values in best_of_each(samples[reward][complete], samples[name][complete]):
                point = points.setdefault(n, {"n": n, "kl_bound": kl_bound(n), "count": int(complete.sum())})
                point[name] = mean_interval(values)._asdict()
        curves[reward] = [*points.values()]
    return curves


def kl_bound(n: int) -> float:
    """Return a bound of the KL from a model to the best of n of its samples, in nats (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def best_of_each(rewards: np.ndarray, values: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Return, for n = 1, 2, 4, … N, the expected ``value [P]`` of the answer with the highest reward among n.

    ``rewards`` and ``values`` are those of all N answers, ``[P, N]``. The expectation is over all choices of n of the
    N answers, so that it is exact without more sampling. Of equal rewards the later answer counts as higher.
    """
    count = rewards.shape[1]
    ranked = np.take_along_axis(values, rewards.argsort(1, kind="stable"), 1)
    return [(n, ranked @ best_shares(n, count)) for n in sizes_up_to(count)]


def sizes_up_to(count: int) -> list[int]:
    """Return 1, 2, 4, … and ``count`` itself."""
    return sorted({*(2**k for k in range(count.bit_length()) if 2**k <= count), count})


def best_shares(n: int, count: int) -> np.ndarray:
    """Return, for each answer by rising reward, the share of all choices of n of ``count`` answers that it is best of.

    The i-th lowest answer is the best of n where the other n − 1 are among the i lower answers.
    """
    return np.array([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)])


# ---------------------------------------------------------------- likelihood and implicit rewards

POSITIONS = 16  # groups of positions: 1, 2, 3 to 4, 5 to 8, …; the last one has all from 16,385 on
FIRST = [0, *(2**k for k in range(POSITIONS - 1))]  # the first position of each group, counted from 0
CONFIDENCES = np.linspace(0.5, 1.0, 6)  # the ends of the groups of confidence


def by_position(logps: Sequence[float]) -> np.ndarray:
    """Return, for each group of positions, the sum of a demonstration's log-probabilities and their number ``[2, 16]``.

    The array is flat: the sums, then the numbers.
    """
    group = np.ceil(np.log2(np.arange(1, len(logps) + 1))).astype(int).clip(max=POSITIONS - 1)
    return np.concatenate([np.bincount(group, logps, POSITIONS), np.bincount(group, minlength=POSITIONS)])


def perplexity_by_position(positions: np.ndarray) -> list[Point]:
    """Return the perplexity of the demonstrations' tokens by their position.

    ``positions [P, 2, 16]`` has the sums and numbers of :func:`by_position`.
    """
    points = []
    for group, first in enumerate(FIRST):
        totals, tokens = positions[:, 0, group], positions[:, 1, group]
        has = tokens > 0
        if has.any():
            mean, low, high = mean_interval(-totals[has] / tokens[has], tokens[has])
            point = {"from": first + 1, "to": 2**group if group < POSITIONS - 1 else None, "count": int(has.sum())}
            ends = {"low": None if low is None else math.exp(low), "high": None if high is None else math.exp(high)}
            points.append(point | {"mean": math.exp(mean)} | ends)
    return points


def calibration(margins: np.ndarray, beta: float) -> list[Point]:
    """Return how often the implicit reward is right about preference pairs, by how sure it is.

    By Bradley and Terry the reward says σ(β·margin) that the chosen answer is better, so that its confidence is
    σ(β·|margin|). ``margins [P]`` are log-ratios of the chosen less those of the rejected answers, in nats; NaN where
    there is no pair.
    """
    margins = margins[~np.isnan(margins)]
    confidences = expit(beta * np.abs(margins))
    groups = np.digitize(confidences, CONFIDENCES[1:-1])
    points = []
    for group, (low, high) in enumerate(itertools.pairwise(CONFIDENCES)):
        own = groups == group
        if own.any():
            right = share_interval((margins[own] > 0).astype(float))
            point = {"from": float(low), "to": float(high), "confidence": float(confidences[own].mean())}
            points.append(point | {**right._asdict(), "count": int(own.sum())})
    return points


def calibration_error(points: Sequence[Point]) -> float | None:
    """Return the expected calibration error: the mean distance of confidence and share, over pairs (arXiv 1706.04599).

    ``points`` are those of :func:`calibration`. None without a pair.
    """
    count = sum(point["count"] for point in points)
    distances = [point["count"] * abs(point["confidence"] - point["mean"]) for point in points]
    return sum(distances) / count if count else None
