"""Processes of one run that launchers start in earnest, or with the variables that launchers set."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from irlfast.common import ranks
from tests.helpers.runs import ROOT, SERVER, TORCHRUN, Forked, free_port
from tests.helpers.tiers import full, slow

PLACE = "tests.helpers.place"
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module")
MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m")
AGENT = (sys.executable, "-m", "irlfast.common.agent", "2")
needs_mpirun = pytest.mark.skipif(not shutil.which("mpirun"), reason="mpirun is not here")


def srun(rank: int, tasks: int, **more: str) -> dict[str, str]:
    step = {"SLURM_JOB_ID": free_port(), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "here", "SLURM_NTASKS": "9"}
    own = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_PROCID": str(rank)}
    return step | own | {"SLURM_LOCALID": str(rank)} | more


def mpirun(rank: int, tasks: int) -> dict[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "SIZE": tasks, "LOCAL_SIZE": tasks}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in own.items()}


def mpiexec(rank: int, tasks: int) -> dict[str, str]:
    own = {"PMI_RANK": rank, "MPI_LOCALRANKID": rank, "PMI_SIZE": tasks, "MPI_LOCALNRANKS": tasks}
    return {name: str(value) for name, value in own.items()}


def places(out: str, count: int) -> None:
    """Check that ``count`` processes were one run: each knew its place, and their sum was that of all."""
    [line] = [line for line in out.splitlines() if line.startswith("{")]
    assert json.loads(line) == {"places": [[rank, count, rank] for rank in range(count)], "sum": count}


@pytest.mark.parametrize(
    ("launcher", "count"),
    [
        (srun, 2),
        pytest.param(srun, 4, marks=slow),
        pytest.param(mpirun, 2, marks=full),
        pytest.param(mpiexec, 2, marks=slow),
        pytest.param(mpirun, 4, marks=slow),
        pytest.param(mpiexec, 4, marks=slow),
    ],
)
def test_tasks_with_the_variables_of_slurm_or_mpi_are_one_run(tmp_path, launcher, count):
    more = {"MASTER_PORT": free_port(), "SLURM_JOB_ID": "7"}
    run = Forked(["-m", PLACE, str(tmp_path)], variables=[launcher(rank, count) | more for rank in range(count)])
    code, out, err = run.wait(300)
    assert code == 0, err
    places(out, count)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(AGENT, id="irlfast alone", marks=full),
        pytest.param(DEEPSPEED, id="deepspeed", marks=full),
        pytest.param((*TORCHRUN, "-m"), id="torchrun", marks=slow),
        pytest.param(MPIRUN, id="mpirun", marks=[full, needs_mpirun]),
    ],
)
def test_a_launcher_as_it_is_typed_starts_one_run(tmp_path, launcher):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*launcher, PLACE, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    places(done.stdout, 2)


def test_a_task_whose_variables_contradict_each_other_ends_all_and_its_sentence_is_the_last_and_only_one(tmp_path):
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    run = Forked(["-m", PLACE, str(tmp_path)], variables=[srun(rank, 2, RANK="0", **port) for rank in range(2)])
    for process in run.processes:
        process.join(300)
    assert [process.exitcode for process in run.processes] == [2, 2]
    sentence = "RANK: found 0, expected 1, as srun's SLURM_PROCID says, or RANK not set"
    assert run.wait(0)[2].splitlines() == [f"irlfast, process 1: {sentence}"]


@pytest.mark.parametrize(
    ("how", "code"),
    [
        pytest.param("InputError", 2, marks=slow),
        pytest.param("SIGUSR1", 75, marks=full),
        pytest.param("SIGINT", 130, marks=slow),
        pytest.param("SIGKILL", 1, marks=slow),
    ],
)
def test_irlfast_alone_ends_with_the_code_of_its_processes_and_hands_signals_on(tmp_path, how, code):
    given = ["tests.helpers.ending", str(tmp_path / "run"), how if how in ("InputError", "SIGKILL") else "none"]
    agent = subprocess.Popen(
        [*AGENT, *given, "1", "0"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    if how in ("SIGUSR1", "SIGINT"):
        while not (tmp_path / "run" / "steps").exists():
            assert agent.poll() is None
            time.sleep(0.02)
        agent.send_signal(getattr(signal, how))
    _, err = agent.communicate(timeout=300)
    assert agent.returncode == code, err
    sentence = {
        "InputError": "irlfast, process 1: the rows are refused",
        "SIGUSR1": "preempted; all that was finished is kept; the same command resumes",
        "SIGINT": "interrupted; the same command resumes",
        "SIGKILL": "process 1 ended without a word (killed?); the same command resumes",
    }[how]
    assert err.splitlines()[-1].endswith(sentence)
    assert err.count("\n") == 1, err


def agree(rank: int, count: int, port: int, names: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    tcp = TCPStore("127.0.0.1", port, wait_for_workers=False)
    (names / str(rank)).write_text(ranks.agree_on_start(tcp, 300.0))


def test_processes_that_are_started_anew_agree_on_a_new_name_whoever_of_the_earlier_ones_came(tmp_path):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agreed = []
    for start, came in enumerate([(0, 1, 2), (1, 2), (0,), (0, 1, 2), (2,), (0, 1, 2)]):
        names = tmp_path / str(start)
        names.mkdir()
        processes = [SERVER.Process(target=agree, args=(rank, 3, store.port, names)) for rank in came]
        for process in processes:
            process.start()
        whole = len(came) == 3
        for process in processes:
            process.join(300 if whole else 0.5)
            process.kill()
            process.join()
        agreed += [{path.read_text() for path in names.iterdir()}] if whole else []
        assert whole or not [*names.iterdir()]
    assert [len(names) for names in agreed] == [1, 1, 1]
    assert len(set.union(*agreed)) == 3
