"""The wall time that ``async_sampling`` saves: the same run with it and without, where vLLM samples on another core.

    IRLFAST_VLLM_PYTHON=PYTHON python -m benchmarks.async_sampling [FOLDER]

The run trains on the first core of this machine; vLLM has the second one. It samples in two ways: a server, which runs
already (``vllm serve``), or the run's own vLLM, whose starts ``async_sampling`` hides as well. All runs start from one
policy, that of SFT, and the two settings take turns. The seconds are those of a whole command; ``waits`` are the
seconds in which its stages waited for answers. Other work on the machine falsifies wall time, so its load is noted; CPU
seconds bear it. Without IRLFAST_VLLM_PYTHON, and with ``--quick``, a module that is quick to start is in vLLM's place,
and no server is asked. FOLDER keeps the runs, and those in it are not run again.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks import runs
from benchmarks.conftest import ROOT, write_result
from irlfast.common.files import read_json
from tests.helpers.storm import stand_in
from tests.helpers.vllm_servers import VllmServer

DATA: dict[str, Any] = {"dataset_name": "irlfast/demo/train.jsonl", "eval_dataset_name": "irlfast/demo/test.jsonl"}
DATA |= {"max_prompt_length": 96, "max_length": 128}
SFT = {"method": "sft", "train_tokenizer": 384, "sft_steps": 200, "sft_learning_rate": 2e-3, "sft_optim": "adamw_torch"}
SFT |= {"sft_global_batch_size": 128}
KEYS = {
    "max_train_samples": 1024,
    "prompts_per_stage": "all",
    "max_eval_samples": 200,
    "max_new_tokens": 24,
    "sft_steps": 0,
    "stages": 3,
    "inner_steps": 48,
    "learning_rate": 2e-5,
    "nll_weight": 0.5,
    "use_vllm": True,
    "eval_every_stage": False,
}
WAYS: dict[str, dict[str, Any]] = {
    "async_sampling: false": {},
    "async_sampling: true": {"async_sampling": True, "async_sampling_at": 0.25},
}
FLAGS = ("--skip-tokenizer-init", "--max-model-len", "128")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of the runs (default: one that is deleted)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each setting [2]")
    parser.add_argument("--quick", action="store_true", help="few rows and a stand-in for vLLM")
    options = parser.parse_args()
    python = "" if options.quick else os.environ.get("IRLFAST_VLLM_PYTHON", "")
    repeats = 1 if options.quick else options.repeats
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        policy = first_policy(folder)
        rows = [] if not python else by_server(folder, policy, repeats)
        rows += by_own(folder, policy, python, repeats)
    result = {"keys": KEYS, "cores": len(os.sched_getaffinity(0)), "runs": rows, "medians": medians(rows)}
    print(table(result["medians"]), write_result("async-sampling", result), sep="\n")


def first_policy(folder: Path) -> Path:
    """Train the policy that all runs start from, with an LM head of its own: servers refuse shared embeddings."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = read_json(ROOT / "irlfast/demo/config.json") | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(shape))
    with on_core(0):
        runs.train(folder / "sft", **DATA, **SFT, config_name=folder / "config.json")
    return folder / "sft/final"


def by_server(folder: Path, policy: Path, repeats: int) -> list[dict[str, Any]]:
    """Run with a server of vLLM, which has answered a run before."""
    with on_core(-1):
        server = VllmServer(policy, folder / "server.log", *FLAGS)
    try:
        server.wait()
        keys = {"vllm_server": json.dumps([server.url])}
        measure(folder / "server-warm-up", policy, keys | {"stages": 1, "inner_steps": 1})
        return turns(folder, "a server", policy, keys, repeats, server.process.pid)
    finally:
        server.end(signal.SIGKILL)


def by_own(folder: Path, policy: Path, python: str, repeats: int) -> list[dict[str, Any]]:
    """Run with the run's own vLLM, which starts for each policy, on the last core."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec taskset -c {cores()[-1]} "{python or stand_in(folder / "bin")}" "$@"\n')
    script.chmod(0o755)
    return turns(folder, "its own vLLM", policy, {"vllm_python": script}, repeats)


def turns(
    folder: Path, sampler: str, policy: Path, keys: dict[str, Any], repeats: int, server: int | None = None
) -> list[dict[str, Any]]:
    """Run each setting so many times, one after the other, and return what was measured."""
    rows = []
    for number in range(repeats):
        for way, own in WAYS.items():
            output = folder / f"{sampler}-{way.split()[-1]}-{number}".replace(" ", "-")
            rows.append({"sampler": sampler, "way": way, **measure(output, policy, keys | own, server)})
            print(rows[-1])
    return rows


def measure(output: Path, policy: Path, keys: dict[str, Any], server: int | None = None) -> dict[str, Any]:
    """Run on the first core. Return wall and CPU seconds, those of waits, the staleness and the last evaluation."""
    kept = output / "measured.json"
    if kept.exists():
        return read_json(kept)
    load, begun, spent = os.getloadavg()[0], time.perf_counter(), cpu_seconds(server)
    with on_core(0):
        figures = runs.train(output, **DATA, **KEYS | {"model_name_or_path": policy} | keys)
    wall, cpu = time.perf_counter() - begun, cpu_seconds(server) - spent
    stages = [read_json(path) for path in sorted(output.glob("stage-*/pairs.json"))]
    last = figures[max(name for name in figures if name.startswith("stage-"))]
    row = {
        "wall": wall,
        "cpu": cpu,
        "waits": sum(stage["sample_seconds"] for stage in stages[1:]),
        "staleness": [stage.get("sampling/staleness", 0) for stage in stages],
        "exact_match": last["exact_match"],
        "nll": last["nll"],
        "load": load,
    }
    kept.write_text(json.dumps(row))
    return row


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


@contextlib.contextmanager
def on_core(place: int) -> Iterator[None]:
    """Within the context, start processes on one of this process's cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores()[place]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_seconds(server: int | None) -> float:
    """Return the CPU seconds of all children that have ended, and of a server's processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
    if server is not None:
        process = psutil.Process(server)
        times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
        seconds += sum(each.user + each.system for each in times)
    return seconds


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the medians of each setting's runs, in the order of the rows."""
    groups = dict.fromkeys((row["sampler"], row["way"]) for row in rows)
    names = ("wall", "cpu", "waits", "exact_match", "nll", "load")
    found = []
    for sampler, way in groups:
        own = [row for row in rows if (row["sampler"], row["way"]) == (sampler, way)]
        middle = {name: statistics.median(row[name] for row in own) for name in names}
        found.append({"sampler": sampler, "way": way, **middle, "staleness": own[0]["staleness"]})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of docs/scaling.md in Markdown."""
    header = ("sampler", "", "wall s", "of it waits", "CPU s", "staleness", "exact match", "nll", "load")
    lines: list[tuple[str, ...]] = [header, ("---",) * len(header)]
    for row in rows:
        seconds = [f"{row[name]:.1f}" for name in ("wall", "waits", "cpu")]
        end = f"{row['exact_match']:.3f}", f"{row['nll']:.2f}", f"{row['load']:.0f}"
        lines.append((row["sampler"], f"`{row['way']}`", *seconds, ", ".join(map(str, row["staleness"])), *end))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
