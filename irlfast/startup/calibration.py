"""The rates of a machine, measured: by a finished or running run on it, or by short tests of this machine."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from irlfast.common import dist
from irlfast.common.artefacts import intact
from irlfast.common.files import InputError, read_json, read_jsonl
from irlfast.common.logs import read_log
from irlfast.common.yaml_text import parse_yaml
from irlfast.config import Config
from irlfast.config.read import make_config
from irlfast.data.store import Examples, load_examples
from irlfast.methods import METHODS
from irlfast.runs.metrics_log import is_logged
from irlfast.startup.plan_memory import Room, training_memory, zero_of
from irlfast.startup.plan_seconds import TRAINING, Lengths, Rates, bytes_sent, sampling_seconds, updated_bytes
from irlfast.startup.sizes import Size, bytes_of, model_size

LOOPBACK = 0.1  # assumed share of a CPU's copying rate that gloo reaches between processes of one machine


# ---------------------------------------------------------------- a run


class Measured(NamedTuple):
    """A run by which a plan is calibrated."""

    config: Config
    size: Size
    processes: int
    rows: list[dict[str, Any]]  # of metrics.jsonl
    train: Examples


def read_run(folder: Path) -> Measured:
    """Read the configuration, the metrics and the data of a run.

    Raises:
        InputError: the folder is no run, or the run has not logged a step after the first ones.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"--calibrate {folder}: found no config.yaml, expected the folder of a run")
    config = make_config(parse_yaml(path.read_text(encoding="utf-8")))
    rows = read_log(folder / "metrics.jsonl", is_logged)[0]
    size = model_size(config, config.train_tokenizer)
    starts = [row for _, row in read_jsonl(folder / "starts.jsonl")]
    if size is None or len(rows) < 2:
        raise InputError(
            f"--calibrate {folder}: found {len(rows)} rows in metrics.jsonl, expected at least 2, and a model's config"
        )
    return Measured(config, size, starts[-1]["processes"], rows, load_examples(folder / "data" / "train.safetensors"))


def rates_of_run(folder: Path, assumed: Rates) -> Rates:
    """Return the rates that a run reached; the ``assumed`` ones where it has no figure.

    The rates of training are medians over the logged rows, without the first row of each phase.
    """
    run = read_run(folder)
    rows = [row for row, before in zip(run.rows[1:], run.rows, strict=False) if row["phase"] == before["phase"]]
    training = statistics.median(map(training_rate, rows or run.rows))
    rates = assumed._replace(
        training=training,
        memory=statistics.median(moved_per_second(run, row, run.rows) for row in rows) if rows else assumed.memory,
        source=f"measured in {folder}, with {run.processes} process{'es' * (run.processes > 1)}",
    )
    if run.processes > 1 and rows:
        rates = rates._replace(link=statistics.median(sent_per_second(run, row, run.rows) for row in rows))
    if not torch.cuda.is_available():
        room = Room(0.0, run.processes, on_gpu=False, runtime=0.0)
        held = training_memory(run.config, run.size, room, 0)["update"]
        kept = sum(held[part] for part in ("weights", "teacher", "optimiser state"))
        rates = rates._replace(runtime=max(row["memory_gib"] for row in run.rows) * 2**30 - kept)
    return rates._replace(sampling=sampling_factor(folder, run, rates))


def training_rate(row: dict[str, Any]) -> float:
    """Return the operations per second of the forward and backward passes of a row of metrics."""
    return row["tflops"] * 1e12 / (row["time/forward"] + row["time/backward"])


def steps_of(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> int:
    """Return how many steps a row of metrics stands for."""
    earlier = [each["step"] for each in rows if each["phase"] == row["phase"] and each["step"] < row["step"]]
    return row["step"] - max(earlier, default=0)


def moved_per_second(run: Measured, row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float:
    """Return the bytes per second that the optimiser read and wrote."""
    optim = run.config.sft_optim or run.config.optim if row["phase"].startswith("sft") else run.config.optim
    moved = updated_bytes(run.config, run.size, run.processes, optim)
    return moved * steps_of(row, rows) / (row["seconds"] * row["time/optimizer"])


def sent_per_second(run: Measured, row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float:
    """Return the bytes per second that a process sent, with a reduction per step as on a CPU."""
    each = bytes_of(run.config)
    stage, weights = zero_of(run.config, run.processes)["stage"], each * run.size.parameters
    sent = bytes_sent(stage, run.processes, 1, weights, each * run.size.trained, torch.cuda.is_available())
    return sent * steps_of(row, rows) / (row["seconds"] * row["time/communication"])


def sampling_factor(folder: Path, run: Measured, rates: Rates) -> float:
    """Return the seconds of sampling that the run took per second of the model's; 1 where nothing was sampled."""
    factors = []
    for phase in METHODS[run.config.method].phases(run.config, len(run.train)):
        path = folder / phase.name / "pairs.json"
        counts = read_json(path) if intact(path) else {}
        if phase.sampled and counts.get("synthetic_tokens") and counts.get("sample_seconds"):
            prompt, answer = (float(n) for n in run.train.lengths[:, :2].mean(0))
            lengths = Lengths(prompt, answer, counts["synthetic_tokens"] / phase.sampled)
            room = Room(0.0, run.processes, on_gpu=torch.cuda.is_available(), runtime=0.0)
            planned = sampling_seconds(run.config, run.size, room, rates, lengths, phase.sampled, float("inf"))
            factors.append(counts["sample_seconds"] / planned)
    return statistics.median(factors) if factors else 1.0


# ---------------------------------------------------------------- this machine


def room_here(processes: int) -> Room:
    """Return what this machine has for each of its processes."""
    own = float(psutil.Process().memory_info().rss)
    if torch.cuda.is_available():
        return Room(float(torch.cuda.get_device_properties(0).total_memory), processes, on_gpu=True, runtime=2e9)
    return Room(psutil.virtual_memory().available / processes, processes, on_gpu=False, runtime=own)


def rates_here(config: Config, processes: int) -> Rates:
    """Measure a matrix product and a copy on this machine. Processes share a CPU's cores."""
    on_gpu = torch.cuda.is_available()
    share = 1.0 if on_gpu else min(1.0, (os.cpu_count() or 1) / (processes * torch.get_num_threads()))
    copied = copy_rate() * share
    return Rates(
        training=matrix_rate(config) * share,
        memory=copied,
        link=LOOPBACK * copied,
        start=60.0,
        source=f"{TRAINING:.0%} of a matrix product's operations on this machine",
    )


def matrix_rate(config: Config, size: int = 2048) -> float:
    """Return the operations per second that training may reach: a share of those of a square matrix product."""
    matrix = torch.randn(size, size, dtype=getattr(torch, config.dtype), device=dist.device())
    return TRAINING * 2 * size**3 / quickest(lambda: (matrix @ matrix)[0, 0].item())


def copy_rate(size: int = 2**26) -> float:
    """Return the bytes per second that a copy in memory reads and writes."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=dist.device()) for _ in range(2))
    return 2 * size / quickest(lambda: target.copy_(source)[0].item())


def quickest(work: Callable[[], Any], times: int = 3) -> float:
    """Return the seconds of the quickest of a few calls."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
