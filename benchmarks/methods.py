"""Compare all methods from the same start, on the same prompts, with the same budget: docs/results.md has the outcome.

    python -m benchmarks.methods few noisy sums --data DATA    # DATA/cmudict_{train,test}.jsonl
    python -m benchmarks.methods all --data DATA --minutes 55  # every task, in the table's order, until then

SFT gives the start for each task (``benchmarks/protocol/tasks.py``) and seed. Every arm (``arms.py``) continues it with
the budget of SFT continued: tokens that are trained on, sampled and scored, at one price each (``budget.py``). A few
steps of an arm show what a prompt costs it, and so how many prompts it gets. The learning rate is chosen by the same
grid for every arm, on the validation rows of the first seed. Then every arm runs with every seed, and its policy
answers the test rows once. ``statistics.py`` compares the arms with SFT continued.

The script writes ``benchmarks/results/DATE-methods-TASK.json`` for each task, and then the section of docs/results.md
from all of them (``page.py``). A finished run is skipped when the script starts again. With ``--minutes`` no run starts
after that time, and a task is compared on the seeds that have run.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.conftest import write_result
from benchmarks.protocol.arms import ARMS, CONTINUED, START, Arm
from benchmarks.protocol.budget import PRICES, price
from benchmarks.protocol.figures import JUDGES, means
from benchmarks.protocol.jobs import (
    PILOT_STEPS,
    START_RATE,
    Job,
    batch_of,
    steps_of,
    test_job,
    train_job,
    warm_up,
)
from benchmarks.protocol.page import write_section
from benchmarks.protocol.tasks import SIZES, TASKS, write_files
from irlfast.evaluation.statistics import holm, pooled

QUICK = (CONTINUED, "SFT on all data from the start", "SFT continued, likeliest of 8", "RFT, RLOO")  # of --quick
Result = dict[str, Any]
# Run jobs in the worker processes, and return their results in order, None for those that had no time left.
RunJobs = Callable[[Callable[[Job], Result], Sequence[Job]], list[Result | None]]


def compare(run_jobs: RunJobs, job: Job, seeds: Sequence[int], names: Sequence[str]) -> Result | None:
    """Compare the named arms on a task; ``job`` has what its jobs share. None where no seed had the time."""
    arms = {name: ARMS[name] for name in names}
    run_jobs(train_job, [job._replace(seed=seed) for seed in seeds])
    prompts = plan(run_jobs, job, arms)
    rates = choose_rates(run_jobs, job, arms, prompts)
    rates |= {name: rates[arm.of] for name, arm in arms.items() if arm.of in rates}
    results: dict[tuple[str, int], Result] = {}
    for waits in (False, True):  # an arm that uses the policy of another one waits for it
        finals = [
            job._replace(seed=seed, arm=name, rate=rates[name], prompts=prompts.get(name, 0))
            for seed in seeds
            for name in (START, *arms)
            if name in rates and bool(ARMS[name].of) == waits
        ]
        done = zip(finals, run_jobs(test_job, finals), strict=True)
        results |= {(final.arm, final.seed): result for final, result in done if result}
    return summary(job, arms, results) if (CONTINUED, seeds[0]) in results else None


def plan(run_jobs: RunJobs, job: Job, arms: dict[str, Arm]) -> dict[str, int]:
    """Return how many prompts each arm gets, so that it costs what SFT continued costs in its steps.

    A pilot of a few steps on the first seed shows what a prompt costs an arm.
    """
    short = job._replace(rate=min(TASKS[job.task].rates), pilot=True)
    steps = {name: steps_of(job).continued if name == CONTINUED else PILOT_STEPS for name in arms}
    pilots = [
        short._replace(arm=name, prompts=steps[name] * batch_of(arm))
        for name, arm in arms.items()
        if not arm.of and not arm.from_scratch
    ]
    done = {pilot.arm: result for pilot, result in zip(pilots, run_jobs(train_job, pilots), strict=True) if result}
    costs = {name: price(result["counts"]) for name, result in done.items() if "counts" in result}
    budget = costs.get(CONTINUED, 0)
    return {pilot.arm: int(budget * pilot.prompts / costs[pilot.arm]) for pilot in pilots if pilot.arm in costs}


def choose_rates(run_jobs: RunJobs, job: Job, arms: dict[str, Arm], prompts: dict[str, int]) -> dict[str, float]:
    """Return the learning rate of each arm that is best on the validation rows of the first seed."""
    grid = [
        job._replace(arm=name, rate=rate, prompts=prompts[name])
        for name in arms
        if name in prompts
        for rate in TASKS[job.task].rates[: job.size.rates]
    ]
    chooses = JUDGES[TASKS[job.task].judge].chooses
    best: dict[str, tuple[float, float]] = {}  # arm -> (figure, rate)
    for each, result in zip(grid, run_jobs(train_job, grid), strict=True):
        if result and "validation" in result:
            best[each.arm] = max(best.get(each.arm, (-np.inf, 0.0)), (result["validation"][chooses], each.rate))
    # SFT from the start keeps the start's own rate, at which the policy that all arms continue was trained.
    own = {name: START_RATE for name, arm in arms.items() if arm.from_scratch}
    return {START: START_RATE} | own | {name: rate for name, (_, rate) in best.items()}


def summary(job: Job, arms: dict[str, Arm], results: dict[tuple[str, int], Result]) -> Result:
    """Return the task's result: per arm its figures, counts and gain over SFT continued, and what failed."""
    judge = JUDGES[TASKS[job.task].judge]
    table: dict[str, Result] = {}
    for name in (START, *arms):
        own = {seed: result for (arm, seed), result in results.items() if arm == name and "figures" in result}
        both = [seed for seed in own if "figures" in results.get((CONTINUED, seed), {})]
        if not both:
            failed = [result["failed"] for (arm, _), result in results.items() if arm == name and "failed" in result]
            table[name] = {"failed": failed[0] if failed else "no run was finished"}
            continue
        row = {key: own[both[0]].get(key) for key in ("rate", "prompts")} | {"keys": ARMS[name].keys}
        row["seeds"] = {seed: seed_row(own[seed]) for seed in both}
        if name != CONTINUED:
            values, base = (
                np.array([results[arm, seed]["figures"][judge.main] for seed in both]) for arm in (name, CONTINUED)
            )
            row["gain"] = pooled(values - base)._asdict()
        table[name] = row
    compared = [name for name, row in table.items() if name != START and row.get("gain", {}).get("p") is not None]
    adjusted = holm([table[name]["gain"]["p"] for name in compared])
    for name, p in zip(compared, adjusted, strict=True):
        table[name]["gain"]["p_holm"] = p
    task = TASKS[job.task]._asdict()
    shown = {"main": judge.main, "chooses": judge.chooses, "columns": judge.shown}
    return {"task": task, "size": job.size._asdict(), "prices": PRICES, "judge": shown, "arms": table}


def seed_row(result: Result) -> Result:
    counts = result.get("counts", {})  # an arm that uses another one's policy has none
    own = {"figures": means(result["figures"]), "counts": counts, "budget": price(counts)}
    return own | {"seconds": result.get("seconds"), "test_counts": result["test_counts"]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("tasks", nargs="+", choices=[*TASKS, "all"])
    arguments.add_argument("--data", type=Path, help="folder of the data files")
    arguments.add_argument("--output", type=Path, default=Path("runs/methods"), help="folder of the runs")
    arguments.add_argument(
        "--quick", action="store_true", help="a few steps, arms and rows, to check that everything runs"
    )
    arguments.add_argument("--full", action="store_true", help="ten times the steps, ten seeds, a larger policy")
    arguments.add_argument("--seeds", type=int, nargs="+", help="default: as many as the task says")
    arguments.add_argument(
        "--methods", nargs="+", choices=ARMS, metavar="ARM", help="beside SFT continued (default: all)"
    )
    arguments.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    arguments.add_argument("--minutes", type=float, default=np.inf, help="start no run after this time")
    options = arguments.parse_args()
    tasks = [*TASKS][: 2 if options.quick else None] if "all" in options.tasks else options.tasks
    setting = "quick" if options.quick else "full" if options.full else "hour"
    size, deadline = SIZES[setting], time.monotonic() + 60 * options.minutes
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # of the workers

    with (
        ProcessPoolExecutor(options.workers, get_context("forkserver"), warm_up) as pool,
        ThreadPoolExecutor(2) as at_a_time,  # tasks: one has jobs while the other waits for its last ones
    ):

        def finish(task: str) -> None:
            seeds = options.seeds or range(size.seeds or TASKS[task].seeds)
            job = Job(task, size, seeds[0], options.output.resolve() / setting, options.data and options.data.resolve())
            for seed in seeds:
                write_files(task, size, seed, job.data, job.root)
            wanted = {CONTINUED, *(options.methods or (QUICK if options.quick else ARMS))}
            names = [name for name in arms_of(task) if name in wanted]
            result = compare(partial(run_jobs, pool, deadline), job, seeds, names)
            if result:
                print(write_result(f"methods-{task}", result), flush=True)

        for done in [at_a_time.submit(finish, task) for task in tasks]:
            done.result()
    write_section()


def arms_of(task: str) -> list[str]:
    """Return the arms that a task has."""
    judge = TASKS[task].judge
    return [
        name
        for name, arm in ARMS.items()
        if name != START and (not arm.tasks or task in arm.tasks) and (not arm.judges or judge in arm.judges)
    ]


def run_jobs(
    pool: ProcessPoolExecutor, deadline: float, function: Callable[[Job], Result], jobs: Sequence[Job]
) -> list[Result | None]:
    """Run the jobs in the pool; none starts after the deadline."""
    futures: list[Future] = [pool.submit(before, deadline, function, job) for job in jobs]
    return [future.result() for future in futures]


def before(deadline: float, function: Callable[[Job], Result], job: Job) -> Result | None:
    if time.monotonic() > deadline:
        return None
    return function(job)


if __name__ == "__main__":
    sys.exit(main())
