"""A run whose process is killed goes on with another number of processes, and its phase has the same losses."""

import json
import shutil
import time

import pytest

from tests.helpers.runs import Forked, command, run
from tests.helpers.tiers import full, slow

TINY = {"max_train_samples": 16, "max_eval_samples": 4, "stages": 1, "inner_steps": 5, "logging_steps": 1}
RUNS = {
    "stage-00": {"sft_steps": 1, "learning_rate": 1e-3, "zero_stage": 2, **TINY},
    "stage-00/reward": {"method": "rft", "sft_steps": 0, "num_generations": 2, "reward_steps": 5, **TINY},
}
STOPS = {"stage-00": 5, "stage-00/reward": 4}  # the number in the run of the phase's fourth step


def kill_one(output, phase, marker):
    """Kill the second of two processes before the phase's fourth step, and return what the first one prints."""
    plan = {"rank": 1, "point": "a step", "when": "before", "number": STOPS[phase], "marker": str(marker)}
    train = command(output, **RUNS[phase])[1:]
    started = Forked(["-m", "tests.helpers.fault_points", json.dumps(plan), *train], 2)
    while not marker.exists():
        assert all(process.is_alive() for process in started.processes), started.wait(0)
        time.sleep(0.01)
    started.processes[1].kill()
    for process in started.processes:
        process.join(60)
    assert not started.processes[0].is_alive()
    return started.wait(0)[2]


def losses(output, phase):
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["phase"] == phase and "loss" in row}


@pytest.mark.parametrize("phase", [pytest.param("stage-00", marks=full), pytest.param("stage-00/reward", marks=slow)])
def test_two_processes_of_which_one_is_killed_go_on_as_one_and_as_four(tmp_path, phase):
    run(tmp_path / "whole", 2, **RUNS[phase])
    expected = losses(tmp_path / "whole", phase)
    assert "process 1" in kill_one(tmp_path / "killed", phase, tmp_path / "marker").splitlines()[-1]
    for count in (1, 4):
        output = tmp_path / str(count)
        shutil.copytree(tmp_path / "killed", output)
        _, err = run(output, count, **RUNS[phase])
        assert f"2 processes wrote its checkpoint, and {count} go on" in err
        assert losses(output, phase) == pytest.approx(expected, rel=1e-4), count
        assert (output / "final/config.json").exists()
