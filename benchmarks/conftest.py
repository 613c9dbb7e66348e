"""Collect the results of a benchmark run, print them at its end, and write them to ``benchmarks/results/``."""

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # ``benchmarks`` is not installed

RESULTS_FOLDER = ROOT / "benchmarks" / "results"
SOURCES = ("irlfast", "kernels", "csrc", "benchmarks", ":!benchmarks/results")
RESULTS = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="benchmarks: small shapes, to check that everything runs")
    parser.addoption("--gpu-cases", action="store_true", help="benchmarks: a GPU's cases, with --quick on any machine")
    parser.addoption("--resume", action="store_true", help="benchmarks: resume a stopped run of the pair loss")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist: results name the command that the user gave
        sys.argv = config.workerinput["mainargv"]


@pytest.fixture(scope="session")
def data(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the data: ``IRLFAST_DATA``, or small data written here with ``--quick``."""
    if pytestconfig.getoption("quick"):
        from benchmarks.small import write_data

        folder = tmp_path_factory.mktemp("data")
        write_data(folder)
        return folder
    if "IRLFAST_DATA" not in os.environ:
        pytest.skip("needs minutes, and IRLFAST_DATA: a folder with hh_harmless_test.jsonl and gsm8k_test.jsonl")
    return Path(os.environ["IRLFAST_DATA"]).expanduser()


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> dict[str, Any]:
    """Return the result of the run, to whose ``cases`` and ``goals`` the tests add."""
    fresh = {**circumstances(), "complete": False, "cases": {}, "goals": []}
    return pytestconfig.stash.setdefault(RESULTS, unfinished(fresh) if pytestconfig.getoption("resume") else fresh)


def unfinished(fresh: dict[str, Any]) -> dict[str, Any]:
    """Return the last partial result of the same code on the same device, or ``fresh``."""
    same = ("commit", "uncommitted_changes", "device", "threads", "versions", "quick")
    for path in sorted(RESULTS_FOLDER.glob("*-pair-loss-*-partial.json"), reverse=True):
        partial = json.loads(path.read_text())
        if fresh["commit"] and all(partial[key] == fresh[key] for key in same):
            return partial
    return fresh


def circumstances() -> dict[str, Any]:
    """Return the head of every result: the time, the command, the commit and the machine."""
    import torch

    from benchmarks.peers import version

    packages = "torch triton transformers trl liger-kernel cut-cross-entropy".split()
    gpu = torch.cuda.is_available()
    changes = git("status", "--porcelain", *SOURCES)
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join([program_name(), *sys.argv[1:]]),
        "quick": "--quick" in sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "device": torch.cuda.get_device_name() if gpu else cpu_name(),
        "kind": "cuda" if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {package: version(package) for package in packages},
    }


def program_name() -> str:
    script = Path(sys.argv[0])
    return f"python -m benchmarks.{script.stem}" if script.parent.name == "benchmarks" else "pytest"


def interleaved(steps: dict[str, Callable[[], object]], runs: int = 9) -> dict[str, float]:
    """Time the steps in turn, and return the median seconds of each. The first run of each step does not count."""
    from benchmarks.measure import seconds_of

    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(runs + 1):
        for name, step in steps.items():
            times[name].append(seconds_of(step))
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/DATE-NAME.json``: the circumstances, then ``result``."""
    head = circumstances()
    path = RESULTS_FOLDER / f"{head['date'][:10]}-{name}{'-quick' if head['quick'] else ''}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(head | result, indent=1) + "\n")
    return path


def git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without the history
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match.group(1) if match else platform.processor() or platform.machine()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash.get(RESULTS, None)
    if not results or not results["cases"]:
        return
    terminalreporter.section(f"pair loss on {results['device']}, {results['threads']} CPU thread(s)")
    for line in [*summary(results), f"written to {save(results)}"]:
        terminalreporter.write_line(line)


def summary(results: dict[str, Any]) -> list[str]:
    """Return the lines of every case's table, then of the goals."""
    parts = [[title(case), *table(case)] for case in results["cases"].values()]
    parts += [goal_lines(results["goals"])] if results["goals"] else []
    return [line for part in parts for line in ["", *part]] + [""]


def save(results: dict[str, Any]) -> Path:
    slug = "cpu" if results["kind"] == "cpu" else re.sub(r"\W+", "-", results["device"]).lower()
    suffix = "-quick" if results["quick"] else "" if results["complete"] else "-partial"
    name = f"{results['date'][:16].replace(':', '')}-pair-loss-{slug}{suffix}.json"
    path = RESULTS_FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if results["complete"]:
        path.with_stem(f"{path.stem}-partial").unlink(missing_ok=True)
    return path


def title(case: dict[str, Any]) -> str:
    shape = f"{case['pairs']} pairs × 2 × {case['tokens']} tokens, H {case['hidden']}, V {case['vocabulary']}"
    notes = [case["dtype"], "trained" if case["trained"] else "random", *["half masked"] * case["half"]]
    return f"{case['name']}: {shape}, {', '.join(notes)}; gradients {case['gradient_mib']:.0f} MiB"


def table(case: dict[str, Any]) -> list[str]:
    """Return the rows of a case, fastest first, then the rows without a time and the reason."""
    header = ("", "ms", "min–max", "× products", "extra MiB", "nats", "d hidden", "d weight")
    timed = {row: result for row, result in case["rows"].items() if "seconds" in result}
    lines = [header]
    for row, result in sorted(timed.items(), key=lambda item: item[1]["seconds"]):
        low, middle, high = (f"{1000 * result[key]:.4g}" for key in ("min", "seconds", "max"))
        products = timed.get("".join(["bare products", *row.partition(";")[1:]]))
        ratio = f"{result['seconds'] / products['seconds']:.2f}" if products else ""
        memory = "" if result.get("extra_mib") is None else f"{result['extra_mib']:.0f}"
        errors = (f"{result[key]:.1e}" if key in result else "" for key in ("nats", "hidden_error", "weight_error"))
        lines.append((row, middle, f"{low}–{high}", ratio, memory, *errors))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  " + first.ljust(widths[0]) + align_right(rest, widths[1:]) for first, *rest in lines]
    untimed = [(row, result) for row, result in case["rows"].items() if row not in timed]
    return aligned + [f"  {row.ljust(widths[0])}  {result['status']}: {result['reason']}" for row, result in untimed]


def align_right(cells: list[str], widths: list[int]) -> str:
    return "".join("  " + cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def goal_lines(goals: list[dict[str, Any]]) -> list[str]:
    width = max(len(goal["what"]) for goal in goals)
    words = {True: "met", False: "MISSED", None: "not measured"}
    lines = [f"{'goals'.ljust(width + 2)}  measured     limit"]
    for goal in goals:
        measured = "–" if goal["measured"] is None else f"{goal['measured']:.3g}"
        lines.append(f"  {goal['what'].ljust(width)}  {measured:>8}  {goal['limit']:>8g}  {words[goal['met']]}")
    return lines
