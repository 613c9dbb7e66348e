"""Start a run so that any part of it can be killed: one process, two of a launcher, or a sampler's child."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.runs import ROOT, SERVER, TORCHRUN, forked

MARK = "IRLFAST_STARTED_AS"  # a variable that every process of a start has, with a value of its own
PATIENCE = 30.0  # seconds in which all processes of a killed run end
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


class Start:
    """One start of ``python ARGUMENTS``, in a session of its own.

    ``how`` is "1 process"; "2 processes", by torchrun's agent in forks of a process that has imported what runs do; or
    "torchrun" itself. The agent of two processes starts them anew up to ``restarts`` times.
    """

    def __init__(self, how: str, arguments: list[str], folder: Path, restarts: int = 0):
        self.how, self.folder, self.mark = how, folder, uuid.uuid4().hex
        temporary = folder / "temporary"
        temporary.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), MARK: self.mark}
        for name in ("out", "err"):
            (folder / name).write_text("")
        if how == "torchrun":
            with (folder / "out").open("a") as out, (folder / "err").open("a") as err:
                options: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": out, "stderr": err}
                options |= {"start_new_session": True, "preexec_fn": hear_signals}
                self.process: Any = subprocess.Popen([*TORCHRUN, *arguments], **options)
        else:
            target, more = (alone, ()) if how == "1 process" else (launcher, (restarts,))
            self.process = SERVER.Process(target=target, args=(arguments, environment, folder, *more))
            self.process.start()

    def code(self) -> int | None:
        """The exit code of the process, or of the launcher; None while it runs."""
        return self.process.poll() if self.how == "torchrun" else self.process.exitcode

    def printed(self) -> str:
        return (self.folder / "err").read_text(errors="replace")

    def launcher(self) -> list[psutil.Process]:
        return [each for each in self.alive() if each.pid == self.process.pid]

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, in the order of their start."""
        if self.how == "1 process":
            return self.launcher()
        children = (child for parent in self.launcher() for child in living(parent.children))
        return sorted((child for child in children if trains(child)), key=lambda child: child.pid)

    def samplers(self) -> list[psutil.Process]:
        return [process for process in self.alive() if "vllm_worker.py" in " ".join(living(process.cmdline))]

    def alive(self) -> list[psutil.Process]:
        """All processes of this start, orphans included: those of its session, and those with its mark."""
        return [process for process in living(psutil.process_iter) if self.owns(process)]

    def owns(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return os.getsid(process.pid) == self.process.pid or process.environ().get(MARK) == self.mark
        except (psutil.Error, OSError):  # it has ended, or is of another user
            return False

    def gone(self, seconds: float = PATIENCE) -> bool:
        """Wait until all processes have ended, and return whether they did so in time."""
        return until(lambda: self.code() is not None and not self.alive(), seconds, pause=0.05)

    def clear(self) -> None:
        """Kill all processes that are left."""
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait() if self.how == "torchrun" else self.process.join()


def warm() -> None:
    """Have the server import what runs do, so that the first start takes as long as the others."""
    process = SERVER.Process(target=int)
    process.start()
    process.join()


def living(ask: Callable) -> list:
    """Return what ``ask`` returns of a process; nothing if the process has ended."""
    try:
        return list(ask())
    except psutil.Error:
        return []


def trains(process: psutil.Process) -> bool:
    return not any("resource_tracker" in word for word in living(process.cmdline))


def until(condition: Callable[[], Any], seconds: float, pause: float = 0.001) -> bool:
    """Wait until the condition holds, and return whether it did so in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


# ---------------------------------------------------------------- in forks


def alone(arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    os.setsid()
    hear_signals()
    forked(arguments, environment, folder)


def hear_signals() -> None:
    """Have signals do what they do in a new process of a terminal: a shell has those behind "&" ignore SIGINT."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def launcher(arguments: list[str], environment: dict[str, str], folder: Path, restarts: int) -> None:
    """Run the agent of torchrun, which forks two processes of this one."""
    os.setsid()
    hear_signals()
    for descriptor, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": restarts, "start_method": "fork"}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=environment[MARK], **options)
    elastic_launch(config, rank)(arguments, folder)


def rank(arguments: list[str], folder: Path) -> None:
    """Be as a process that torchrun starts: without the launcher's handlers, and without torch's signal at its end."""
    ctypes.CDLL(None).prctl(1, 0)  # PR_SET_PDEATHSIG
    hear_signals()
    try:
        forked(arguments, dict(os.environ), folder)
    except SystemExit as end:
        if end.code:
            raise
