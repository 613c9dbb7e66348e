"""The Open LLM Leaderboard's six tasks, or tasks of your own, by lm-evaluation-harness in a child process.

Tasks, shots and metrics are those of the leaderboard's first version, which the papers report
(https://huggingface.co/docs/leaderboards/open_llm_leaderboard/archive). As there, prompts have no chat template.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from irlfast.common.artefacts import intact, keep_json
from irlfast.common.files import InputError, home_path, read_json, write_json
from irlfast.common.messages import log
from irlfast.common.printable import printable
from irlfast.common.secrets import redacted
from irlfast.config import Config
from irlfast.evaluation.harness import (
    Task,
    command_by_hand,
    lm_eval_version,
    model_arguments,
    run_worker,
)
from irlfast.evaluation.models import fingerprint_of, folder_hash
from irlfast.evaluation.questions import differences_of, values_of
from irlfast.runs.hub import set_offline_if_unreachable
from irlfast.runs.lock import lock

NORMAL_95 = 1.959963984540054  # standard errors on each side of a mean

TASKS = (
    Task("arc_challenge", 25, "acc_norm,none", "ARC"),
    Task("truthfulqa_mc2", 0, "acc,none", "TruthfulQA"),
    Task("winogrande", 5, "acc,none", "Winogrande"),
    Task("gsm8k", 5, "exact_match,strict-match", "GSM8K"),
    Task("hellaswag", 10, "acc_norm,none", "HellaSwag"),
    Task("mmlu", 5, "acc,none", "MMLU"),
)


class Published(NamedTuple):
    """Figures in per cent that others published. None has an interval."""

    model: str
    average: float
    source: str
    figures: tuple[float, ...] = ()  # in the order of TASKS


PUBLISHED = (
    Published("zephyr-7b-sft-full", 59.48, "arXiv 2405.17888"),
    Published("SPIN", 60.32, "arXiv 2405.17888"),
    Published("SPIN", 61.02, "arXiv 2405.17888"),
    Published("IRFT, T = 10", 61.03, "arXiv 2405.17888"),
    Published(
        "SPIN, iteration 1",
        62.86,
        "model card of UCLA-AGI/zephyr-7b-sft-full-SPIN-iter1",
        (65.87, 57.39, 76.64, 30.86, 85.44, 60.95),
    ),
)
# github.com/uclaml/SPIN issue 36; github.com/JasonJiaxiangLi/Reward_learning_SFT scripts/run_eval.sh
VERSIONS = (
    "Published figures come from other versions of lm-eval, which differ by points (SPIN's authors name 0.4.0, and "
    "the script of IRFT's authors gives MMLU 1 shot): compare models that one version measured."
)


def parse_task(text: str) -> Task:
    """Return the task that ``text`` names, as ``task`` or ``task:shots``. One of the six keeps its shots and metric.

    Raises:
        InputError: the shots are not a number.
    """
    name, colon, shots = text.partition(":")
    if not name or (colon and not shots.isdecimal()):
        raise InputError(f"--tasks: found {text!r}, expected task or task:shots, such as my_task:5")
    task = next((task for task in TASKS if task.name == name), Task(name))
    return task._replace(shots=int(shots)) if colon else task


def add_leaderboard_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("lm-eval, which measures models on public tasks").add_argument
    add("--leaderboard", action="store_true", help="run the six tasks of the Open LLM Leaderboard's first version")
    add("--tasks", metavar="LIST", help="run these in place of the six: task or task:shots, with commas between them")
    add("--include_path", metavar="FOLDER", help="a folder of tasks in lm-eval's format")
    add("--local_datasets", metavar="FOLDER", help="a folder of copies of the tasks' datasets, as owner/name")
    add("--lm_eval_python", metavar="PYTHON", help="an interpreter that has lm-eval (default: the one of irlfast)")


def show_leaderboard(models: Mapping[str, str | Path], config: Config, options: argparse.Namespace) -> None:
    """Measure models as the options of :func:`add_leaderboard_options` say, and print them beside published figures."""
    set_offline_if_unreachable()
    output = home_path(config.output_dir)
    lock(output)
    boards = run_leaderboard(
        models,
        output,
        [parse_task(text) for text in options.tasks.split(",")] if options.tasks else TASKS,
        python=options.lm_eval_python,
        include_path=options.include_path,
        local_datasets=options.local_datasets,
        dtype=config.dtype,
        batch_size=config.per_device_eval_batch_size,
        trust_remote_code=config.trust_remote_code,
    )
    differences = differences_of(boards)
    write_json(output / "leaderboard" / "differences.json", differences)
    tables = [*leaderboard_tables(boards), *difference_tables(differences, next(iter(boards)))]
    for table in tables:
        Console().print(table)
    log(f"leaderboard: {output / 'leaderboard'}")


def run_leaderboard(
    models: Mapping[str, str | Path],
    output: Path,
    tasks: Sequence[Task] = TASKS,
    *,
    python: str | None = None,
    include_path: str | None = None,
    local_datasets: str | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure each model on each task, and return what ``output/leaderboard/NAME.json`` then holds, by name.

    A task is not measured again if that file has it for the same model, tasks, settings and version of lm-eval.

    Args:
        models: folders or hub names, by the names under which they are shown. The folder of an adapter
            (:mod:`irlfast.models.lora`) is measured as its base with the adapter on it.
        python: an interpreter that has lm-eval (default: this one).
        include_path: a folder of tasks in lm-eval's format.
        local_datasets: a folder of local copies: lm-eval reads the dataset ``owner/name`` from its subfolder
            ``owner/name`` if there is one.

    Raises:
        InputError: there is no lm-eval, or lm-eval cannot run a task. The message names the cause and the log.
    """
    names = [task.name for task in tasks]
    if len({*names}) < len(names):
        raise InputError(f"--tasks: found {', '.join(names)}, expected each task once")
    for key, folder in (("include_path", include_path), ("local_datasets", local_datasets)):
        if folder and not Path(folder).is_dir():
            raise InputError(f"--{key}: no such folder: {folder}")
    interpreter = python or sys.executable
    settings = {
        "lm_eval": lm_eval_version(interpreter),
        "dtype": dtype,
        "batch_size": batch_size,
        "include_path": folder_hash(Path(include_path)) if include_path else None,
        "local_datasets": folder_hash(Path(local_datasets)) if local_datasets else None,
    }
    boards = {}
    for name, model in models.items():
        job = {
            "interpreter": interpreter,
            "model_args": model_arguments(model, dtype, trust_remote_code),
            "batch_size": batch_size,
            "include_path": str(Path(include_path).absolute()) if include_path else None,
            "local_datasets": local_datasets,
        }
        path = output / "leaderboard" / f"{name}.json"
        boards[name] = measure(name, job, tasks, settings | {"model": fingerprint_of(model)}, path)
    return boards


def measure(
    name: str, job: Mapping[str, Any], tasks: Sequence[Task], conditions: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Measure one model on the tasks that ``path`` lacks under these conditions, and return what it then holds."""
    board: dict[str, Any] = read_json(path) if intact(path) else {"tasks": {}}
    wanted = {task.name: {**conditions, "shots": task.shots} for task in tasks}
    missing = [task for task in tasks if board["tasks"].get(task.name, {}).get("conditions") != wanted[task.name]]
    log_file = path.with_suffix(".log")
    if missing:
        log(f"{name}: lm-eval measures {', '.join(task.name for task in missing)}; its messages are in {log_file}")
    for task, answer in run_worker(job, missing, log_file):
        figures = figures_of(task, answer["report"])
        board["tasks"][task.name] = {
            "conditions": wanted[task.name],
            "command": redacted(command_by_hand(job, task)),
            "figures": figures,
            "report": redacted(answer["report"]),
            "questions": values_of(figures, answer, task.name),
        }
        keep_json(path, board)
        log(f"{name}: {task.name} is measured")
    return board


# ---------------------------------------------------------------- figures


def figures_of(task: Task, report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the mean, the 95% interval and the number of questions of each metric that lm-eval reports on a task.

    The interval is the mean plus and minus 1.96 of lm-eval's own standard errors. It is null if there is no such error,
    or if it is 0 because all answers are right or all are wrong. A tag has no metric of its own: its tasks' metrics are
    named ``task: metric``.
    """
    results = report["results"]
    parts = [task.name] if task.name in results else sorted(results)
    figures = {}
    for part in parts:
        for metric, mean in results[part].items():
            wanted = metric == task.metric if task.metric else "," in metric and "_stderr," not in metric
            if wanted and isinstance(mean, int | float):
                error = results[part].get(metric.replace(",", "_stderr,", 1))
                half = NORMAL_95 * error if isinstance(error, float) and error > 0 else None
                figures[metric if part == task.name else f"{part}: {metric}"] = {
                    "mean": mean,
                    "low": None if half is None else mean - half,
                    "high": None if half is None else mean + half,
                    "count": questions_of(part, report),
                }
    return figures


def questions_of(part: str, report: Mapping[str, Any]) -> int | None:
    """Return the number of questions of a task, or of all tasks of a group."""
    members = report["group_subtasks"].get(part)
    if not members:
        return report["n-samples"].get(part, {}).get("effective")
    counts = [questions_of(member, report) for member in members]
    return sum(count for count in counts if count)


def figure_of(board: Mapping[str, Any], task: Task) -> Mapping[str, Any] | None:
    """Return the figure of one of the six tasks, or None if it was not measured."""
    figure = board["tasks"].get(task.name, {}).get("figures", {}).get(task.metric)
    known = figure and isinstance(figure.get("mean"), int | float) and isinstance(figure.get("low"), int | float | None)
    return figure if known else None


def average_of(board: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the mean of the six tasks, and its 95% interval if each has one; None without all six."""
    figures = [figure for task in TASKS if (figure := figure_of(board, task))]
    if len(figures) < len(TASKS):
        return None
    mean = sum(figure["mean"] for figure in figures) / len(figures)
    if any(figure["low"] is None for figure in figures):
        return {"mean": mean, "low": None, "high": None}
    half = math.hypot(*(figure["mean"] - figure["low"] for figure in figures)) / len(figures)  # independent errors
    return {"mean": mean, "low": mean - half, "high": mean + half}


# ---------------------------------------------------------------- tables


def leaderboard_tables(boards: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return the table of the six tasks, and the table of other tasks, if there are any."""
    measured = {task for board in boards.values() for task in board["tasks"]}
    six = {task.name for task in TASKS}
    tables = [table_of_six(boards)] if measured & six else []
    return [*tables, table_of_others(boards)] if measured - six else tables


def table_of_six(boards: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the six tasks in per cent, with the published figures below."""
    versions = {str(task["conditions"]["lm_eval"]) for board in boards.values() for task in board["tasks"].values()}
    table = Table(
        title=f"Open LLM Leaderboard, version 1, in per cent, by lm-eval {', '.join(sorted(versions))}",
        caption=f"±: 95% interval, 1.96 standard errors of lm-eval. {VERSIONS}",
    )
    table.add_column("model")
    for task in TASKS:
        table.add_column(f"{task.title}\n{task.shots} shots", justify="right")
    table.add_column("average", justify="right")
    for name, board in boards.items():
        figures = [figure_of(board, task) for task in TASKS]
        table.add_row(
            Text(printable(name)), *(with_interval(figure, 100, 2) for figure in [*figures, average_of(board)])
        )
    table.add_section()
    for row in PUBLISHED:
        cells = [f"{figure:.2f}" for figure in row.figures] or ["–"] * len(TASKS)
        table.add_row(f"{row.model} ({row.source})", *cells, f"{row.average:.2f}")
    return table


def table_of_others(boards: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the tasks that are none of the six, in lm-eval's units."""
    table = Table(
        "model",
        "task",
        "metric",
        title="Other tasks of lm-eval",
        caption="±: 95% interval, 1.96 standard errors of lm-eval",
    )
    for column in ("value", "questions"):
        table.add_column(column, justify="right")
    six = {task.name for task in TASKS}
    for name, board in boards.items():
        for task, measured in board["tasks"].items():
            for metric, figure in measured["figures"].items() if task not in six else ():
                count = "–" if figure["count"] is None else f"{figure['count']:,}"
                names = (Text(printable(each)) for each in (name, task, metric))
                table.add_row(*names, with_interval(figure, 1, 4), count)
    return table


def difference_tables(differences: Mapping[str, Mapping[str, Any]], baseline: str) -> list[Table]:
    """Return a table for each model beside the baseline: the differences in lm-eval's units, and their verdicts."""
    tables = []
    for model, each in differences.items():
        table = Table(
            "figure",
            title=Text(printable(f"{model} against {baseline}, on the same questions")),
            caption="95% intervals; p by McNemar's exact or the permutation test, after Holm's correction",
        )
        for column in ("difference", "p", "questions"):
            table.add_column(column, justify="right")
        table.add_column("verdict")
        for figure, value in each.items():
            ends = "" if value["low"] is None else f" [{value['low']:+.4f}, {value['high']:+.4f}]"
            cells = (f"{value['mean']:+.4f}{ends}", f"{value['p_holm']:.2g}", f"{value['count']:,}", value["verdict"])
            table.add_row(Text(printable(figure)), *cells)
        tables += [table] if each else []
    return tables


def with_interval(figure: Mapping[str, Any] | None, scale: float, digits: int) -> str:
    if figure is None:
        return "–"
    mean, low = figure["mean"], figure["low"]
    return f"{scale * mean:.{digits}f}" + ("" if low is None else f" ± {scale * (mean - low):.{digits}f}")
