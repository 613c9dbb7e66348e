"""Runs of the real commands, small enough for a test."""

import gc
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path

ROOT = Path(__file__).parents[2]
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the commands have it before they import torch
# A server process imports these modules once, and every run is a fork of it: half of a small run's time is imports.
PRELOADED = (
    *(f"irlfast.{name}" for name in ("data.leaks", "evaluation.heldout", "methods", "reports.final")),
    "irlfast.startup.prepare",
    *("deepspeed", "tests.helpers.vega", "peft", "sklearn.linear_model", "transformers.models.llama.modeling_llama"),
)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([*PRELOADED, "bitsandbytes"])  # the last only where it is installed
PORT = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")  # any that is free
PYTHON = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *PORT)
DEMO = {"config_name": "irlfast/demo/config.json"}  # a larger model, which learns more
SMALL = {
    "config_name": "tests/helpers/small.json",
    "train_tokenizer": 300,
    "dataset_name": "irlfast/demo/train.jsonl",
    "eval_dataset_name": "irlfast/demo/test.jsonl",
    "max_train_samples": 96,
    "max_eval_samples": 24,
    "max_prompt_length": 64,
    "max_length": 96,
    "max_new_tokens": 12,
    "sft_steps": 6,
    "sft_learning_rate": 1e-3,
    "sft_optim": "adamw_torch",
    "stages": 2,
    "inner_steps": 4,
    "learning_rate": 1e-5,
    "beta": 0.5,
    "global_batch_size": 8,
    "logging_steps": 2,
    "save_steps": 2,
}


def command(output: Path, **keys) -> list[str]:
    return ["-m", "irlfast.train", *settings(output, **keys)]


def settings(output: Path, **keys) -> list[str]:
    pairs = {**SMALL, "output_dir": str(output), **keys}
    return [f"{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in pairs.items()]


def as_torchrun(count: int) -> list[dict[str, str]]:
    """The variables that torchrun gives each of its processes."""
    several = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [several | {"RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(count))]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


class Forked:
    """``python ARGUMENTS`` in forks of a process that has imported what runs do: one, or several.

    ``variables`` are those that each process gets from its launcher (default: as torchrun has it).
    """

    def __init__(self, arguments: list[str], count: int = 1, variables: Sequence[dict[str, str]] = ()):
        self.folder = tempfile.TemporaryDirectory()
        self.processes = []
        for own in variables or (as_torchrun(count) if count > 1 else [{}]):
            given = arguments, os.environ | own, Path(self.folder.name)
            self.processes.append(SERVER.Process(target=forked, args=given))
            self.processes[-1].start()

    def wait(self, timeout: float) -> tuple[int, str, str]:
        """The exit code of the first that failed, and what all printed; those that still run are killed then."""
        end, left = time.monotonic() + timeout, self.processes
        while left and not self.failed() and connection.wait([each.sentinel for each in left], end - time.monotonic()):
            left = [process for process in left if process.is_alive()]
        failed = self.failed()
        for process in left:
            process.kill()
            process.join()
        printed = (Path(self.folder.name, name).read_text() for name in ("out", "err"))
        return [*failed, *self.failed(), 0][0], *printed

    def failed(self) -> list[int]:
        return [process.exitcode for process in self.processes if process.exitcode]


def forked(arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    for descriptor, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    import torch

    gc.freeze()  # or every `gc.collect()` of a run takes half a second to look at the imported modules
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = arguments[arguments[0] == "-m" :]
    if arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def run_killed_at(output: Path, moments: Sequence[str], **keys) -> None:
    """Start a run and kill it at ``moments``; see :func:`kill_at`."""
    kill_at(output, moments, command(output, **keys))


def kill_at(output: Path, moments: Sequence[str], arguments: list[str], processes: int = 1) -> None:
    """Run ``python ARGUMENTS`` and kill it as soon as the first of ``moments`` exists: a file or folder of its output.

    Then run it again and kill it at the next one, until it was killed once at each.
    """
    for moment in moments:
        assert not (output / moment).exists(), f"{moment}: the run has passed it"
        run = Forked(arguments, processes)
        while not (output / moment).exists():
            assert run.processes[0].is_alive(), run.wait(0)
            time.sleep(0.002)
        run.wait(0)
    assert not (output / "final").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(output: Path, how: int | tuple[str, ...] = 1, code: int = 0, **keys) -> tuple[str, str]:
    """Train, and return what it printed; see :func:`printed`."""
    return printed(command(output, **keys), how, code)


def printed(arguments: list[str], how: int | tuple[str, ...] = 1, code: int = 0) -> tuple[str, str]:
    """Run ``python ARGUMENTS`` to its end with ``code``, and return what it printed; see :func:`ended`."""
    exit_code, out, err = ended(arguments, how)
    assert exit_code == code, out + err
    return out, err


def ended(arguments: list[str], how: int | tuple[str, ...] = 1) -> tuple[int, str, str]:
    """The exit code of ``python ARGUMENTS``, and what it printed.

    ``how`` is the number of processes, which are forked, or what starts it in earnest: ``PYTHON`` or ``TORCHRUN``.
    """
    if isinstance(how, int):
        return Forked(arguments, how).wait(600)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([*how, *arguments], **options)
    return done.returncode, done.stdout, done.stderr
