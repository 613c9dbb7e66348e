"""Read the files of a finished or stopped run for the report. A missing or broken file becomes a note on the page."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from pydantic import ValidationError

from irlfast.common.files import InputError
from irlfast.common.logs import read_row
from irlfast.common.secrets import redacted
from irlfast.config import Config
from irlfast.config.schema import FIELDS
from irlfast.evaluation.prompts import PART
from irlfast.reports.metrics import SPEED, TRAINING_KEYS

PARTS = ("data", "forward", "backward", "optimizer", "communication", "checkpoint")  # of a step
TIMES = ["seconds", *(f"time/{part}" for part in PARTS)]
LOGGED = ["step", *TRAINING_KEYS, *(metric.key for metric in SPEED), *TIMES]  # the columns that are read
# A closed set: a run has no other folders with phases.
PHASE = re.compile(r"initial|sft-nll|sft|stage-(\d{1,6})(?:/(round-\d{1,6}))?(?:/(reward(?:-\d{1,6})?))?")


class RunFiles(NamedTuple):
    """The files of a run that the page shows. Phases are in the order of the run."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    metrics: dict[str, np.ndarray]  # phase -> [steps, LOGGED]
    evals: dict[str, dict[str, Any]]  # phase -> eval.json
    pairs: dict[str, dict[str, Any]]  # phase -> pairs.json
    rounds: dict[str, dict[str, Any]]  # phase -> round.json
    leaks: dict[str, dict[str, Any]]  # phase -> leaks.json of its reward
    data: dict[str, Any]
    policy: dict[str, Any]  # final/policy.json
    starts: list[dict[str, Any]]
    first: str  # the policy that self-play started from; empty where none was evaluated
    kept: str  # the policy that the run keeps
    notes: list[str]  # sentences about missing and broken files

    @property
    def name(self) -> str:
        return redacted(self.folder.absolute().name)


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run for its page.

    Raises:
        InputError: (a ValueError) ``folder`` holds no ``config.yaml``.
    """
    notes: list[str] = []
    config_text, config = read_config(folder, notes)
    metrics = read_metrics(folder, notes)
    evals, pairs = (read_phases(folder, name, notes) for name in ("eval.json", "pairs.json"))
    data, policy = (read_object(folder, name, notes) for name in ("data.json", "final/policy.json"))
    note_unfinished(config, evals, pairs, notes)
    note_deleted(folder, config, notes)
    return RunFiles(
        folder,
        config_text,
        config,
        metrics,
        evals,
        pairs,
        read_phases(folder, "round.json", notes),
        read_phases(folder, "reward/leaks.json", notes) | read_phases(folder, "reward-00/leaks.json", notes),
        data,
        policy,
        read_starts(folder, notes),
        *first_and_kept(evals, policy, notes),
        notes,
    )


def note_deleted(folder: Path, config: dict[str, Any], notes: list[str]) -> None:
    done = sorted(path.parent for path in folder.glob("stage-*/DONE")) if config.get("save_total_limit") else []
    deleted = [phase.name for phase in done if not (phase / "policy").exists()]
    if deleted:
        notes.append(f"save_total_limit has deleted the policies of {', '.join(deleted)}.")


def read_starts(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the starts of a run or an evaluation; folders of earlier versions have none."""
    return redacted([*read_lines(folder, "starts.jsonl", notes)]) if (folder / "starts.jsonl").is_file() else []


def first_and_kept(evals: dict[str, dict], policy: dict[str, Any], notes: list[str]) -> tuple[str, str]:
    """Return the policy that self-play started from, and the policy that the run keeps.

    If no policy is named as kept, the last evaluated one stands in for it.
    """
    if not evals:
        return "", ""
    first = "sft" if "sft" in evals and any(phase.startswith("stage-") for phase in evals) else next(iter(evals))
    last = list(evals)[-1]
    kept = str(policy.get("kept", last))
    if kept not in evals:
        notes.append(f"The kept policy ({kept}) has no eval.json; the last one evaluated ({last}) stands in for it.")
    return first, kept if kept in evals else last


def read_config(output_dir: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    path = output_dir / "config.yaml"
    if not path.is_file():
        raise InputError(f"{output_dir}: no config.yaml in this folder; expected the output_dir of a run")
    return read_settings(path, notes)


def read_settings(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the text of a YAML file, and its keys and values; if it has none, an empty object, and add a note."""
    text = redacted(path.read_text(encoding="utf-8", errors="replace"))
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:
        settings = None
    if isinstance(settings, dict):
        return text, settings
    notes.append(f"{path.name} cannot be read: expected keys and values.")
    return text, {}


def read_object(output_dir: Path, name: str, notes: list[str]) -> dict[str, Any]:
    """Read a JSON object. If the file is missing or holds something else, return an empty object and add a note."""
    path = output_dir / name
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    notes.append(f"{name} {'cannot be read: expected a JSON object' if path.is_file() else 'is missing'}.")
    return {}


def read_lines(output_dir: Path, name: str, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Read the objects of a JSON-lines file. A killed run may leave half a line, which is left out and noted."""
    if not (output_dir / name).is_file():
        notes.append(f"{name} is missing.")
        return
    broken = 0
    with (output_dir / name).open("rb") as lines:
        for line in lines:
            row = read_row(line)
            if row is None:
                broken += 1
            else:
                yield row
    if broken:
        notes.append(f"{name}: {broken:,} unreadable line{'s' if broken > 1 else ''} left out.")


def phase_order(phase: str) -> tuple[int, str, str]:
    """Return a sort key: a reward comes before its round or stage, and rounds before the phase that ends the stage."""
    match = PHASE.fullmatch(phase)
    assert match
    stage, part, reward = match.groups()
    first_or_last = "" if reward else "~"
    return {"initial": -3, "sft-nll": -2, "sft": -1}.get(phase, int(stage or 0)), part or first_or_last, reward or "~"


def read_phases(output_dir: Path, name: str, notes: list[str]) -> dict[str, dict[str, Any]]:
    """Read the file ``name`` of every phase that has one, in the order of the run."""
    paths = [*output_dir.glob(f"*/{name}"), *output_dir.glob(f"*/round-*/{name}")]
    folders = [path.relative_to(output_dir).as_posix().removesuffix(f"/{name}") for path in paths]
    phases = sorted(filter(PHASE.fullmatch, folders), key=phase_order)
    values = {phase: read_object(output_dir, f"{phase}/{name}", notes) for phase in phases}
    return {phase: value for phase, value in values.items() if value}


def read_metrics(output_dir: Path, notes: list[str]) -> dict[str, np.ndarray]:
    """Read ``metrics.jsonl`` as phase -> ``[steps, LOGGED]``; a value that was not logged is NaN.

    A resumed run may log a step twice; it counts once.
    """
    phases: dict[str, dict[float, list[float]]] = {}
    for row in read_lines(output_dir, "metrics.jsonl", notes):
        phase, step = str(row.get("phase")), number(row.get("step"))
        if PHASE.fullmatch(phase) and math.isfinite(step):
            phases.setdefault(phase, {})[step] = [number(row.get(key)) for key in LOGGED]
    ordered = sorted(phases, key=phase_order)
    return {phase: np.array([row for _, row in sorted(phases[phase].items())]) for phase in ordered}


def split_time(run: RunFiles) -> dict[str, list[Any]]:
    """Return phase -> seconds of sampling, scoring, training, the parts of training as in TIMES, and evaluation.

    A time that was not measured is None. The times of sampling and scoring are in ``pairs.json`` for a stage of
    self-play or its reward, and in ``round.json`` for a round of alignment.
    """
    split: dict[str, list[Any]] = {}
    for phase, rows in run.metrics.items():
        seconds, *shares = column(rows, *TIMES).T
        times = run.rounds.get(phase) or run.pairs.get(phase.removesuffix("/reward"), {})
        before = [times.get(key) for key in ("sample_seconds", "score_seconds")]
        parts = [float((seconds * share).sum()) for share in shares]
        split[phase] = [*before, float(seconds.sum()), *parts, run.evals.get(phase, {}).get("seconds")]
    untrained = [None] * (len(TIMES) + 2)
    split |= {phase: [*untrained, row.get("seconds")] for phase, row in run.evals.items() if phase not in split}
    return {phase: split[phase] for phase in sorted(split, key=phase_order)}


def interval(evaluation: dict[str, Any], key: str) -> tuple[float | None, float | None]:
    """Return the 95% interval of a held-out metric, or nothing where there is none."""
    intervals = evaluation.get("intervals")
    ends = intervals.get(key) if isinstance(intervals, dict) else None
    if not isinstance(ends, list) or len(ends) != 2 or not all(math.isfinite(number(end)) for end in ends):
        return None, None
    return ends[0], ends[1]


def note_unfinished(config: dict, evals: dict, pairs: dict, notes: list[str]) -> None:
    """Note the files that the run's phases should have left, and the stages that are not done."""
    read = {f"{phase}/eval.json" for phase in evals} | {f"{phase}/pairs.json" for phase in pairs}
    expected = expected_files(config, notes)
    begun = {file.partition("/")[0] for file in read if file.startswith("stage-")}
    notes.extend(f"{file} is missing." for file in expected if file.partition("/")[0] in begun and file not in read)
    stages = [file for file in expected if file.startswith("stage-") and file.endswith("/eval.json")]
    done = len(read.intersection(stages))
    if done < len(stages):
        notes.append(f"{done} of {len(stages)} stages have been evaluated.")
    if not evals:
        notes.append("No phase has an eval.json: no policy of this run has been evaluated.")


def expected_files(config: dict[str, Any], notes: list[str]) -> list[str]:
    """The files that the report reads of a whole run with this ``config.yaml``, as its method plans them."""
    from irlfast.methods import METHODS

    try:
        known = Config(**{name: value for name, value in config.items() if name in FIELDS})
    except ValidationError:
        notes.append("config.yaml is of another version of irlfast, so that unfinished stages are not listed.")
        return []
    files = [file for phase in METHODS[known.method].phases(known, 0) for file in phase.files]
    evals = [file for file in files if file.startswith("stage-") and file.endswith("/eval.json")]
    skipped = [] if known.eval_every_stage else evals[:-1]
    return [file for file in files if file not in skipped]


def read_log_ratios(run: RunFiles) -> dict[str, dict[str, np.ndarray]]:
    """Read the log-ratios to the first policy of each policy's held-out answers; policies without any are left out."""
    ratios = {phase: log_ratios_in(read_lines(run.folder, f"{phase}/answers.jsonl", [])) for phase in run.evals}
    return {phase: each for phase, each in ratios.items() if len(each["expert"])}


def read_parts(folder: Path, model: str, notes: list[str]) -> Iterator[dict[str, Any] | None]:
    """Yield a model's row for each prompt of an evaluation, as far as its files go.

    A missing or broken row is None, so that the other rows keep their prompts.
    """
    missing = 0
    numbers = sorted(int(path.stem[5:]) for path in (folder / "models" / model).glob("part-[0-9]*.jsonl"))
    for part in range(numbers[-1] + 1 if numbers else 0):
        path = folder / "models" / model / f"part-{part:05d}.jsonl"
        lines = path.read_bytes().splitlines() if part in numbers else [b""] * PART
        for line in lines:
            row = read_row(line)
            missing += row is None
            yield row
    if missing:
        notes.append(f"models/{model}: {missing:,} rows are missing or unreadable.")


def log_ratios_in(rows: Iterable[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return the log-ratios of ``expert`` and ``synthetic`` answers in rows of answers, in nats."""
    ratios = [row["log_ratios"] for row in rows if isinstance(row.get("log_ratios"), dict)]
    synthetic = [values for each in ratios if isinstance(values := each.get("synthetic"), list)]
    return {
        "expert": np.array([number(each.get("expert")) for each in ratios]),
        "synthetic": np.array([number(value) for values in synthetic for value in values]),
    }


def mapping(row: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the object under a key, or an empty one."""
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def objects(value: Any, depth: int = 1) -> dict[str, Any]:
    """Return the parts of an object that are objects themselves, down to ``depth``. Other parts are left out."""
    if not isinstance(value, dict):
        return {}
    return (
        {name: objects(each, depth - 1) for name, each in value.items() if isinstance(each, dict)} if depth else value
    )


def objects_in(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the objects of the list under a key; none where there is no list."""
    value = row.get(key)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def column(rows: np.ndarray, *keys: str) -> np.ndarray:
    """Return the columns of ``[steps, LOGGED]`` that hold ``keys``."""
    return rows[:, [LOGGED.index(key) for key in keys]]


def number(value: Any) -> float:
    """Return a value as a float: NaN for a missing one, infinity for one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) < 1e30 else math.inf  # a NaN compares as false, and so becomes infinity
