"""Read the files of a finished or stopped run for the report. A missing or broken file becomes a note on the page."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from irlfast.common.files import InputError
from irlfast.config import Config
from irlfast.config.schema import FIELDS

TIMES = ["seconds", *(f"time/{part}" for part in ("data", "forward", "backward", "optimizer", "communication"))]
# A closed set, because phase names become text of the plots.
PHASE = re.compile(r"initial|sft-nll|sft|stage-(\d{1,6})(?:/(round-\d{1,6}))?(?:/(reward(?:-\d{1,6})?))?")


def read_config(output_dir: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    path = output_dir / "config.yaml"
    if not path.is_file():
        raise InputError(f"{output_dir}: no config.yaml in this folder; expected the output_dir of a run")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if isinstance(config, dict):
        return text, config
    notes.append("config.yaml cannot be read: expected keys and values.")
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
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            else:
                broken += 1
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
    folders = [path.parent.relative_to(output_dir).as_posix() for path in paths]
    phases = sorted(filter(PHASE.fullmatch, folders), key=phase_order)
    values = {phase: read_object(output_dir, f"{phase}/{name}", notes) for phase in phases}
    return {phase: value for phase, value in values.items() if value}


def read_metrics(output_dir: Path, keys: list[str], notes: list[str]) -> dict[str, np.ndarray]:
    """Read ``metrics.jsonl`` as phase -> ``[steps, 1 + keys]``: the number of the step, then its metrics.

    A resumed run may log a step twice; it counts once.
    """
    phases: dict[str, dict[float, list[float]]] = {}
    for row in read_lines(output_dir, "metrics.jsonl", notes):
        phase, step = str(row.get("phase")), number(row.get("step"))
        if PHASE.fullmatch(phase) and math.isfinite(step):
            phases.setdefault(phase, {})[step] = [step, *(number(row.get(key)) for key in keys)]
    ordered = sorted(phases, key=phase_order)
    return {phase: np.array([row for _, row in sorted(phases[phase].items())]) for phase in ordered}


def split_time(
    metrics: dict[str, np.ndarray], pairs: dict[str, dict[str, Any]], rounds: dict[str, dict[str, Any]]
) -> dict[str, list[float]]:
    """Return phase -> seconds of sampling, scoring, training, and the parts of training as in TIMES.

    A time that was not measured is NaN. The times of sampling and scoring are in ``pairs`` for a stage of self-play or
    its reward, and in ``rounds`` for a round of alignment.
    """
    split = {}
    for phase, rows in metrics.items():
        seconds, *shares = rows[:, -len(TIMES) :].T
        times = rounds.get(phase) or pairs.get(phase.removesuffix("/reward"), {})
        before = [number(times.get(key)) for key in ("sample_seconds", "score_seconds")]
        split[phase] = [*before, seconds.sum(), *((seconds * share).sum() for share in shares)]
    return split


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
    return [file for phase in METHODS[known.method].phases(known, 0) for file in phase.files]


def number(value: Any) -> float:
    """Return a value as a float: NaN for a missing one, infinity for one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) < 1e30 else math.inf  # a NaN compares as false, and so becomes infinity
