"""The time left for a whole run, by simulated runs whose true times are known."""

import random

import pytest

from irlfast.common import time_left
from irlfast.common.time_left import Clock, Part, Speed, duration, seconds_left

SEEDS = range(30)


class Time:
    """Stands for the module ``time``: it passes when the simulation says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def passing(monkeypatch):
    passing = Time()
    monkeypatch.setattr(time_left, "time", passing)
    return passing


class Simulation:
    """A run of SFT and some stages. Every kind of work has a speed of its own, and each piece errs by some percent."""

    def __init__(self, seed: int, passing: Time) -> None:
        self.draw = random.Random(seed)
        self.passing = passing
        self.seconds = {kind: 10 ** self.draw.uniform(-3, 1) for kind in ("sft", "answers", "reward", "rft")}
        self.steps = self.draw.randint(5, 20)
        self.parts = [Part("", "answers", 0), Part("sft", "sft", 400)]
        for stage in range(self.draw.randint(2, 6)):
            self.parts += [Part("", "answers", 900), Part(f"stage-{stage:02d}/reward", "reward", 500)]
            self.parts += [Part("", "answers", 2000), Part(f"stage-{stage:02d}", "rft", 2000)]
        self.parts.append(Part("", "answers", 50))
        self.estimates: list[tuple[int, float, float | None]] = []  # the part, the time, and the estimate

    def run(self, clock: Clock, first: int = 0) -> None:
        clock.plan(self.parts, first)
        for index, part in enumerate(self.parts):
            if index < first:
                continue
            if part.name:
                clock.train(part.name, 0.0)
            for step in range(1, self.steps + 1):
                self.passing.now += part.work / self.steps * self.seconds[part.kind] * self.draw.uniform(0.9, 1.1)
                if part.name:
                    clock.train(part.name, step / self.steps)
                elif index % 4 != 0:  # others have their answers sampled without a word
                    clock.answer(part.work / self.steps)
                self.estimates.append((index, self.passing.now, clock.left()))
            if part.name:
                clock.finish()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", [0, 6])
def test_after_one_part_of_each_kind_the_estimate_errs_by_15_percent_or_2_percent_of_the_run(seed, first, passing):
    simulation = Simulation(seed, passing)
    begun = passing.now
    simulation.run(Clock(), first)
    for index, now, estimate in simulation.estimates:
        truth = passing.now - now
        if index > first + 5 and truth > 0:
            assert estimate == pytest.approx(truth, rel=0.15, abs=0.02 * (passing.now - begun))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_time_left_falls_to_nothing_as_the_run_ends(seed, passing):
    simulation = Simulation(seed, passing)
    clock = Clock()
    simulation.run(clock)
    assert simulation.estimates[0][2] is None  # nothing is measured before the first step of SFT
    clock.finish()
    assert clock.left() == 0


def test_a_phase_that_ends_early_or_begins_again_is_counted_once(passing):
    clock = Clock()
    clock.plan([Part("", "answers", 0), Part("a", "irft", 100), Part("", "answers", 0), Part("b", "irft", 100)], 0)
    clock.train("a", 0.0)
    for share in (0.1, 0.2, 0.3, 0.1, 0.2, 0.3):  # it ran out of memory, and began again after its first step
        passing.now += 10
        clock.train("a", share)
    clock.finish()  # max_expert_drop
    clock.train("b", 0.0)
    passing.now += 10
    clock.train("b", 0.1)
    assert clock.left() == pytest.approx(90, rel=0.5)


def test_the_first_step_which_compiles_counts_only_until_there_is_another(passing):
    clock = Clock()
    clock.plan([Part("a", "irft", 100)], 0)
    clock.train("a", 0.0)
    lefts = []
    for seconds, share in ((70, 0.1), (10, 0.2), (10, 0.3)):
        passing.now += seconds
        clock.train("a", share)
        lefts.append(clock.left())
    assert lefts == pytest.approx([630, 80, 70])


def test_a_phase_that_is_not_of_the_plan_changes_nothing(passing):
    clock = Clock()
    clock.train("sft", 0.5)
    assert clock.left() is None
    clock.plan([Part("a", "irft", 10)], 0)
    clock.train("b", 0.5)
    assert (clock.at, clock.left()) == (0, None)


def test_a_kind_that_is_not_measured_has_the_mean_speed_of_the_others():
    parts = [Part("a", "x", 10), Part("b", "y", 10), Part("c", "z", 10)]
    assert seconds_left(parts, [10, 10, 0], {"x": Speed(10, 10), "y": Speed(60, 20)}) == pytest.approx(10 * 70 / 30)
    assert seconds_left(parts, [0, 0, 0], {}) is None


def test_durations_are_written_in_the_largest_unit():
    assert [duration(x) for x in (0.4, 59, 90, 7200, 200000)] == [
        "0 seconds", "59 seconds", "1.5 minutes", "2.0 hours", "2.3 days"
    ]  # fmt: skip
