"""Compare pairs per second of two processes (ZeRO-2, gloo) with one process. Each process is pinned to a core.

    IRLFAST_DATA=DATA pytest benchmarks/test_scaling.py    # DATA/hh_harmless_test.jsonl

Both contenders take the same steps on the same pairs, and their first losses must agree. They take turns, and the
median over the turns counts, because the load of a machine changes. Pairs per second of wall time mean something only
on a quiet machine. Pairs per CPU second of the slower process leave out all waiting. A missed goal fails no test.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conftest import ROOT, write_result
from benchmarks.test_throughput import BATCH, QUICK, SEEN, SHAPE, VOCABULARY, contend_in_forks, hh, ids_of, make_models

PAIRS, STEPS, ROUNDS = 64, 4, 5  # pairs per step, over all processes; the first step warms up
GOAL = 1.7
CONTENDERS = {"one": 1, "two": 2}  # processes
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")


def train(folder: Path, processes: int, shape: dict[str, int], batch: int) -> dict[str, Any]:
    """Train by a number of processes, and return the report of the first (see benchmarks/throughput.py)."""
    (folder / "workload.json").write_text(json.dumps({"batch": batch, "keys": {"zero_stage": 2}}))
    if shape is QUICK:
        return contend_in_forks(folder, "irlfast", processes)
    command = [*TORCHRUN, "--nproc-per-node", str(processes), "-m", "benchmarks.throughput", str(folder), "irlfast"]
    alone = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "THP_MEM_ALLOC_ENABLE": "1",
    }
    done = subprocess.run(command, cwd=ROOT, env=os.environ | alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def rates(runs: list[dict[str, Any]], clock: str, pairs: int) -> list[float]:
    """Return pairs per second of every run."""
    return [pairs * (len(run[clock]["steps"]) - 1) / sum(run[clock]["steps"][1:]) for run in runs]


def compare(folder: Path, pairs: list[list[list[int]]], shape: dict[str, int], batch: int, rounds: int) -> dict:
    make_models(folder, shape, VOCABULARY if shape is SHAPE else 300)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, done in runs.items():
            done.append(train(folder, CONTENDERS[name], shape, batch))
    result: dict[str, Any] = {"pairs_per_second": {}, "times": {}, "runs": runs}
    for clock in ("seconds", "cpu_seconds"):
        one, two = (rates(runs[name], clock, batch) for name in CONTENDERS)
        result["pairs_per_second"][clock] = {"one": statistics.median(one), "two": statistics.median(two)}
        result["times"][clock] = statistics.median(b / a for a, b in zip(one, two, strict=True))
    return result


def check_losses(runs: dict[str, list[dict[str, Any]]]) -> None:
    first, *others = (reports[0]["loss"] for reports in runs.values())
    assert others == pytest.approx([first] * len(others), rel=1e-4)


def test_two_processes_against_one(pytestconfig, tmp_path, data):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    quick = pytestconfig.getoption("quick")
    shape, batch, steps, rounds = (QUICK, BATCH, 2, 1) if quick else (SHAPE, PAIRS, STEPS, ROUNDS)
    pairs = ids_of(hh(data, 2000)[SEEN:], VOCABULARY if shape is SHAPE else 300)[: steps * batch]
    load = os.getloadavg()[0]
    result = compare(tmp_path, pairs, shape, batch, rounds)
    check_losses(result["runs"])
    goal = {"what": "two processes", "measured": result["times"]["seconds"], "limit": GOAL}
    goal["met"] = goal["measured"] >= GOAL
    write_result("scaling", {"load_before": load, "shape": shape, **result, "goals": [goal]})
    print(result["pairs_per_second"], result["times"], goal, f"load before {load}", sep="\n")
