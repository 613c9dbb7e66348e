"""Runs of the real commands, small enough for a test."""

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from irlfast import bon, train
from irlfast.command import exit_code
from irlfast.data import select

ROOT = Path(__file__).parent.parent
# A process that has imported what every run does, and is forked for each: half of a small run's time is imports.
SERVER = multiprocessing.get_context("forkserver")
OURS = ("bon", "data.select", "engine", "final", "leaks", "methods.irft", "methods.rft", "prepare", "report")
THEIRS = ("deepspeed", "matplotlib.pyplot", "sklearn.linear_model", "transformers.models.llama.modeling_llama")
SERVER.set_forkserver_preload([*(f"irlfast.{name}" for name in OURS), *THEIRS])
PORT = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")  # any that is free
MAINS = {
    "irlfast.train": train.main,
    "irlfast.bon": functools.partial(exit_code, bon.command),
    "irlfast.data.select": functools.partial(exit_code, select.command),
}
PYTHON = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *PORT)
SMALL = {
    "config_name": "irlfast/demo/config.json",
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
    "per_device_train_batch_size": 8,
    "logging_steps": 2,
    "save_steps": 2,
}


def command(output: Path, **keys) -> list[str]:
    return ["-m", "irlfast.train", *arguments(output, **keys)]


def arguments(output: Path, **keys) -> list[str]:
    pairs = {**SMALL, "output_dir": str(output), **keys}
    return [f"{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in pairs.items()]


def start(arguments: list[str], launcher: tuple[str, ...] = PYTHON) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


class Forked:
    """``python -m module`` with these arguments, in a fork of a process that has imported what it imports."""

    def __init__(self, module: str, given: list[str]):
        self.folder = tempfile.TemporaryDirectory()
        self.process = SERVER.Process(target=forked, args=(module, given, dict(os.environ), self.folder.name))
        self.process.start()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.process.join(timeout)
        self.process.kill()  # or pytest would wait for one that hangs
        self.process.join()
        return tuple(Path(self.folder.name, name).read_text() for name in ("out", "err"))

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode


def forked(module: str, given: list[str], environment: dict[str, str], folder: str) -> None:
    for descriptor, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [module, *given]
    sys.exit(MAINS[module]())


def run_killed_at(output: Path, moment: str, **keys) -> None:
    """Start a run and kill it as soon as the file or folder ``moment`` of its output exists."""
    run = Forked("irlfast.train", arguments(output, **keys))
    while not (output / moment).exists():
        assert run.process.is_alive(), run.communicate()
        time.sleep(0.002)
    run.process.kill()
    run.communicate()
    assert not (output / "final").exists()


def resumed_bytes(output: Path, moment: str, **keys) -> dict[str, bytes]:
    """``final/`` of a run that was killed at ``moment`` and started again."""
    run_killed_at(output, moment, **keys)
    run(output, **keys)
    return contents(output / "final")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(output: Path, launcher: tuple[str, ...] = (), code: int = 0, **keys) -> tuple[str, str]:
    """What training printed; see :func:`printed`."""
    return printed("irlfast.train", arguments(output, **keys), launcher, code)


def printed(module: str, given: list[str], launcher: tuple[str, ...] = (), code: int = 0) -> tuple[str, str]:
    """What a command printed before it ended with ``code``: forked, or as ``launcher`` starts it."""
    process = start(["-m", module, *given], launcher) if launcher else Forked(module, given)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, out + err
    return out, err
