"""Fuzz what reads foreign files: ``python -m tests.fuzz.run [TARGET ...] --minutes 30``.

Each target gets an equal share of the time, half of it by Hypothesis's own draws and half by atheris, which mutates
inputs that reached new code (left out where atheris is not installed). Every process may be killed by its input; the
next one goes on. The result is printed, and written to ``FOLDER/result.json``.
"""

import argparse
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.fuzz.child import LIMIT
from tests.fuzz.targets import TARGETS

PATIENCE = 1800  # seconds for its imports on a busy machine, after which a process is killed
COUNTS = ("inputs", "accepted", "refused")


def run(target: str, engine: str, seconds: float, folder: Path, seed: int) -> dict[str, Any]:
    """Fuzz a target for some seconds, by as many processes as it takes one after another."""
    left, number = seconds, 0
    total: dict[str, Any] = {**dict.fromkeys(COUNTS, 0), "slowest_seconds": 0.0, "memory_growth_mib": 0}
    total |= {"slowest_input": "", "faults": {}, "hangs": [], "crashes": [], "coverage": None}
    while left > 1:
        own = folder / target / f"{engine}-{number}"
        own.mkdir(parents=True)
        arguments = [target, engine, str(left), str(own), str(seed + number)]
        with (own / "log").open("wb") as log:
            command = [sys.executable, "-m", "tests.fuzz.child", *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                code = process.wait(left + PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        merge(total, own, code)
        left -= seconds_in(own) if code else left
        number += 1
    return total


def seconds_in(folder: Path) -> float:
    """Return how long a process that was killed has read inputs; at least 1 s, so that no target goes on for ever."""
    path = folder / "state.json"
    return max(1.0, json.loads(path.read_text())["seconds"]) if path.exists() else 60.0


def merge(total: dict[str, Any], folder: Path, code: int) -> None:
    """Add what a process left to the total of its target."""
    state = json.loads((folder / "state.json").read_text()) if (folder / "state.json").exists() else {}
    for name in COUNTS:
        total[name] += state.get(name, 0)
    if state.get("slowest_seconds", 0) > total["slowest_seconds"]:
        total |= {name: state[name] for name in ("slowest_seconds", "slowest_input")}
    total["memory_growth_mib"] = max(total["memory_growth_mib"], state.get("memory_growth_mib", 0))
    for name, fault in state.get("faults", {}).items():
        known = total["faults"].setdefault(name, fault | {"count": 0})
        known["count"] += fault["count"]
    text = (folder / "log").read_text(errors="replace")
    if covered := re.findall(r"cov: (\d+)", text):
        total["coverage"] = max(total["coverage"] or 0, int(covered[-1]))
    if code:
        stack = (folder / "stack").read_text()
        kind = "hangs" if code == -signal.SIGPROF or "Timeout" in stack else "crashes"
        total[kind].append({"code": code, "stack": stack[:3000], "last": str(folder / "last"), "log": text[-1000:]})


def faults_of(result: dict[str, Any]) -> int:
    """Return the number of distinct faults, hangs and crashes of a target."""
    return len(result["faults"]) + len(result["hangs"]) + len(result["crashes"])


def show(results: dict[str, dict[str, dict[str, Any]]], minutes: float) -> None:
    heads = ["target", "by", *COUNTS, "faults", "hangs", "slowest, s", "growth, MiB", "coverage"]
    rows = [heads]
    for target, engines in results.items():
        for engine, each in engines.items():
            counts = [f"{each[name]:,}" for name in COUNTS]
            faults = [str(len(each["faults"]) + len(each["crashes"])), str(len(each["hangs"]))]
            rest = [f"{each['slowest_seconds']:.2f}", str(each["memory_growth_mib"]), str(each["coverage"] or "–")]
            rows.append([target, engine, *counts, *faults, *rest])
    for row in rows:
        print("| " + " | ".join(row) + " |")
    every = [each for engines in results.values() for each in engines.values()]
    faults, hangs = sum(map(faults_of, every)), sum(len(each["hangs"]) for each in every)
    ran = sum(name.startswith("CodeRan") for each in every for name in each["faults"])
    print(
        f"{sum(each['inputs'] for each in every):,} inputs in {minutes:.1f} minutes: {faults - hangs} faults,", end=" "
    )
    print(f"{hangs} hangs over {LIMIT} s of CPU time, {ran} of the faults by code that ran")
    for each in every:
        for name, fault in each["faults"].items():
            print(f"\n{name} ({fault['count']:,}): {fault['message']}\n    {fault['input'][:600]}")
        for hang in [*each["hangs"], *each["crashes"]]:
            print(
                f"\nended with {hang['code']}; its input: {hang['last']}\n{hang['stack'][:1500]}\n{hang['log'][-300:]}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz.run", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)} [all]")
    parser.add_argument("--minutes", type=float, default=30.0, help="in all [30]")
    parser.add_argument("--folder", type=Path, default=Path("runs/fuzz"), help="for what it leaves [runs/fuzz]")
    parser.add_argument("--engines", default="hypothesis,atheris", help="[hypothesis,atheris]")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of atheris [the time]")
    given = parser.parse_args()
    engines = given.engines.split(",")
    if importlib.util.find_spec("atheris") is None and "atheris" in engines:
        engines.remove("atheris")
        print("atheris is not installed: Hypothesis alone draws inputs (make fuzz installs it)", file=sys.stderr)
    targets, begun = given.targets or list(TARGETS), time.monotonic()
    seconds = 60 * given.minutes / len(targets) / len(engines)
    folder = given.folder / time.strftime("%Y%m%d-%H%M%S")
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for target in targets:
        for engine in engines:
            results.setdefault(target, {})[engine] = run(target, engine, seconds, folder, given.seed)
            (folder / "result.json").write_text(json.dumps(results, indent=1))
    show(results, (time.monotonic() - begun) / 60)
    print(f"\n{folder / 'result.json'}")
    return int(any(faults_of(each) for engines in results.values() for each in engines.values()))


if __name__ == "__main__":
    sys.exit(main())
