"""``examples/train.sbatch`` on a real Slurm: it is preempted, its time is over, it is requeued until it is done."""

import os
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, contents, run, settings
from tests.helpers.slurm import ask, running, why_not
from tests.helpers.tiers import slow

LONG = {"stages": 1, "max_train_samples": 32, "max_eval_samples": 8, "sft_steps": 400, "save_steps": 20}
LONG |= {"logging_steps": 20, "inner_steps": 4, "sft_learning_rate": 1e-5}  # a higher rate learns all rows by heart
HERE = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=60"]
PATIENCE = 300.0  # seconds

pytestmark = [slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]


def wait_until(true, what: str, log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until, f"{what}: {log.read_text() if log.exists() else 'no log'}"
        time.sleep(0.2)


def step_of(output: Path) -> int:
    return max(
        (int(path.name[5:]) for path in output.glob("sft/checkpoint/step-*") if path.suffix != ".tmp"), default=0
    )


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The variables with which a job finds Slurm, and ``irlfast``."""
    folder = tmp_path_factory.mktemp("slurm")
    command = folder / "bin" / "irlfast"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m irlfast "$@"\n')
    command.chmod(0o755)
    with running(folder / "cluster") as variables:
        path = f"{command.parent}:{os.environ['PATH']}"
        yield os.environ | variables | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def submitted(output: Path, log: Path, slurm: dict[str, str]) -> str:
    """The number of a job that has taken steps."""
    script = [str(ROOT / "examples" / "train.sbatch"), *settings(output, **LONG)]
    job = ask(["sbatch", "--parsable", f"--output={log}", f"--chdir={ROOT}", *HERE, *script], slurm).strip()
    wait_until(lambda: step_of(output) >= 20, "the run takes no steps", log)
    return job


def test_a_job_that_is_preempted_and_whose_time_is_over_is_requeued_until_the_run_is_done(tmp_path, slurm):
    output, log = tmp_path / "run", tmp_path / "job.log"
    job = submitted(output, log, slurm)
    ask(["sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"], slurm)
    wait_until(lambda: "preempted at step" in log.read_text(), "the job is not preempted", log)
    at = step_of(output)
    wait_until(lambda: step_of(output) > at, "the job is not requeued after a preemption", log)
    ask(["scancel", "--signal=USR1", job], slurm)  # as Slurm sends it before the time is over
    wait_until(lambda: log.read_text().count("the same command resumes") == 2, "the tasks do not stop", log)
    wait_until((output / "final").exists, "the job is not requeued after its time", log)
    wait_until(lambda: "COMPLETED" in state_of(job, slurm), "the job does not end", log)
    assert "Restarts=2" in state_of(job, slurm)
    run(tmp_path / "whole", 2, **LONG)
    assert contents(output / "final") == contents(tmp_path / "whole" / "final")


def test_a_job_that_is_cancelled_keeps_its_steps_and_does_not_come_back(tmp_path, slurm):
    output, log = tmp_path / "run", tmp_path / "job.log"
    job = submitted(output, log, slurm)
    ask(["scancel", job], slurm)
    wait_until(lambda: "preempted at step" in log.read_text(), "the tasks do not stop", log)
    wait_until(lambda: "CANCELLED" in state_of(job, slurm), "the job does not end", log)
    wait_until(lambda: not ask(["squeue", "-h", f"--jobs={job}"], slurm), "the job does not leave", log)
    assert "Restarts=0" in state_of(job, slurm)


def state_of(job: str, slurm: dict[str, str]) -> str:
    return ask(["scontrol", "show", "job", job], slurm)
