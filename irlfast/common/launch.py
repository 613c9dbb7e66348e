"""The place of this process among the processes of its run, whichever launcher started it.

torchrun and DeepSpeed's launcher say it in ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and
``MASTER_PORT``, which the rest of the code reads. srun and mpirun have variables of their own, from which these are
set here. A task of several that nothing tells so would do the whole run once more, in the same folder.
"""

import os
import re
import sys
import zlib
from typing import NamedTuple

from irlfast.common.files import InputError
from irlfast.common.ranks import world_size

HERE = "127.0.0.1"
PORT = "29500"  # torch's own default, where nothing tells two runs on a machine apart
MORE = 60.0  # seconds beyond the grace in which processes end after a signal
SAID = os.environ.pop("IRLFAST_SAID", "")  # whether the command that started this process has said what keys mean
LOCAL_RANK = re.compile(r"--local[-_]rank(?:=(-?\d+))?")


class Launcher(NamedTuple):
    """The names of the variables that a launcher sets."""

    name: str
    rank: str
    size: str  # number of tasks
    local_rank: tuple[str, ...]  # the first that is set counts
    local_size: str  # number of tasks on this machine
    job: tuple[str, ...]  # together, other values than those of any other run on the machine


LAUNCHERS = (
    Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    Launcher(
        "mpiexec", "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"), "MPI_LOCALNRANKS", ()
    ),
    # A script of sbatch has SLURM_PROCID, too, and a shell of salloc SLURM_NTASKS. Only a task of srun has this size.
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",), "", ("SLURM_JOB_ID", "SLURM_STEP_ID")),
)
AGENTS = {"GROUP_WORLD_SIZE": "torchrun", "CROSS_SIZE": "deepspeed"}  # by the variable with their number


def take_place() -> None:
    """Set torchrun's variables from those of srun or mpirun, and take ``--local_rank`` off the command line.

    Raises:
        InputError: variables are missing or contradict each other; the message names them.
    """
    take_local_rank()
    launcher = launcher_of_tasks()
    if launcher is None:
        check_torchruns()
    elif agents := next((variable for variable in AGENTS if variable in os.environ), None):
        check_agents(launcher, agents)
    else:
        take_place_of_task(launcher)


def processes(count: int | None) -> int:
    """Return how many processes the run has, or gets from :func:`start_processes` with the same ``count``."""
    if "RANK" in os.environ:
        return world_size()
    import torch

    return count or max(1, torch.cuda.device_count())


def start_processes(module: str, count: int | None, grace: float) -> None:
    """Become torchrun's agent of several processes that do the work of this one, if no launcher has started it.

    Args:
        module: what each of them runs, with the arguments of this process.
        count: how many there are; None: one per visible GPU.
        grace: the seconds that they have after a signal for a checkpoint.

    Raises:
        InputError: a launcher has started another number of processes.
    """
    if "RANK" in os.environ:
        if count and count != world_size():
            raise InputError(f"num_processes: found {count}, but the launcher has started {world_size()}")
        return
    if (count := processes(count)) > 1:
        os.environ["IRLFAST_SAID"] = "yes"
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(int(grace + MORE))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        os.execv(sys.executable, [sys.executable, "-m", "irlfast.common.agent", str(count), module, *sys.argv[1:]])


def take_local_rank() -> None:
    """Take off ``--local_rank=N``, which DeepSpeed's launcher adds to the arguments.

    Raises:
        InputError: LOCAL_RANK has another value.
    """
    for place, argument in enumerate(sys.argv[1:], 1):
        match = LOCAL_RANK.fullmatch(argument)
        if not match:
            continue
        end = place + 1 if match[1] else place + 2
        given = match[1] or "".join(sys.argv[place + 1 : end])
        del sys.argv[place:end]
        if given != "-1":  # which means that there is one process
            agree("LOCAL_RANK", os.environ.setdefault("LOCAL_RANK", given), given, "--local_rank")
        return


def launcher_of_tasks() -> Launcher | None:
    """Return the launcher that started this process as one of several tasks; None if none did.

    srun may set the variables of PMI, too, and knows the machines. mpirun may start its own helpers by srun, whose
    numbers then differ from those of its tasks.

    Raises:
        InputError: a launcher's number of tasks is missing.
    """
    places = {each: place_of(each) for each in LAUNCHERS if each.rank in os.environ}
    several = [each for each, (_, size) in places.items() if size > 1]
    return [each for each in several if places[each] == places[several[0]]][-1] if several else None


def place_of(launcher: Launcher) -> tuple[int, int]:
    """Return the rank of a task, and the number of tasks.

    Raises:
        InputError: the number of tasks is missing.
    """
    rank, size = number(launcher.rank), os.environ.get(launcher.size)
    if size is None and rank:
        raise InputError(f"{launcher.size}: not set, although {launcher.rank} is {rank}; expected {launcher.name}'s")
    return rank, number(launcher.size) if size else 1


def take_place_of_task(launcher: Launcher) -> None:
    """Set torchrun's variables from those of a task.

    Raises:
        InputError: a variable that is needed is missing, or one is set to another value already.
    """
    _, size = place_of(launcher)
    local = next((name for name in launcher.local_rank if name in os.environ), None)
    if local is None:
        raise InputError(f"{launcher.local_rank[0]}: not set, although {launcher.name} has started {size} tasks")
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    names = {"RANK": launcher.rank, "WORLD_SIZE": launcher.size, "LOCAL_RANK": local}
    for name, own in names.items():
        os.environ[name] = str(number(own))
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = address(launcher)
    os.environ.setdefault("MASTER_PORT", port(launcher))
    for name, own in names.items():  # from here on the other tasks can be told
        agree(name, given[name] or os.environ[own], os.environ[own], f"{launcher.name}'s {own}")
    if re.fullmatch("[^,]+", os.environ.get("CUDA_VISIBLE_DEVICES", "")):
        os.environ["LOCAL_RANK"] = "0"  # with --gpus-per-task=1, say, a task sees its own GPU alone


def address(launcher: Launcher) -> str:
    """Return the machine of process 0.

    Raises:
        InputError: the launcher does not say.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    if launcher.name == "srun" and nodes:
        return HERE if os.environ.get("SLURM_STEP_NUM_NODES") == "1" else first_host(nodes)
    if launcher.local_size in os.environ and os.environ[launcher.local_size] == os.environ[launcher.size]:
        return HERE
    raise InputError(
        f"MASTER_ADDR: not set, and {launcher.name} does not say on which machine process 0 is; expected the name of "
        "that machine, or torchrun"
    )


def first_host(nodes: str) -> str:
    """Return the first of Slurm's list of hosts, such as ``gpu[03-05,09],login``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def port(launcher: Launcher) -> str:
    """Return the same port for all tasks of a run, and probably another one for another run on the machine."""
    job = [os.environ[name] for name in launcher.job if name in os.environ]
    return str(10_000 + zlib.crc32(".".join(job).encode()) % 20_000) if job else PORT


def check_agents(launcher: Launcher, variable: str) -> None:
    """Check that several launchers, such as one torchrun per machine, do not each start a run of their own.

    Raises:
        InputError: each of them does.
    """
    agent, (_, tasks) = AGENTS[variable], place_of(launcher)
    if number(variable) == 1:
        nodes = f", or {agent} --nnodes {tasks}" if agent == "torchrun" else ""
        raise InputError(
            f"{variable}: found 1, but {launcher.name} has started {tasks} tasks ({launcher.size}), so that each has a "
            f"{agent} with a run of its own in one folder; expected one task{nodes}"
        )


def check_torchruns() -> None:
    """Check the variables that torchrun, or a person, has set.

    Raises:
        InputError: some are missing, or they contradict each other.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not given:
        return
    for name in ("RANK", "WORLD_SIZE"):
        if name not in os.environ:
            raise InputError(f"{name}: not set, although {given[0]} is {os.environ[given[0]]}; expected both, or none")
    rank, size = number("RANK"), number("WORLD_SIZE")
    if rank >= size:
        raise InputError(f"RANK: found {rank}, but WORLD_SIZE is {size}; expected 0 to {size - 1}")
    if size > 1 and "LOCAL_RANK" not in os.environ:
        raise InputError(
            f"LOCAL_RANK: not set, although WORLD_SIZE is {size}; expected the number of this process among those of "
            "its machine, as torchrun sets it"
        )


def number(name: str) -> int:
    """Return the value of a variable.

    Raises:
        InputError: it is no number.
    """
    text = os.environ[name]
    if not text.isdecimal():
        del os.environ[name]  # so that this process can end by itself
        raise InputError(f"{name}: found {text!r}, expected a number")
    return int(text)


def agree(name: str, found: str, expected: str, whose: str) -> None:
    if found != expected:
        raise InputError(f"{name}: found {found}, expected {expected}, as {whose} says, or {name} not set")
