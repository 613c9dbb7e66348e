"""Compare ``irlfast plan`` with what runs take: CPU seconds per step, and memory, by 1, 2 and 4 processes over gloo.

    python -m benchmarks.plans [FOLDER]    # 10 to 30 minutes on two cores

A model of 14 million parameters is trained for six steps by each number of processes at each ``zero_stage``. Every
process has one thread on one core. Its clock counts CPU seconds, which leave out all waiting, so that they mean
something on a busy machine, and with more processes than cores. Each run is then planned with the rates of another
one, as ``irlfast plan --calibrate`` takes them: of the run of the same ``zero_stage`` by two processes. One process in
float32 has no ZeRO; the run at ``zero_stage: 2`` is its measure. FOLDER keeps the runs, and those in it are not run
again.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.conftest import ROOT, write_result
from benchmarks.planned import BUCKET, STEPS

WORDS, ROWS, VOCABULARY = 4000, 200, 4096
SHAPE = {
    "model_type": "llama",
    "hidden_size": 320,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
}
QUICK = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
KEYS = {
    "method": "sft",
    "max_prompt_length": 200,
    "max_length": 500,
    "max_new_tokens": 8,
    "max_eval_samples": 2,
    "sft_steps": STEPS,
    "global_batch_size": 8,
    "logging_steps": 1,
    "save_steps": 0,
    "learning_rate": 1e-5,
}
CASES = [(1, 2), (2, 2), (4, 2), (2, 1), (4, 1), (2, 3), (4, 3)]  # processes, zero_stage
GOALS = {"memory": 0.10, "seconds": 0.25}


class Compared(NamedTuple):
    """A run beside its plan. Bytes are those of the process that has the most."""

    processes: int
    zero_stage: int  # 0 where a single process has no ZeRO
    calibrated_by: str
    planned: dict[str, float]
    measured: dict[str, float]
    parts: dict[str, dict[str, float]]  # planned and measured: bytes of tensors
    seconds: dict[str, dict[str, float]]  # planned and measured: of the parts of a step
    wall_seconds: float
    load: float  # of the machine, before the run

    def error(self, what: str) -> float:
        return self.planned[what] / self.measured[what] - 1


def main() -> None:
    quick = "--quick" in sys.argv
    given = [argument for argument in sys.argv[1:] if argument != "--quick"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given[0] if given else temporary).absolute()
        compared = [compare(folder, *case) for case in train_cases(folder, quick, "cpu", lambda processes: 1)]
    goals = [
        {"what": what, "measured": max(abs(each.error(what)) for each in compared), "limit": limit}
        for what, limit in GOALS.items()
    ]
    for goal in goals:
        goal["met"] = goal["measured"] <= goal["limit"]
    print(table(compared), *goals, sep="\n")
    write_result(
        "plans", {"shape": SHAPE, "keys": KEYS, "cases": [each._asdict() for each in compared], "goals": goals}
    )


def train_cases(folder: Path, quick: bool, clock: str, threads: Callable[[int], int]) -> list[tuple[int, int]]:
    """Do the runs that are not in ``folder`` yet, with so many ``threads`` per process; return their cases."""
    make_files(folder, QUICK if quick else SHAPE)
    cases = CASES[:2] if quick else CASES
    for processes, stage in cases:
        if not (folder / name_of(processes, stage) / "load.json").exists():
            train(folder, processes, stage, clock, threads(processes))
    return cases


def make_files(folder: Path, shape: dict[str, Any]) -> None:
    """Write the model's config, and rows of 40 and 60 random words."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = [
        "".join(draw.choice("bdgklmnprst") + draw.choice("aeiou") for _ in range(draw.randint(1, 4)))
        for _ in range(WORDS)
    ]
    rows = [
        {"prompt": " ".join(draw.choices(words, k=40)), "completion": " " + " ".join(draw.choices(words, k=60))}
        for _ in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(shape))


def name_of(processes: int, stage: int) -> str:
    return f"processes-{processes}-zero-{stage}"


def train(folder: Path, processes: int, stage: int, clock: str, threads: int) -> None:
    output, load = folder / name_of(processes, stage), os.getloadavg()[0]
    keys = KEYS | {
        "config_name": folder / "config.json",
        "train_tokenizer": VOCABULARY,
        "dataset_name": folder / "rows.jsonl",
        "zero_stage": stage,
        "output_dir": output,
    }
    start(processes, [clock, *(f"{name}={value}" for name, value in keys.items())], threads)
    (output / "load.json").write_text(json.dumps(load))


def start(processes: int, arguments: list[str], threads: int) -> None:
    """Run ``benchmarks.planned`` by a number of processes of so many threads."""
    launcher = ["-m", "irlfast.common.agent", str(processes), "benchmarks.planned"]
    command = [sys.executable, *(launcher if processes > 1 else ["-m", "benchmarks.planned"]), *arguments]
    alone = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def first_steps(run: Path, folder: Path, last: int) -> Path:
    """Copy to ``folder`` what ``irlfast plan --calibrate`` reads of a run, up to the step ``last`` of its phase."""
    from irlfast.startup.calibration import FILES

    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / name, folder / name)
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(row for row in rows if json.loads(row)["step"] <= last))
    return folder


def compare(folder: Path, processes: int, stage: int) -> Compared:
    """Plan a run with the rates of another one, and put what was measured beside it."""
    from irlfast.startup.calibration import rates_of_run, read_run
    from irlfast.startup.plan_memory import TRAINING_MOMENTS, Room, most
    from irlfast.startup.plan_run import plan_run, work_on
    from irlfast.startup.plan_seconds import Rates
    from irlfast.startup.prepare import quiet

    quiet()
    output, by = folder / name_of(processes, stage), folder / name_of(2, stage)
    run, unknown = read_run(output), float("nan")
    rates = rates_of_run(by, Rates(unknown, unknown, unknown), processes, on_gpu=False)
    room = Room(0.0, processes, on_gpu=False, runtime=rates.runtime)
    plan = plan_run(run.config, run.size, room, rates, work_on(run.config, run.train, 0, 0))
    # A plan counts seconds of processes that share the cores. The clock of these runs counts those of a whole core.
    step = {part: 2 * value / processes for part, value in plan.phases[0].step.items()}
    memory = {moment: plan.memory[moment] for moment in TRAINING_MOMENTS}
    found = [json.loads((output / f"measured-{rank}.json").read_text()) for rank in range(processes)]
    timed = run.rows[1:]
    seconds = {
        part: statistics.median(row["seconds"] * row[f"time/{part}"] for row in timed)
        for part in ("forward", "backward", "communication", "optimizer")
    }
    held = found[0]["held"]["update"]
    # ZeRO-3 keeps its bucket, of which a CPU has memory only for what is written: neither side counts it as tensors.
    has_bucket = stage == 3 and processes > 1
    tensors = most(memory) - rates.runtime - 4 * run.size.trained * has_bucket
    bucket = BUCKET * has_bucket
    update = memory["update"]
    return Compared(
        processes,
        stage if processes > 1 else 0,
        by.name,
        {"memory": most(memory), "seconds": sum(step.values())},
        {
            "memory": max(each["most_resident"] for each in found),
            "seconds": statistics.mean(statistics.median(each["cpu"][1:]) for each in found),
        },
        {
            "planned": {part: update[part] for part in ("weights", "optimiser state", "gradients")} | {"peak": tensors},
            "measured": {
                "weights": held["weights"],
                "optimiser state": held["optimiser state"],
                "gradients": held["gradients and gathered weights"] - bucket,
                "peak": max(each["peak"] for each in found) - bucket,
            },
        },
        {"planned": step, "measured": seconds},
        statistics.median(found[0]["wall"][1:]),
        json.loads((output / "load.json").read_text()),
    )


def table(compared: list[Compared]) -> str:
    """Return the table of docs/scaling.md in Markdown: planned / measured, and the error."""
    header = ("processes", "`zero_stage`", "weights", "optimiser", "gradients", "tensors", "process", "CPU s a step")
    rows = [header, ("---",) * len(header)]
    for each in compared:
        parts = [
            both(each.parts["planned"][part], each.parts["measured"][part])
            for part in ("weights", "optimiser state", "gradients", "peak")
        ]
        seconds = f"{each.planned['seconds']:.3f} / {each.measured['seconds']:.3f} ({each.error('seconds'):+.0%})"
        process = both(each.planned["memory"], each.measured["memory"])
        rows.append((str(each.processes), str(each.zero_stage or "–"), *parts, process, seconds))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def both(planned: float, measured: float) -> str:
    return f"{planned / 2**20:.0f} / {measured / 2**20:.0f} ({planned / measured - 1:+.0%})"


if __name__ == "__main__":
    main()
