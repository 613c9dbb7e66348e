"""Runs of the real command, small enough for a test."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PORT = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")  # any that is free
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
    pairs = {**SMALL, "output_dir": str(output), **keys}
    return [
        "-m",
        "irlfast.train",
        *(f"{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in pairs.items()),
    ]


def start(arguments: list[str], launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_killed_at(output: Path, moment: str, **keys) -> None:
    """Start a run and kill it as soon as the file or folder ``moment`` of its output exists."""
    process = start(command(output, **keys))
    while not (output / moment).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (output / "final").exists()


def resumed_bytes(output: Path, moment: str, **keys) -> dict[str, bytes]:
    """``final/`` of a run that was killed at ``moment`` and started again."""
    run_killed_at(output, moment, **keys)
    run(output, **keys)
    return contents(output / "final")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(output: Path, launcher: tuple[str, ...] = (sys.executable,), code: int = 0, **keys) -> tuple[str, str]:
    process = start(command(output, **keys), launcher)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, out + err
    return out, err
