"""IRFT comes to a stationary point of the experts' likelihood at the rate of its theorem (arXiv 2405.17888)."""

import statistics

from tests.helpers.stationarity import squared_norms


def test_the_mean_squared_norm_of_the_gradient_falls_as_one_over_the_root_of_all_steps():
    """Four times as many steps halve it."""
    few, more = (statistics.mean(squared_norms(stages, inner_steps=4)) for stages in (4, 16))
    assert 0.4 < more / few < 0.6


def test_another_seed_draws_other_answers():
    assert squared_norms(2, 2, seed=0) != squared_norms(2, 2, seed=1)


def test_too_many_steps_on_the_answers_of_one_stage_move_the_policy_away():
    """The synthetic answers of a stage are of the policy at its start: T must grow with K."""
    short, long = (statistics.mean(squared_norms(64 // steps, steps, scale=0.1)) for steps in (4, 16))
    assert long > 10 * short
