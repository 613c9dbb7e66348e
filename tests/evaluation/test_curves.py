"""pass@k, best of n, perplexity by position and calibration agree with their definitions, computed by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.evaluation.curves import (
    POSITIONS,
    best_of_curves,
    best_of_each,
    by_position,
    calibration,
    calibration_error,
    pass_curves,
    perplexity_by_position,
)
from irlfast.evaluation.statistics import share_interval


@pytest.fixture
def generator():
    return np.random.default_rng(0)


@pytest.mark.parametrize("samples", [1, 4, 5, 10])
def test_pass_at_k_is_the_unbiased_estimator_of_chen(generator, samples):
    """1 − C(n − c, k) / C(n, k) for c right of n samples (arXiv 2107.03374, eq. 1)."""
    right = generator.binomial(1, 0.3, (40, samples)).astype(float)
    curve = pass_curves({"exact_match": right}, {"sampled_exact_match"})["exact_match"]
    assert [point["n"] for point in curve] == sorted({*(2**i for i in range(5) if 2**i <= samples), samples})
    for point in curve:
        k = point["n"]
        of_eq_1 = [1 - math.comb(samples - int(c), k) / math.comb(samples, k) for c in right.sum(1)]
        assert point["mean"] == pytest.approx(np.mean(of_eq_1))
        expected = share_interval(np.array(of_eq_1))
        assert (point["low"], point["high"]) == pytest.approx((expected.low, expected.high))


def test_pass_at_k_has_no_bias(generator):
    """Its mean over many draws of 6 samples is the chance that one of k independent samples is right."""
    right = generator.binomial(1, 0.2, (20000, 6)).astype(float)
    for k, values in best_of_each(right, right):
        assert values.mean() == pytest.approx(1 - 0.8**k, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6, unique=True), st.randoms())
def test_the_best_of_n_is_the_mean_over_all_choices_of_n(rewards, source):
    values = np.array([source.random() for _ in rewards])
    for n, best in best_of_each(np.array([rewards]), values[None]):
        choices = itertools.combinations(range(len(rewards)), n)
        expected = np.mean([values[max(choice, key=lambda i: rewards[i])] for choice in choices])
        assert best[0] == pytest.approx(expected)


def test_the_curve_of_a_reward_has_every_figure_of_which_more_is_better(generator):
    reward = generator.normal(size=(30, 4))
    right = (reward > 0).astype(float)
    samples = {"reward/some/model": reward, "exact_match": right, "length": right, "ended": right}
    [(name, curve)] = best_of_curves(samples).items()
    assert name == "reward/some/model" and [point["n"] for point in curve] == [1, 2, 4]
    for point in curve:
        assert set(point) == {"n", "kl_bound", "count", "reward/some/model", "exact_match"}
        assert point["kl_bound"] == pytest.approx(math.log(point["n"]) - (point["n"] - 1) / point["n"])
    assert curve[-1]["exact_match"]["mean"] == pytest.approx(right.max(1).mean())
    assert curve[0]["reward/some/model"]["mean"] == pytest.approx(reward.mean())


def test_prompts_without_a_reward_for_every_sample_are_left_out_of_the_curve(generator):
    reward = generator.normal(size=(30, 2))
    reward[:10, 1] = np.nan
    [curve] = best_of_curves({"reward": reward}).values()
    assert [point["count"] for point in curve] == [20, 20]
    assert best_of_curves({"reward": np.full((3, 2), np.nan)}) == {"reward": []}


def test_there_are_no_curves_without_samples():
    assert pass_curves({}, set()) == {} and best_of_curves({}) == {}


def test_perplexity_by_position_is_that_of_all_tokens_at_these_positions(generator):
    logps = [-generator.gamma(1, size=size) for size in generator.integers(0, 40, 50)]
    curve = perplexity_by_position(np.array([by_position(own) for own in logps]).reshape(-1, 2, POSITIONS))
    assert [(point["from"], point["to"]) for point in curve] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 8),
        (9, 16),
        (17, 32),
        (33, 64),
    ]
    for point in curve:
        tokens = np.concatenate([own[point["from"] - 1 : point["to"]] for own in logps])
        assert point["mean"] == pytest.approx(math.exp(-tokens.mean()))
        assert point["low"] <= point["mean"] <= point["high"]
        assert point["count"] == sum(len(own) >= point["from"] for own in logps)


def test_the_last_group_of_positions_has_all_that_are_later():
    positions = by_position(np.full(40_000, -1.0)).reshape(2, POSITIONS)
    assert positions[1].sum() == 40_000 and positions[1, -1] == 40_000 - 2**14
    curve = perplexity_by_position(positions[None])
    assert curve[-1]["to"] is None and curve[-1]["from"] == 2**14 + 1


def test_a_reward_that_means_what_it_says_is_calibrated(generator):
    """Pairs are drawn with the probability that the reward names, so that accuracy and confidence agree."""
    beta, size = 0.1, generator.normal(0, 20, 20_000)
    signs = np.where(generator.random(20_000) < 1 / (1 + np.exp(-beta * np.abs(size))), 1, -1)
    points = calibration(np.abs(size) * signs, beta)
    assert [round(point["from"], 1) for point in points] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert sum(point["count"] for point in points) == 20_000
    assert calibration_error(points) < 0.01
    assert calibration_error(calibration(np.abs(size) * signs, 10 * beta)) > 0.1  # a reward that is too sure
    for point in points:
        assert point["mean"] == pytest.approx(point["confidence"], abs=0.03)
        assert point["from"] <= point["confidence"] <= point["to"]


def test_the_calibration_error_is_the_distance_of_confidence_and_share_over_pairs():
    """Three pairs of the margins 2, −1 and 4 lie in three groups: their confidences are σ of 2, 1 and 4."""
    confidences = [1 / (1 + math.exp(-margin)) for margin in (2, 1, 4)]
    distances = [1 - confidences[0], confidences[1], 1 - confidences[2]]
    points = calibration(np.array([2.0, -1.0, 4.0]), 1.0)
    assert len(points) == 3
    assert calibration_error(points) == pytest.approx(sum(distances) / 3)
    assert calibration_error([]) is None


def test_calibration_counts_no_prompt_without_a_pair():
    assert calibration(np.array([np.nan, np.nan]), 0.1) == [] and calibration(np.array([]), 0.1) == []
    assert sum(point["count"] for point in calibration(np.array([1.0, np.nan, -3.0]), 0.1)) == 2
