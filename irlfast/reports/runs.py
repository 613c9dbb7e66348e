"""The page of several runs: what differs in their configurations, their curves, and their final policies compared."""

from pathlib import Path
from typing import Any

from irlfast.common.files import InputError
from irlfast.reports.browser import samples
from irlfast.reports.charts import draw_runs
from irlfast.reports.files import RunFiles, number, read_lines, read_run, split_time
from irlfast.reports.metrics import measured_in
from irlfast.reports.render import page_text, show
from irlfast.reports.tables import Row, Table, starts_table, with_interval
from irlfast.reports.verdict import CHANGED_ROWS, Change, changes_of, headline, judged_numbers

SAME_FOR_ALL = ("exact_match", "nll")  # figures that do not depend on a run's own first policy
NOT_COMPARED = ("output_dir", "run_name")  # keys of the configuration


def runs_text(folders: list[Path]) -> str:
    """Return the page of several runs; the first is the one that the others are compared with.

    Raises:
        InputError: a folder is no run.
    """
    runs = dict(zip(names_of(folders), map(read_run, folders), strict=True))
    [first, *others] = runs
    compared = {name: compare_runs(runs[first], runs[name]) for name in others}
    values = {
        "title": ["runs", *runs],
        "headline": headlines(first, compared),
        "first": first,
        "compared": compared,
        "notes": [f"{name}: {note}" for name, run in runs.items() for note in run.notes],
        "policies": policies_table(runs),
        "keys": keys_table(runs),
        "curves": draw_runs({name: run.metrics for name, run in runs.items()}),
        "samples": final_answers(runs),
        "starts": [(name, starts_table(run.starts)) for name, run in runs.items() if run.starts],
    }
    return page_text("runs.html.j2", values)


def names_of(folders: list[Path]) -> list[str]:
    """Return the folders' own names; their paths where two folders have one name.

    Raises:
        InputError: a folder is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"{', '.join(map(str, folders))}: found a folder twice, expected different runs")
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def compare_runs(first: RunFiles, other: RunFiles) -> tuple[list[Change], str]:
    """Compare the final policies of two runs; return the changes, or the reason why there are none."""
    if not first.evals or not other.evals:
        return [], "a run has no policy that was evaluated"
    if held_out_prompts(first) != held_out_prompts(other):
        return [], "their held-out prompts or prompt templates differ"
    try:
        before, after = (judged_numbers(run.folder / run.kept, SAME_FOR_ALL) for run in (first, other))
        return changes_of(before, after), ""
    except CHANGED_ROWS as error:
        return [], f"{error}"


def held_out_prompts(run: RunFiles) -> list[tuple[Any, Any]]:
    """Return the prompt and the expert's answer of each row of the final policy's answers."""
    rows = read_lines(run.folder, f"{run.kept}/answers.jsonl", [])
    return [(row.get("prompt"), row.get("expert")) for row in rows]


def final_answers(runs: dict[str, RunFiles]) -> dict[str, Any] | None:
    """Read the final policies' answers for ``samples.html.j2``, of the first run and those with the same prompts."""
    evaluated = {name: run for name, run in runs.items() if run.evals}
    prompts = {name: held_out_prompts(run) for name, run in evaluated.items()}
    same = [name for name in evaluated if prompts[name] and prompts[name] == prompts.get(next(iter(runs)))]
    if not same:
        return None
    answers = {name: read_lines(runs[name].folder, f"{runs[name].kept}/answers.jsonl", []) for name in same}
    return samples(answers, same[0], same[-1])


def headlines(first: str, compared: dict[str, tuple[list[Change], str]]) -> tuple[str, str]:
    """Return the verdict of the page, and a sentence per run that gives its reason."""
    words, sentences = [], []
    for name, (changes, why) in compared.items():
        word, sentence = headline(changes, first, name) if changes else ("Not comparable", f"{name}: {why}.")
        words.append(word)
        sentences.append(sentence)
    return (words[0] if len(set(words)) == 1 else "Mixed"), " ".join(sentences)


def policies_table(runs: dict[str, RunFiles]) -> Table:
    """Tabulate the final policy of every run."""
    shown = measured_in({name: run.evals[run.kept] for name, run in runs.items() if run.evals})
    rows = []
    for name, run in runs.items():
        kept = run.evals.get(run.kept, {})
        seconds = sum(filter(None, (whole_seconds(each) for each in split_time(run).values())))
        cells = [str(run.config.get("method", "–")), run.kept or "–", show(seconds, ",.0f")]
        rows.append(Row(name, [*cells, *(with_interval(kept, metric.key, metric.form) for metric in shown)]))
    heads = ["run", "method", "final policy", "seconds", *(metric.column for metric in shown)]
    return Table(heads, rows)


def whole_seconds(times: list[Any]) -> float:
    """Return the seconds of a phase: sampling, scoring, training and evaluation."""
    sampling, scoring, training, *_, evaluation = (number(value) for value in times)
    return sum(value for value in (sampling, scoring, training, evaluation) if value == value)


def keys_table(runs: dict[str, RunFiles]) -> Table:
    """Tabulate the keys whose values differ, and the fingerprints of the data."""
    rows = [Row("data (fingerprint)", [str(run.data.get("fingerprint", "–")) for run in runs.values()])]
    keys = dict.fromkeys(key for run in runs.values() for key in run.config)
    for key in keys:
        values = [run.config.get(key) for run in runs.values()]
        if key not in NOT_COMPARED and any(value != values[0] for value in values):
            rows.append(Row(str(key), [str(value) for value in values]))
    return Table(["key", *runs], rows)
