"""What compiling layers, and recomputing them in the backward pass, cost and save in a training step of irlfast.

    IRLFAST_DATA=DATA pytest benchmarks/test_ways.py -s    # DATA/hh_harmless_test.jsonl

Every way trains in a process of its own on the same pairs, in turn; first losses must agree. CPU seconds of a step, the
first two left out; what those took more than two others is the start.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conftest import write_result
from benchmarks.test_throughput import BATCH, QUICK, SEEN, SHAPE, VOCABULARY, contend, hh, ids_of, make_models

STEPS, TOKENS, ROUNDS = 8, 4096, 2  # more tokens a pass than a CPU needs, so that layers' activations weigh
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
        for way, found in runs.items():
            workload = {"batch": BATCH, "keys": {"max_tokens_per_batch": TOKENS} | WAYS[way]}
            (folder / "workload.json").write_text(json.dumps(workload))
            found.append(contend(folder, "irlfast"))
    return {way: figures(found) | {"runs": found} for way, found in runs.items()}


def check_losses(ways: dict[str, Any]) -> None:
    for found in ways.values():
        assert found["runs"][0]["loss"] == pytest.approx(ways["plain"]["runs"][0]["loss"], rel=1e-5)


def figures(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over runs."""
    steps = [run["cpu_seconds"]["steps"] for run in runs]
    later = [statistics.mean(seconds[2:]) for seconds in steps]
    start = [sum(seconds[:2]) - 2 * mean for seconds, mean in zip(steps, later, strict=True)]
    return {
        "cpu_seconds_a_step": statistics.median(later),
        "cpu_seconds_of_the_start": statistics.median(start),
        "peak_mib": statistics.median(run["mib"] for run in runs),
    }


def test_ways(pytestconfig, tmp_path, data):
    shape, steps, rounds = (QUICK, 3, 1) if pytestconfig.getoption("quick") else (SHAPE, STEPS, ROUNDS)
    pairs = ids_of(hh(data, 2000)[SEEN:], VOCABULARY if shape is SHAPE else 300)[: steps * BATCH]
    found = compare(tmp_path, pairs, shape, rounds)
    check_losses(found)
    write_result("ways", {"shape": shape, "max_tokens_per_batch": TOKENS, "ways": found})
    for way, row in found.items():
        print(way, {key: round(value, 2) for key, value in row.items() if key != "runs"})
