"""Compare the wall time of a step with what ``irlfast plan`` says, once one step was measured: 1, 2 and 4 processes.

    python -m benchmarks.walls [FOLDER]    # 3 to 5 minutes on two quiet cores

The runs are those of benchmarks/plans.py, but their clock counts wall time, and no process is pinned: together, the
processes have as many threads as the machine has cores, or one each where there are more processes than cores. These
share the cores, which a plan counts. Each run is planned with the rates of one step of the run by two processes at the
same ``zero_stage``, its third one: the first two steps are a warm-up. Other work on the machine falsifies these
figures, so its load before each run is in them. FOLDER keeps the runs, and those in it are not run again.
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.conftest import write_result
from benchmarks.plans import GOALS, KEYS, SHAPE, first_steps, name_of, train_cases

LIMIT = GOALS["seconds"]
CALIBRATING = 3  # the step whose rates are taken


def main() -> None:
    quick = "--quick" in sys.argv
    given = [argument for argument in sys.argv[1:] if argument != "--quick"]
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given[0] if given else temporary).absolute()
        cases = train_cases(folder, quick, "wall", lambda processes: max(1, cores // processes))
        compared = [compare(folder, *case) for case in cases]
    worst = max(abs(each["error"]) for each in compared)
    goals = [{"what": "wall seconds of a step", "measured": worst, "limit": LIMIT, "met": worst <= LIMIT}]
    print(table(compared), *goals, sep="\n")
    write_result("walls", {"shape": SHAPE, "keys": KEYS, "cores": cores, "cases": compared, "goals": goals})


def compare(folder: Path, processes: int, stage: int) -> dict[str, Any]:
    """Plan a run with the rates of a step of another one, and put the median of its steps beside the plan."""
    from irlfast.startup.calibration import rates_of_run, read_run
    from irlfast.startup.plan_memory import Room
    from irlfast.startup.plan_run import plan_run, work_on
    from irlfast.startup.plan_seconds import Rates
    from irlfast.startup.prepare import quiet

    quiet()
    output, unknown = folder / name_of(processes, stage), float("nan")
    run = read_run(output)
    with tempfile.TemporaryDirectory() as temporary:
        by = first_steps(folder / name_of(2, stage), Path(temporary, "run"), CALIBRATING)
        rates = rates_of_run(by, Rates(unknown, unknown, unknown), processes, on_gpu=False)
    room = Room(0.0, processes, on_gpu=False, runtime=rates.runtime)
    plan = plan_run(run.config, run.size, room, rates, work_on(run.config, run.train, 0, 0))
    steps = json.loads((output / "measured-0.json").read_text())["wall"][1:]
    planned, measured = sum(plan.phases[0].step.values()), statistics.median(steps)
    return {
        "processes": processes,
        "zero_stage": stage if processes > 1 else 0,
        "planned": planned,
        "measured": measured,
        "error": planned / measured - 1,
        "steps": steps,
        "load": json.loads((output / "load.json").read_text()),
    }


def table(compared: list[dict[str, Any]]) -> str:
    """Return the table of docs/scaling.md in Markdown."""
    rows = [("processes", "`zero_stage`", "planned / measured s", "error", "steps", "load"), ("---",) * 6]
    for each in compared:
        both = f"{each['planned']:.2f} / {each['measured']:.2f}"
        span = f"{min(each['steps']):.2f} to {max(each['steps']):.2f}"
        stage = str(each["zero_stage"] or "–")
        rows.append((str(each["processes"]), stage, both, f"{each['error']:+.0%}", span, f"{each['load']:.0f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
