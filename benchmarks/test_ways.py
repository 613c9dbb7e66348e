"""Measure compiled layers and gradient checkpointing in a training step of irlfast: seconds and memory.

    IRLFAST_DATA=DATA pytest benchmarks/test_ways.py -s    # DATA/hh_harmless_test.jsonl

The ways take turns, each in its own process, on the same pairs; their first losses must agree. The CPU seconds of a
step leave out the first two steps. The extra time of these two is the cost of the start.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conftest import write_result
from benchmarks.test_throughput import BATCH, QUICK, SEEN, SHAPE, VOCABULARY, contend, hh, ids_of, make_models

STEPS, TOKENS, ROUNDS = 8, 4096, 2  # more tokens per pass than a CPU needs, so that the layers' activations weigh
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "torch_compile": {"torch_compile": True},
    "gradient_checkpointing: selective": {"gradient_checkpointing": "selective"},
    "gradient_checkpointing: true": {"gradient_checkpointing": True},
}


def compare(folder: Path, pairs: list[list[list[int]]], shape: dict[str, int], rounds: int) -> dict[str, Any]:
    make_models(folder, shape, VOCABULARY if shape is SHAPE else 300)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, reports in runs.items():
            workload = {"batch": BATCH, "keys": {"max_tokens_per_batch": TOKENS} | WAYS[way]}
            (folder / "workload.json").write_text(json.dumps(workload))
            reports.append(contend(folder, "irlfast", shape))
    return {way: medians(reports) | {"runs": reports} for way, reports in runs.items()}


def check_losses(ways: dict[str, Any]) -> None:
    for way in ways.values():
        assert way["runs"][0]["loss"] == pytest.approx(ways["plain"]["runs"][0]["loss"], rel=1e-5)


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return medians over runs."""
    steps = [run["cpu_seconds"]["steps"] for run in runs]
    later = [statistics.mean(seconds[2:]) for seconds in steps]
    start = [sum(seconds[:2]) - 2 * mean for seconds, mean in zip(steps, later, strict=True)]
    return {
        "cpu_seconds_per_step": statistics.median(later),
        "cpu_seconds_of_the_start": statistics.median(start),
        "peak_mib": statistics.median(run["mib"] for run in runs),
    }


def test_ways(pytestconfig, tmp_path, data):
    shape, steps, rounds = (QUICK, 3, 1) if pytestconfig.getoption("quick") else (SHAPE, STEPS, ROUNDS)
    pairs = ids_of(hh(data, 2000)[SEEN:], VOCABULARY if shape is SHAPE else 300)[: steps * BATCH]
    ways = compare(tmp_path, pairs, shape, rounds)
    check_losses(ways)
    write_result("ways", {"shape": shape, "max_tokens_per_batch": TOKENS, "ways": ways})
    for way, row in ways.items():
        print(way, {key: round(value, 2) for key, value in row.items() if key != "runs"})
