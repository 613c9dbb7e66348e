"""The place of a process among those of its run, from the variables of its launcher."""

import os
import re
import sys

import pytest

from irlfast.common import launch
from irlfast.common.files import InputError

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_", "GROUP_", "CROSS_", "TORCHELASTIC_", "CUDA_VISIBLE_DEVICES")
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_STEP_NUM_NODES": "2"}


def placed(monkeypatch, variables: dict[str, str], *arguments: str) -> dict[str, str]:
    """The variables of a place that a process has, after it took its place, with these variables and arguments."""
    for name in [*os.environ]:
        if name in PLACE or name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    for name in PLACE:  # so that monkeypatch deletes what the function sets
        monkeypatch.setenv(name, "")
        os.environ.pop(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["irlfast train", *arguments])
    launch.take_place()
    return {name: os.environ[name] for name in PLACE if name in os.environ}


def srun(rank: int, tasks: int, local: int, **more: str) -> dict[str, str]:
    own = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_LOCALID": str(local)}
    return STEP | own | {"SLURM_NTASKS": str(tasks)} | more


def mpirun(rank: int, tasks: int, local: int, here: int, **more: str) -> dict[str, str]:
    values = {"RANK": rank, "SIZE": tasks, "LOCAL_RANK": local, "LOCAL_SIZE": here}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values.items()} | {"PMIX_NAMESPACE": "9"} | more


def mpiexec(rank: int, tasks: int, local: int, here: int, **more: str) -> dict[str, str]:
    own = {"PMI_RANK": rank, "PMI_SIZE": tasks, "MPI_LOCALRANKID": local, "MPI_LOCALNRANKS": here}
    return {name: str(value) for name, value in own.items()} | more


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("each", [1, 2, 8])
@pytest.mark.parametrize("start", ["srun", "srun --mpi=pmi2", "mpirun", "mpiexec"])
def test_the_tasks_of_srun_and_mpirun_have_places_as_torchrun_would_give_them(monkeypatch, nodes, each, start):
    tasks = nodes * each
    places = []
    for rank in range(tasks):
        local, address = rank % each, {} if nodes == 1 else {"MASTER_ADDR": "gpu03"}
        of_slurm = srun(rank, tasks, local, SLURM_STEP_NUM_NODES=str(nodes))
        variables = {
            "srun": of_slurm,
            "srun --mpi=pmi2": of_slurm | {"PMI_RANK": str(rank), "PMI_SIZE": str(tasks)},
            "mpirun": mpirun(rank, tasks, local, each) | address,
            "mpiexec": mpiexec(rank, tasks, local, each) | address,
        }
        places.append(placed(monkeypatch, variables[start]))
    if tasks == 1:
        assert places == [{}]  # one task is a run of its own, and may start one process per GPU
        return
    address = "127.0.0.1" if nodes == 1 else "gpu03"
    assert places == [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(tasks),
            "LOCAL_RANK": str(rank % each),
            "MASTER_ADDR": address,
            "MASTER_PORT": places[0]["MASTER_PORT"],
        }
        for rank in range(tasks)
    ]


def test_two_runs_on_a_machine_meet_at_two_ports(monkeypatch):
    steps = [placed(monkeypatch, srun(0, 2, 0, SLURM_STEP_ID=step)) for step in ("0", "1")]
    starts = [placed(monkeypatch, mpirun(0, 2, 0, 2, PMIX_NAMESPACE=name)) for name in ("8", "9")]
    ports = {each["MASTER_PORT"] for each in steps + starts}
    assert len(ports) == 4
    assert all(10_000 <= int(port) < 30_000 for port in ports)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"},  # a shell of salloc
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},  # a script of sbatch
        srun(0, 1, 0),
        mpirun(0, 1, 0, 1),
    ],
)
def test_a_process_that_is_alone_has_no_place(monkeypatch, variables):
    assert placed(monkeypatch, variables) == {}


@pytest.mark.parametrize(
    "variables",
    [
        TORCHRUN,
        TORCHRUN | {"GROUP_WORLD_SIZE": "2"} | srun(0, 2, 0),  # srun starts one torchrun per machine
        TORCHRUN | {"CROSS_SIZE": "2"} | srun(1, 2, 0),
        TORCHRUN | srun(3, 8, 3),  # by a script, as RANK=$SLURM_PROCID
        TORCHRUN | {"GROUP_WORLD_SIZE": "1"} | srun(0, 1, 0),
    ],
)
def test_variables_that_torchrun_or_a_script_has_set_stay(monkeypatch, variables):
    assert placed(monkeypatch, variables) == TORCHRUN


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "1"}, "WORLD_SIZE: not set, although RANK is 1; expected both, or none"),
        ({"WORLD_SIZE": "2"}, "RANK: not set, although WORLD_SIZE is 2; expected both, or none"),
        (TORCHRUN | {"RANK": "8"}, "RANK: found 8, but WORLD_SIZE is 8; expected 0 to 7"),
        (TORCHRUN | {"RANK": "first"}, "RANK: found 'first', expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK: not set, although WORLD_SIZE is 2; expected the number .*"),
        (
            srun(1, 4, 1) | {"RANK": "0"},
            "RANK: found 0, expected 1, as srun's SLURM_PROCID says, or RANK not set",
        ),
        (
            srun(0, 4, 0) | {"RANK": "0", "WORLD_SIZE": "1"},
            "WORLD_SIZE: found 1, expected 4, as srun's SLURM_STEP_NUM_TASKS says, or WORLD_SIZE not set",
        ),
        (
            TORCHRUN | {"GROUP_WORLD_SIZE": "1"} | srun(1, 4, 0),
            r"GROUP_WORLD_SIZE: found 1, but srun has started 4 tasks \(SLURM_STEP_NUM_TASKS\), so that each has a "
            "torchrun with a run of its own in one folder; expected one task, or torchrun --nnodes 4",
        ),
        (
            TORCHRUN | {"CROSS_SIZE": "1"} | mpirun(1, 4, 0, 4),
            "CROSS_SIZE: found 1, but mpirun has .* expected one task",
        ),
        ({"SLURM_PROCID": "2"}, "SLURM_STEP_NUM_TASKS: not set, although SLURM_PROCID is 2; expected srun's"),
        (mpirun(1, 4, 0, 2), "MASTER_ADDR: not set, and mpirun does not say on which machine process 0 is; .*"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPI_LOCALRANKID: not set, although mpiexec has started 2 tasks"),
    ],
)
def test_variables_that_are_missing_or_contradict_each_other_are_refused_in_one_sentence(
    monkeypatch, variables, sentence
):
    with pytest.raises(InputError) as refusal:
        placed(monkeypatch, variables)
    assert re.fullmatch(sentence, str(refusal.value))


@pytest.mark.parametrize("form", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"], ["--local_rank=-1"]])
def test_the_local_rank_that_a_launcher_adds_to_the_arguments_is_taken_off(monkeypatch, form):
    assert placed(monkeypatch, TORCHRUN, *form, "run.yaml", "seed=3") == TORCHRUN
    assert sys.argv == ["irlfast train", "run.yaml", "seed=3"]


def test_a_local_rank_among_the_arguments_that_is_not_the_variables_is_refused(monkeypatch):
    with pytest.raises(InputError, match="LOCAL_RANK: found 3, expected 2, as --local_rank says"):
        placed(monkeypatch, TORCHRUN, "--local_rank=2", "run.yaml")


def test_a_task_that_sees_one_gpu_takes_it_whatever_its_number_on_the_machine(monkeypatch):
    assert placed(monkeypatch, srun(3, 8, 3, CUDA_VISIBLE_DEVICES="5"))["LOCAL_RANK"] == "0"
    assert placed(monkeypatch, srun(3, 8, 3, CUDA_VISIBLE_DEVICES="4,5,6,7"))["LOCAL_RANK"] == "3"
    assert placed(monkeypatch, srun(3, 8, 3, CUDA_VISIBLE_DEVICES=""))["LOCAL_RANK"] == "3"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[03-05,09],login", "gpu03"),
        ("a-b[7,9]", "a-b7"),
        ("rack[1-2]n[03-04]", "rack1n03"),
    ],
)
def test_the_first_host_of_slurms_list_is_the_one_that_scontrol_shows_first(nodes, host):
    assert launch.first_host(nodes) == host


def test_a_process_that_no_launcher_started_has_as_many_beside_it_as_there_are_gpus_or_as_it_asks_for(monkeypatch):
    placed(monkeypatch, {})
    assert (launch.processes(None), launch.processes(3)) == (1, 3)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert (launch.processes(None), launch.processes(3)) == (8, 3)
    placed(monkeypatch, srun(0, 4, 0))
    assert launch.processes(None) == 4
    with pytest.raises(InputError, match="num_processes: found 3, but the launcher has started 4"):
        launch.start_processes("irlfast.train", 3, 0.0)
