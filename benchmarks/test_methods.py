"""The parts of benchmarks.methods on problems with known answers: statistics, budgets, tasks and schedules."""

import random
from collections import Counter

import numpy as np
import pytest

from benchmarks.methods import arms_of
from benchmarks.protocol.arms import ARMS, START
from benchmarks.protocol.generate import column_addition, is_right_sum, modes_of, sums, two_modes, with_wrong_answers
from benchmarks.protocol.jobs import Job, keys_of, schedule
from benchmarks.protocol.statistics import holm, paired_gain
from benchmarks.protocol.tasks import SIZES, TASKS, write_files
from benchmarks.small import write_data
from irlfast.config.read import make_config


@pytest.mark.parametrize("by_seed, by_prompt", [(1.0, 0.0), (0.3, 1.0), (0.0, 1.0), (0.0, 0.0)])
def test_the_interval_has_the_true_gain_in_95_percent_of_drawn_experiments(by_seed, by_prompt):
    generator, truth, seeds, prompts, draws = np.random.default_rng(0), 0.7, 5, 40, 2000
    inside = 0
    for _ in range(draws):
        differences = truth + generator.normal(size=(seeds, prompts))
        differences += by_seed * generator.normal(size=(seeds, 1)) + by_prompt * generator.normal(size=(1, prompts))
        gain = paired_gain(differences)
        inside += gain.low <= truth <= gain.high
        assert gain.mean == pytest.approx(differences.mean())
    # Without an effect of the seeds, five seeds leave the interval wide: too sure it never is.
    assert inside / draws > 0.94 and (inside / draws < 0.965 or by_seed < 1)


def test_without_an_effect_of_prompts_the_interval_is_students_over_the_means_of_the_seeds():
    from scipy.stats import ttest_1samp

    rows = np.random.default_rng(1).normal(size=(5, 1)) + np.zeros((5, 30))
    gain, expected = paired_gain(rows), ttest_1samp(rows[:, 0], 0)
    assert gain.p == pytest.approx(expected.pvalue)
    assert (gain.low, gain.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_equal_policies_have_no_gain_and_one_seed_has_no_interval():
    assert paired_gain(np.zeros((5, 9))) == (0.0, 0.0, 0.0, 1.0)
    assert paired_gain(np.ones((1, 9))) == (1.0, None, None, None)


def test_holm_multiplies_the_kth_smallest_p_value_by_those_that_are_left():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_holm_keeps_the_chance_of_any_false_gain_at_5_percent():
    generator = np.random.default_rng(2)
    false = [min(holm(generator.uniform(size=12).tolist())) < 0.05 for _ in range(4000)]
    assert 0.04 < np.mean(false) < 0.06


def test_column_addition_is_right_and_ends_with_the_sum():
    assert column_addition(58, 67) == "8+7=15 5+6+1=12 125"
    for row in sums(500, 3, random.Random(0)):
        a, b = map(int, row["prompt"].split("+"))
        *steps, result = row["completion"].split(" ")
        assert int(result) == a + b and is_right_sum(row["prompt"], row["completion"])
        assert all(eval(step.split("=")[0]) == int(step.split("=")[1]) for step in steps) and len(steps) == 3
    assert not is_right_sum("58+67", "8+7=15 5+6+1=12 126") and not is_right_sum("58+67", "")


def test_both_modes_are_written_about_equally_often():
    rows = two_modes(2000, 5, random.Random(0))
    assert len({row["prompt"] for row in rows}) == 2000
    written = Counter(modes_of(row["prompt"]).index(row["completion"]) for row in rows)
    assert abs(written[0] - written[1]) < 4 * 2000**0.5 and sum(written.values()) == 2000
    assert modes_of("dbca") == ("abcd", "acbd")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_the_share_of_wrong_answers_is_exact_and_they_are_answers_to_other_prompts(share):
    rows = [{"prompt": str(i), "completion": str(i // 2)} for i in range(400)]
    noisy = with_wrong_answers(rows, share, random.Random(0))
    assert sum(one != other for one, other in zip(rows, noisy, strict=True)) == round(share * 400)
    assert sorted(row["completion"] for row in noisy) == sorted(row["completion"] for row in rows)


def test_a_schedule_has_the_planned_prompts_and_takes_new_ones_while_there_are_some():
    assert schedule({"method": "sft"}, 2048, 500, 64) == {"sft_steps": 32, "max_train_samples": 500}
    split = schedule({"method": "irft"}, 512, 600, 32)
    assert split == {"stages": 2, "inner_steps": 8, "prompts_per_stage": "split", "max_train_samples": 512}
    again = schedule({"method": "irft"}, 2048, 500, 32)
    assert again["prompts_per_stage"] == "all" and again["stages"] * again["inner_steps"] * 32 == 2048 + 32
    assert schedule({"method": "rft"}, 128, 500, 16)["reward_steps"] == 4


@pytest.mark.parametrize("task", TASKS)
def test_the_keys_of_every_arm_of_a_task_are_a_configuration(task, tmp_path):
    write_data(tmp_path)
    size = SIZES["quick"]
    write_files(task, size, 0, tmp_path, tmp_path / "runs")
    for arm in (START, *arms_of(task)):
        if not ARMS[arm].of:
            job = Job(task, size, 0, tmp_path / "runs", tmp_path, arm, 1e-4, 200)
            job.folder.mkdir(parents=True)
            job.start.mkdir(parents=True, exist_ok=True)
            make_config(keys_of(job))
