"""The page of an evaluation: which models are better than the baseline, by how much, and how sure that is."""

from pathlib import Path
from typing import Any

import numpy as np

from irlfast.evaluation import leaderboard
from irlfast.evaluation.figures import figure_of
from irlfast.evaluation.statistics import share_interval
from irlfast.evaluation.table import is_shown
from irlfast.reports.browser import evaluation_samples
from irlfast.reports.charts import draw_log_ratios
from irlfast.reports.evaluation_charts import draw_by_samples, draw_calibration, draw_differences, draw_perplexity
from irlfast.reports.files import (
    log_ratios_in,
    mapping,
    number,
    objects,
    objects_in,
    read_lines,
    read_object,
    read_parts,
    read_settings,
    read_starts,
)
from irlfast.reports.render import page_text, show, with_ends
from irlfast.reports.tables import Row, Table, starts_table

JUDGED = ("prompts", "wins", "losses", "ties", "disagreements", "unjudged")  # of judge/MODEL/counts.json


def evaluation_text(folder: Path) -> str:
    """Return the page of an evaluation, made from the files that are there."""
    notes: list[str] = []
    text, settings = read_settings(folder / "evaluation.yaml", notes)
    figures = read_object(folder, "figures.json", notes)
    models, differences = (objects(figures.get(key), 2) for key in ("models", "differences"))
    curves = curves_in(figures)
    starts = read_starts(folder, notes)
    baseline = str(figures.get("baseline", ""))
    names = list(dict.fromkeys(name for each in models.values() for name in each))
    values = {
        "title": title_of(settings),
        "headline": headline(differences, baseline),
        "verdicts": [(model, *verdict(each)) for model, each in differences.items()],
        "baseline": baseline,
        "figures": figures_table(models, names, baseline),
        "differences": [(model, differences_table(each)) for model, each in differences.items()],
        "seeds": seeds_in(figures),
        "forest": draw_differences(differences, names),
        "likelihood": [
            *draw_perplexity({model: each["perplexity"] for model, each in curves.items()}),
            *draw_calibration({model: each["calibration"] for model, each in curves.items()}),
        ],
        "by_samples": [
            *draw_by_samples(curves, "pass", "one of n samples"),
            *draw_by_samples(curves, "best_of", "best of n samples by"),
        ],
        "log_ratios": draw_log_ratios(ratios_of(folder, models)),
        "judge": judge_table(folder, list(models)),
        "leaderboard": leaderboard_table(folder, list(models)),
        "leaderboard_differences": [
            (model, differences_table(each))
            for model, each in objects(read_object(folder, "leaderboard/differences.json", []), 2).items()
        ],
        "samples": evaluation_samples(folder, list(models), notes) if models else None,
        "starts": starts,
        "started": starts_table(starts),
        "data": read_object(folder, "data.json", notes),
        "settings": text,
        "notes": notes,
    }
    return page_text("evaluation.html.j2", values)


def curves_in(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the curves of every model, by their kind: lists of points, or such lists by the names of figures."""
    curves = {}
    for model, each in objects(figures.get("curves")).items():
        lists = {kind: objects_in(each, kind) for kind in ("perplexity", "calibration")}
        named = {kind: mapping(each, kind) for kind in ("pass", "best_of")}
        curves[model] = lists | {kind: {name: objects_in(of, name) for name in of} for kind, of in named.items()}
    return curves


def seeds_in(figures: dict[str, Any]) -> list[tuple[str, Table]]:
    """Return the names of the models of each group of seeds, and the table of the group's differences."""
    groups = objects(figures.get("seeds")).values()
    names = [group["models"] if isinstance(group.get("models"), list) else [] for group in groups]
    tables = [differences_table(objects(group.get("differences"))) for group in groups]
    return [(", ".join(map(str, each)), table) for each, table in zip(names, tables, strict=True)]


def title_of(settings: dict[str, Any]) -> list[str]:
    if not settings:
        return ["evaluation"]
    return ["evaluation", str(settings.get("eval_dataset_name") or settings.get("dataset_name"))]


# ---------------------------------------------------------------- the verdict


def verdict(differences: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Return a word for a model's differences to the baseline, and the sentence that gives its reason."""
    titles: dict[str, list[str]] = {"better on": [], "worse on": [], "different on": [], "not shown to differ on": []}
    for name, each in differences.items():
        phrase = "different on" if is_shown(each) else "not shown to differ on"
        if each.get("better") is not None:
            phrase = "better on" if each["better"] else "worse on"
        titles[phrase].append(figure_of(name).title)
    word = "No difference shown"
    if titles["better on"] or titles["worse on"]:
        word = "Worse" if not titles["better on"] else "Mixed" if titles["worse on"] else "Improved"
    unclear = len(titles.pop("not shown to differ on"))
    parts = [f"{phrase} {' · '.join(each)}" for phrase, each in titles.items() if each]
    parts += [f"not shown to differ on {unclear} figure{'s' if unclear > 1 else ''}"] if unclear else []
    return word, "; ".join(parts) or "not compared"


def headline(differences: dict[str, dict[str, Any]], baseline: str) -> tuple[str, str]:
    """Return the verdict of the page, and a sentence that gives its reason."""
    if not differences:
        return "One model", "There is no second model to compare with."
    words = [verdict(each)[0] for each in differences.values()]
    counts = {word: words.count(word) for word in dict.fromkeys(words)}
    reason = "Paired tests on the same prompts, at the 95% level after Holm's correction over a model's figures."
    if len(words) == 1:
        [(model, each)] = differences.items()
        return words[0], f"Against {baseline}, {model} is {verdict(each)[1]}. {reason}"
    parts = ", ".join(f"{count} {word.lower()}" for word, count in counts.items())
    return (words[0] if len(counts) == 1 else "Mixed"), f"Against {baseline}: {parts}. {reason}"


# ---------------------------------------------------------------- tables


def figures_table(models: dict[str, dict[str, Any]], names: list[str], baseline: str) -> Table:
    """Tabulate the mean of every figure of every model, with its 95% interval and its count."""
    rows = []
    for name in names:
        figure = figure_of(name)
        arrow = {"higher": " ↑", "lower": " ↓"}.get(figure.better, "")
        rows.append(
            Row(figure.title + arrow, [figure_cell(each.get(name)) for each in models.values()], (figure.unit,))
        )
    return Table(["figure", *(f"{model} (baseline)" if model == baseline else model for model in models)], rows)


def figure_cell(figure: dict[str, Any] | None) -> str:
    if not isinstance(figure, dict):
        return "–"
    return f"{with_ends(figure, ',.4g')}, n = {show(figure.get('count'))}"


def differences_table(differences: dict[str, dict[str, Any]]) -> Table:
    """Tabulate a model's differences to the baseline with their tests and verdicts."""
    rows = []
    for name, each in differences.items():
        cells = [with_ends(each, "+,.4g"), show(each.get("p"), ".2g"), show(each.get("p_holm"), ".2g")]
        cells += [str(each.get("test", "–")), show(each.get("count")), str(each.get("verdict", "–"))]
        rows.append(Row(figure_of(name).title, cells, strong=each.get("better") is not None))
    return Table(["figure", "difference", "p", "p after Holm", "test", "prompts", "verdict"], rows)


def judge_table(folder: Path, models: list[str]) -> Table:
    """Tabulate the judge's verdicts on each model against the baseline."""
    rows = []
    for model in models:
        counts = read_object(folder, f"judge/{model}/counts.json", [])
        outcomes = [row.get("outcome") for row in read_lines(folder, f"judge/{model}/outcomes.jsonl", [])]
        known = np.array([value for value in map(number, outcomes) if np.isfinite(value)])
        if counts:
            rate = share_interval(known)._asdict() if len(known) else {}
            cells = ["–" if not rate else with_ends(rate, ".1%"), *(show(counts.get(key)) for key in JUDGED)]
            rows.append(Row(model, [*cells, show(counts.get("named_first"), ".1%"), str(counts.get("judge", "–"))]))
    return Table(["model", "win rate, ties as half", *JUDGED, "verdicts that name the first answer", "judge"], rows)


def leaderboard_table(folder: Path, models: list[str]) -> Table:
    """Tabulate the six tasks of the leaderboard in per cent, and the published figures below."""
    rows = []
    for model in models:
        board = {"tasks": objects(read_object(folder, f"leaderboard/{model}.json", []).get("tasks"), 3)}
        figures = [*(leaderboard.figure_of(board, task) for task in leaderboard.TASKS), leaderboard.average_of(board)]
        if any(figures):
            rows.append(Row(model, [leaderboard.with_interval(figure, 100, 2) for figure in figures]))
    for published in leaderboard.PUBLISHED if rows else ():
        known = [f"{figure:.2f}" for figure in published.figures] or ["–"] * len(leaderboard.TASKS)
        rows.append(Row(published.model, [*known, f"{published.average:.2f}"], (published.source,)))
    heads = [f"{task.title}, {task.shots} shots" for task in leaderboard.TASKS]
    return Table(["model", *heads, "average"], rows)


# ---------------------------------------------------------------- rows


def ratios_of(folder: Path, models: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Read the models' log-ratios to the baseline; models without any are left out."""
    ratios = {model: log_ratios_in(filter(None, read_parts(folder, model, []))) for model in models}
    return {model: each for model, each in ratios.items() if len(each["expert"])}
