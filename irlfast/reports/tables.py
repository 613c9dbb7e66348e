"""The tables of a run's page, as texts."""

from typing import Any, NamedTuple

import numpy as np

from irlfast.reports.files import column, interval, mapping
from irlfast.reports.metrics import SPEED, measured_in
from irlfast.reports.render import show

PARTS = (
    *("sampling", "scoring", "training", "data", "forward", "backward", "optimiser", "communication", "checkpoints"),
    "evaluation",
)
COUNTS = {  # of a set of rows in data.json
    "rows": "rows read",
    "kept": "rows kept",
    "empty_answers": "dropped: empty answer",
    "duplicates": "dropped: duplicate",
    "too_long": "dropped: too long",
    "cut_prompts": "prompts cut",
    "cut_answers": "answers cut",
    "cut_at_end_token": "answers cut at an end token in the text",
    "prompts_also_in_train": "prompts that training has, too",
    "prompt_tokens": "prompt tokens",
    "answer_tokens": "answer tokens",
}
PAIRS = {  # of pairs.json
    "pairs": "pairs",
    "dropped_identical": "dropped: identical",
    "dropped_empty": "dropped: empty",
    "from_history": "from earlier stages",
    "synthetic_tokens": "synthetic tokens",
}

MISMATCH = {  # of pairs.json and round.json: how far sampler and trainer are apart, and why
    "sampling/sampling_logp_difference/mean": "mean difference of a token, nats",
    "sampling/sampling_logp_difference/max": "largest, nats",
    "sampling/importance_sampling_ratio/min": "least ratio of an answer",
    "sampling/importance_sampling_ratio/mean": "mean ratio",
    "sampling/importance_sampling_ratio/max": "largest ratio",
    "sampling/staleness": "steps old",
}


class Row(NamedTuple):
    name: str
    cells: list[str]
    tags: tuple[str, ...] = ()
    strong: bool = False


class Table(NamedTuple):
    heads: list[str]  # the first is that of the rows' names
    rows: list[Row]


def held_out_table(evals: dict[str, dict], first: str, kept: str) -> Table:
    """Tabulate the held-out metrics of every policy, with their intervals where the run has them."""
    shown = measured_in(evals)
    rows = []
    for phase, row in evals.items():
        tags = (*(["first"] if phase == first else []), *(["final"] if phase == kept else []))
        cells = [with_interval(row, metric.key, metric.form) for metric in shown]
        rows.append(Row(phase, cells, tags, phase == kept))
    return Table(["policy", *(metric.column for metric in shown)], rows)


def with_interval(row: dict[str, Any], key: str, form: str) -> str:
    """Write a value, and its 95% interval in brackets if there is one."""
    low, high = interval(row, key)
    ends = "" if low is None or high is None else f" [{show(low, form)}, {show(high, form)}]"
    return show(row.get(key), form) + ends


def data_table(data: dict[str, dict[str, Any]]) -> Table:
    """Tabulate how many rows of each set were read, kept, dropped and cut."""
    named = {key: name for key, name in COUNTS.items() if any(key in counts for counts in data.values())}
    rows = [Row(name, [show(counts.get(key)) for counts in data.values()]) for key, name in named.items()]
    return Table(["", *data], rows)


def pairs_table(pairs: dict[str, dict[str, Any]]) -> Table:
    """Tabulate the pairs that each stage trained on, and those it dropped."""
    rows = [Row(phase, [show(row.get(key)) for key in PAIRS]) for phase, row in pairs.items()]
    return Table(["stage", *PAIRS.values()], rows)


def mismatch_table(*files: dict[str, dict[str, Any]]) -> Table:
    """Tabulate the mismatch between sampler and trainer of the phases whose files have it."""
    measured = {phase: row for each in files for phase, row in each.items() if any(key in row for key in MISMATCH)}
    named = {key: name for key, name in MISMATCH.items() if any(key in row for row in measured.values())}
    rows = [Row(phase, [show(row.get(key), ".3g") for key in named]) for phase, row in measured.items()]
    return Table(["phase", *named.values()], rows)


def leaks_table(leaks: dict[str, dict[str, Any]]) -> Table:
    """Tabulate how well trivial features tell the experts' answers from the others that a reward learns from."""
    checks = list(dict.fromkeys(check for row in leaks.values() for check in row))
    rows = [Row(phase, [show(row.get(check), ".1%") for check in checks]) for phase, row in leaks.items()]
    return Table(["reward of", *checks], rows)


def times_table(times: dict[str, list[Any]]) -> Table:
    """Tabulate the seconds of each phase (``files.split_time``)."""
    rows = [Row(phase, [show(value, ",.1f") for value in seconds]) for phase, seconds in times.items()]
    return Table(["phase", *PARTS], rows)


def speed_table(metrics: dict[str, np.ndarray]) -> Table:
    """Tabulate the median speed and the most memory of each phase, from ``[steps, LOGGED]``."""
    measured = [each for each in SPEED if any(np.isfinite(column(rows, each.key)).any() for rows in metrics.values())]
    rows = []
    for phase, logged in metrics.items():
        cells = []
        for each, values in zip(measured, column(logged, *(each.key for each in measured)).T, strict=True):
            finite = values[np.isfinite(values)]
            cells.append(show(float(each.summary(finite)), each.form) if len(finite) else "–")
        rows.append(Row(phase, cells))
    return Table(["phase", *(each.column for each in measured)], rows)


def starts_table(starts: list[dict[str, Any]]) -> Table:
    """Tabulate the starts of a run: the first, and those that resumed it."""
    packages = list(dict.fromkeys(name for start in starts for name in mapping(start, "versions")))
    rows = []
    for start in starts:
        versions = mapping(start, "versions")
        cells = [start.get("device"), start.get("processes"), *(versions.get(name) for name in packages)]
        rows.append(Row(str(start.get("time", "–")), ["–" if cell is None else str(cell) for cell in cells]))
        changes = start.get("changes")
        rows[-1].cells.append("; ".join(map(str, changes)) if isinstance(changes, list) and changes else "–")
    return Table(["started", "device", "processes", *packages, "changed keys"], rows)
