"""The rates of a machine, measured: by a finished or running run on it, or by short tests of this machine."""

import itertools
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
from irlfast.common.files import InputError, read_json
from irlfast.common.logs import read_log
from irlfast.common.messages import first_sentence
from irlfast.common.yaml_text import parse_yaml
from irlfast.config import Config
from irlfast.config.read import make_config
from irlfast.data.store import Examples, load_examples
from irlfast.methods import METHODS
from irlfast.runs.metrics_log import is_logged, kind_of
from irlfast.startup.plan_memory import TRAINING_MOMENTS, Room, most, zero_of
from irlfast.startup.plan_run import Planned, plan_run, work_on
from irlfast.startup.plan_seconds import TRAINING, Lengths, Rates, bytes_sent, sampling_seconds, updated_bytes
from irlfast.startup.sizes import Size, bytes_of, model_size

FILES = ("config.yaml", "starts.jsonl", "metrics.jsonl", "data/train.safetensors")  # of a run, that are read here
COLUMNS = {  # of a row of metrics.jsonl, that are read here
    *("seconds", "tokens_per_second", "answer_tokens_per_second", "tflops", "memory_gib"),
    *("time/forward", "time/backward", "time/optimizer", "time/communication"),
}
HOOKS = 0.02  # assumed seconds per layer and pass that the hooks of ZeRO-3 take on a CPU (benchmarks/plans.py)
WARM_UP = 2  # first steps of a phase, which are slow: by ZeRO-3, 2.0 and 1.5 times as long as later (docs/scaling.md)
LOOPBACK = 0.1  # assumed share of a CPU's copying rate that gloo reaches between processes of one machine


# ---------------------------------------------------------------- a run


class Measured(NamedTuple):
    """A run by which a plan is calibrated."""

    config: Config
    size: Size
    processes: int
    on_gpu: bool
    rows: list[dict[str, Any]]  # of metrics.jsonl, of the policy's phases
    train: Examples


def read_run(folder: Path) -> Measured:
    """Read the configuration, the metrics and the data of a run.

    Raises:
        InputError: the folder is no run, or the run has not logged a step after the first ones.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"--calibrate {folder}: found no {missing[0]}, expected the folder of a run that has trained")
    try:
        config = make_config(parse_yaml((folder / "config.yaml").read_text(encoding="utf-8")))
        rows = [row for row in read_log(folder / "metrics.jsonl", is_logged)[0] if row.keys() >= COLUMNS]
        start = read_log(folder / "starts.jsonl", lambda row: type(row.get("processes")) is int)[0][-1]
        size = model_size(config, config.train_tokenizer)
        train = load_examples(folder / "data" / "train.safetensors")
    except Exception as error:  # of any class: the files of another program may hold anything
        reason = first_sentence(error) or type(error).__name__
        raise InputError(f"--calibrate {folder}: is not the folder of a run ({reason})") from error
    rows = [row for row in rows if kind_of(row["phase"], config.method) != "reward"]
    if size is None or len(rows) < 2:
        raise InputError(
            f"--calibrate {folder}: found {len(rows)} rows of a policy in metrics.jsonl, expected at least 2, and a "
            "model's config"
        )
    on_gpu = not str(start.get("device")).endswith(" cores")
    return Measured(config, size, start["processes"], on_gpu, rows, train)


def rates_of_run(folder: Path, assumed: Rates, processes: int, on_gpu: bool) -> Rates:
    """Return the rates that a run reached; the ``assumed`` ones where it has no figure.

    The rates of training are medians over the logged rows, without the warm-up of each phase (:func:`warm_rows`). The
    processes of a CPU share its cores, so that each of twice as many computes and copies half as fast.

    Raises:
        InputError: the folder is no run, or the run was not on a GPU as the plan is, or not on a CPU.
    """
    run = read_run(folder)
    if run.on_gpu != on_gpu:
        found, expected = ("GPU", "CPU") if run.on_gpu else ("CPU", "GPU")
        raise InputError(
            f"--calibrate {folder}: found a run on a {found}, expected one on a {expected}, as the plan is"
        )
    rows = warm_rows(run.rows)
    share = 1.0 if on_gpu else run.processes / processes
    planned, waits = planned_of(run), [hook_seconds(run, row) for row in rows or run.rows]
    passes = 3 if run.config.gradient_checkpointing is True else 2
    training = [
        training_rate(row, run.config, run.size, run.processes, passes * wait)
        for row, wait in zip(rows or run.rows, waits, strict=True)
    ]
    rates = assumed._replace(
        training=share * statistics.median(training),
        source=f"measured in {folder}, with {run.processes} process{'es' * (run.processes > 1)}",
    )
    if rows:
        rates = rates._replace(memory=share * statistics.median(moved_per_second(run, row) for row in rows))
    # One process sends nothing, though the clock of its reductions runs. On GPUs all of the time may be overlapped.
    if sending := [row for row in rows if row["time/communication"] > 0 and run.processes > 1]:
        rates = rates._replace(link=share * statistics.median(sent_per_second(run, row) for row in sending))
    if not on_gpu:
        rates = rates._replace(runtime=runtime_of(run, planned))
    if any(waits):
        seconds = {phase.name: phase.step["gathering"] / passes for phase in planned.phases}  # per second of hooks
        own = [
            wait / seconds[row["phase"]] / steps_of(row, run.rows)
            for row, wait in zip(rows or run.rows, waits, strict=True)
        ]
        rates = rates._replace(hooks=statistics.median(own) / share)
    return rates._replace(sampling=sampling_factor(folder, run, rates))


def warm_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of metrics that begin after the warm-up of their phase; if there are none, all but its first."""
    later = [both for both in itertools.pairwise(rows) if both[0]["phase"] == both[1]["phase"]]
    warm = [row for before, row in later if before["step"] >= WARM_UP]
    return warm or [row for _, row in later]


def planned_of(run: Measured) -> Planned:
    """Plan a run as it was, with hooks of a second, and of no other rate."""
    room = Room(0.0, run.processes, run.on_gpu, runtime=0.0)
    return plan_run(run.config, run.size, room, Rates(1.0, 1.0, 1.0, hooks=1.0), work_on(run.config, run.train, 0, 0))


def runtime_of(run: Measured, planned: Planned) -> float:
    """Return the bytes that the libraries took in a run on a CPU: what it had beside the tensors of its fullest moment.

    The memory that is logged after a step is about that of its fullest moment, as malloc keeps what is freed.
    """
    tensors = most({moment: planned.memory[moment] for moment in TRAINING_MOMENTS})
    return max(0.0, max(row["memory_gib"] for row in run.rows) * 2**30 - tensors)


def operations_of(row: dict[str, Any], config: Config, size: Size, processes: int) -> tuple[float, float]:
    """Return the operations of a process's forward passes, and of its backward passes, which may compute layers again.

    ``tflops`` of a row of metrics counts no layer twice.
    """
    done = row["tflops"] * 1e12 * row["seconds"]
    tokens, answers = (
        row[name] * row["seconds"] / processes for name in ("tokens_per_second", "answer_tokens_per_second")
    )
    attended = (done - size.costs.token * tokens - size.costs.answer_token * answers) / 3
    forward = size.forward * tokens + attended + 2 * size.vocabulary * size.hidden * answers
    again = size.forward * tokens + attended if config.gradient_checkpointing is True else 0.0
    return forward, done - forward + again


def training_rate(row: dict[str, Any], config: Config, size: Size, processes: int, waited: float = 0.0) -> float:
    """Return the operations per second of the forward and backward passes of a row of metrics.

    ``waited`` seconds of them went to hooks.
    """
    spent = row["seconds"] * (row["time/forward"] + row["time/backward"])
    return sum(operations_of(row, config, size, processes)) / (spent - waited)


def hook_seconds(run: Measured, row: dict[str, Any]) -> float:
    """Return the seconds that a process spent in the hooks of ZeRO-3's forward passes; 0 without ZeRO-3, or on a GPU.

    Hooks take the same time in each pass. So the rate follows from what a backward pass takes longer than the forward
    passes in it, and the hooks take what the rate does not explain.
    """
    if run.on_gpu or zero_of(run.config, run.processes)["stage"] != 3:
        return 0.0
    forward, backward = (row["seconds"] * row[f"time/{part}"] for part in ("forward", "backward"))
    done, more = operations_of(row, run.config, run.size, run.processes)
    passes = 2 if run.config.gradient_checkpointing is True else 1  # of a backward pass, in which weights are gathered
    if backward <= passes * forward:
        return 0.0
    return max(0.0, forward - done * (backward - passes * forward) / (more - passes * done))


def steps_of(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> int:
    """Return how many steps a row of metrics stands for."""
    earlier = [each["step"] for each in rows if each["phase"] == row["phase"] and each["step"] < row["step"]]
    return row["step"] - max(earlier, default=0)


def moved_per_second(run: Measured, row: dict[str, Any]) -> float:
    """Return the bytes per second that the optimiser read and wrote."""
    optim = run.config.sft_optim or run.config.optim if row["phase"].startswith("sft") else run.config.optim
    moved = updated_bytes(run.config, run.size, run.processes, optim)
    return moved * steps_of(row, run.rows) / (row["seconds"] * row["time/optimizer"])


def sent_per_second(run: Measured, row: dict[str, Any]) -> float:
    """Return the bytes per second that a process sent, with a reduction per step as on a CPU."""
    stage = zero_of(run.config, run.processes)["stage"]
    sent = bytes_sent(stage, run.processes, 1, run.size, bytes_of(run.config), run.on_gpu)
    return sent * steps_of(row, run.rows) / (row["seconds"] * row["time/communication"])


def sampling_factor(folder: Path, run: Measured, rates: Rates) -> float:
    """Return the seconds of sampling that the run took per second of the model's; 1 where nothing was sampled.

    Answers that were sampled beside training (``async_sampling``) are left out: their seconds are a wait.
    """
    factors = []
    for phase in METHODS[run.config.method].phases(run.config, len(run.train)):
        path = folder / phase.name / "pairs.json"
        counts = read_json(path) if intact(path) else {}
        waited = counts.get("sampling/staleness")
        if phase.sampled and counts.get("synthetic_tokens") and counts.get("sample_seconds") and not waited:
            prompt, answer = (float(n) for n in run.train.lengths[:, :2].mean(0))
            lengths = Lengths(prompt, answer, counts["synthetic_tokens"] / phase.sampled)
            room = Room(0.0, run.processes, run.on_gpu, runtime=0.0)
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
        hooks=0.0 if on_gpu else HOOKS / share,
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
