"""Four machines, which are namespaces of this one: every launcher starts one run on them, on a folder that all share.

On folders that they do not share, all refuse it. When a machine is killed, the others end.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.namespaces import Machine, machines, why_not
from tests.helpers.runs import ROOT, contents, run, settings
from tests.helpers.tiers import full, slow

SMALL = {"stages": 1, "max_train_samples": 32, "max_eval_samples": 8, "logging_steps": 1}
LONG = SMALL | {"sft_steps": 400, "save_steps": 5, "logging_steps": 5}
ENDED_WITHIN = 30.0  # seconds
STARTED_WITHIN = 300.0  # seconds
SAID = {
    0: r"process 0, or its launcher, ended without a word \(killed\?\); the same command resumes",
    3: r"process 3, on node3, ended without a word \(killed\?\); the same command resumes",
}
TRAIN = "irlfast.train"
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


def torchrun(nodes: list[Machine], folder: Path, arguments: list[str]) -> list[list[str]]:
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29400", "--nnodes", "4", "--nproc-per-node", "1")
    return [
        [*node.enter, sys.executable, "-m", "torch.distributed.run", *meet, "-m", TRAIN, *arguments] for node in nodes
    ]


def srun(nodes: list[Machine], folder: Path, arguments: list[str], module: str = TRAIN) -> list[list[str]]:
    """As srun starts its tasks: by variables alone."""
    count, names = str(len(nodes)), f"node[0-{len(nodes) - 1}]"
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": names, "SLURM_STEP_NUM_NODES": count}
    step |= {"SLURM_STEP_NUM_TASKS": count, "SLURM_LOCALID": "0"}
    variables = [f"{name}={value}" for name, value in step.items()]
    return [
        [*node.enter, *variables, f"SLURM_PROCID={rank}", sys.executable, "-m", module, *arguments]
        for rank, node in enumerate(nodes)
    ]


def mpirun(nodes: list[Machine], folder: Path, arguments: list[str]) -> list[list[str]]:
    hosts = ("--host", ",".join(node.name for node in nodes), "-n", "4", "-N", "1")
    ssh = ("--mca", "plm_rsh_agent", str(folder / "ssh"))
    given = ("-x", "MASTER_ADDR=node0", "-x", "MASTER_PORT=29500", "-x", "PYTHONPATH", "-x", "OMP_NUM_THREADS")
    start = ["mpirun", "--allow-run-as-root", *hosts, *ssh, *given]
    return [[*nodes[0].enter, *start, sys.executable, "-m", TRAIN, *arguments]]


def deepspeed(nodes: list[Machine], folder: Path, arguments: list[str]) -> list[list[str]]:
    (folder / "hosts").write_text("".join(f"{node.name} slots=1\n" for node in nodes))
    start = ["-m", "deepspeed.launcher.runner", "--hostfile", str(folder / "hosts"), "--module", TRAIN]
    return [[*nodes[0].enter, f"PATH={folder}:{os.environ['PATH']}", sys.executable, *start, *arguments]]


def needs(name: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(name), reason=f"{name} is not here (Debian: {package})")


LAUNCHERS = [
    torchrun,
    srun,
    pytest.param(mpirun, marks=needs("mpirun", "openmpi-bin")),
    pytest.param(deepspeed, marks=needs("pdsh", "pdsh")),
]
by_each_launcher = pytest.mark.parametrize("launcher", LAUNCHERS)


@pytest.fixture
def cluster(tmp_path_factory):
    """The folder and the machines of a cluster."""
    folder = tmp_path_factory.mktemp("cluster")
    with machines(folder, 4) as nodes:
        yield folder, nodes


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same run by four processes of one machine."""
    output = tmp_path_factory.mktemp("local") / "run"
    run(output, 4, **SMALL)
    return output


class Started:
    """Commands that were started together, whose output goes to files."""

    def __init__(self, commands: list[list[str]], folder: Path):
        self.logs = [folder / f"log-{i}.txt" for i in range(len(commands))]
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        self.processes = []
        for command, log in zip(commands, self.logs, strict=True):
            with log.open("w") as out:
                files = {"stdout": out, "stderr": out, "stdin": subprocess.DEVNULL}
                self.processes.append(subprocess.Popen(command, env=os.environ | variables, **files))

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def wait_until(self, true: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < until, self.said()
            time.sleep(0.05)

    def end(self, seconds: float) -> list[int]:
        """The exit codes of all, which end within some seconds."""
        self.wait_until(lambda: all(process.poll() is not None for process in self.processes), seconds)
        return [process.returncode for process in self.processes]


@full
def test_the_tasks_of_srun_on_two_machines_whose_own_names_are_loopback_addresses_are_one_run(tmp_path):
    with machines(tmp_path, 2) as nodes:
        started = Started(srun(nodes, tmp_path, [str(tmp_path)], "tests.helpers.place"), tmp_path)
        assert started.end(STARTED_WITHIN) == [0, 0], started.said()
    assert '{"places": [[0, 2, 0], [1, 2, 0]], "sum": 2.0}' in started.said()


@slow
@by_each_launcher
def test_four_machines_that_share_a_folder_are_one_run_with_the_bytes_of_a_local_one(
    cluster, local, tmp_path, launcher
):
    folder, nodes = cluster
    started = Started(launcher(nodes, folder, settings(tmp_path / "run", **SMALL)), tmp_path)
    assert started.end(300) == [0] * len(started.processes), started.said()
    assert contents(tmp_path / "run" / "final") == contents(local / "final")


@slow
@by_each_launcher
def test_a_folder_that_the_machines_do_not_share_is_refused_by_all_in_one_sentence(cluster, tmp_path, launcher):
    folder, nodes = cluster
    own = tmp_path / "own"
    own.mkdir()
    for node in nodes:
        node.do(f"mount -t tmpfs none {own}")
    started = Started(launcher(nodes, folder, settings(own / "run", **SMALL)), tmp_path)
    started.wait_until(lambda: "does not see what process 0 writes" in started.said(), STARTED_WITHIN)
    ended(nodes, ENDED_WITHIN)
    assert 0 not in started.end(ENDED_WITHIN)
    refused = (
        r"irlfast(?:, process \d)?: output_dir (\S+): process \d, on node\d as \S+, does not see what process 0 writes"
    )
    assert re.findall(refused, started.said()) == [str(own / "run")], started.said()


def ended(nodes: list[Machine], seconds: float) -> None:
    """All processes of the machines end within some seconds."""
    until = time.monotonic() + seconds
    while left := [pid for node in nodes for pid in node.processes()]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


@slow
@by_each_launcher
@pytest.mark.parametrize("killed", [0, 3])
def test_when_a_machine_is_killed_the_others_end_and_say_so(cluster, tmp_path, launcher, killed):
    folder, nodes = cluster
    started = Started(launcher(nodes, folder, settings(tmp_path / "run", **LONG)), tmp_path)
    started.wait_until(lambda: any((tmp_path / "run/sft/checkpoint").glob("step-*")), STARTED_WITHIN)
    nodes[killed].kill()
    began = time.monotonic()
    ended(nodes, ENDED_WITHIN)
    print(f"ended after {time.monotonic() - began:.1f} s\n", started.said())
    assert 0 not in started.end(ENDED_WITHIN)
    if killed or len(started.processes) > 1:  # else the launcher, by which all print, was on the machine
        assert re.search(SAID[killed], started.said()), started.said()
