"""The sample browser: the part of a page that shows held-out prompts with the answers of several models side by side.

A page includes ``samples.html.j2``, ``samples.css`` and ``samples.js``, and gives the template what ``samples``
returns. The texts travel as JSON, and the script shows them as text alone.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, repeat, tee, zip_longest
from pathlib import Path
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from rapidfuzz.distance import Indel

from irlfast.evaluation.figures import figure_of
from irlfast.reports.files import RunFiles, mapping, number, read_lines, read_parts

PROMPTS = 1000  # prompts on the page
BYTES = 2_000_000  # of JSON on the page
CHARACTERS = 4000  # of each text on the page
SAMPLES = 16  # of a prompt and a model, on the page, beside the greedy answer
CHANGES = {(1, 1): "kept", (0, 1): "gained", (1, 0): "lost", (0, 0): "never"}

Row = dict[str, Any]


def run_samples(run: RunFiles) -> Row:
    """Read the answers of a run's policies for ``samples.html.j2``. A missing or broken file becomes a note."""
    answers = {phase: read_lines(run.folder, f"{phase}/answers.jsonl", run.notes) for phase in run.evals}
    return samples(answers, run.first, run.kept)


def evaluation_samples(folder: Path, models: Sequence[str], notes: list[str]) -> Row:
    """Read the answers of an evaluation's models for ``samples.html.j2``: the baseline, which is the first, and others.

    The judge's outcomes become the figure ``win_rate``: 1 for a win against the baseline, 0.5 for a tie, 0 for a loss.
    """
    prompts = tee(read_lines(folder, "prompts.jsonl", notes), len(models))
    rows = {name: model_rows(folder, name, own, notes) for name, own in zip(models, prompts, strict=True)}
    return samples(rows, models[0], models[-1])


def model_rows(folder: Path, model: str, prompts: Iterator[Row], notes: list[str]) -> Iterator[Row]:
    """Yield each prompt with the model's row, up to the model's last row."""
    outcomes: Iterator[Row] = repeat({"outcome": 0.5} if (folder / "judge").is_dir() else {})  # a tie with itself
    if (folder / "judge" / model).is_dir():
        outcomes = read_lines(folder, f"judge/{model}/outcomes.jsonl", notes)
    rows = read_parts(folder, model, notes)
    for row, prompt, verdict in zip(rows, prompts, chain(outcomes, repeat({})), strict=False):
        judged = {"win_rate": verdict["outcome"]} if verdict.get("outcome") is not None else {}
        own = row or {}
        yield {**prompt, **own, "figures": {**mapping(own, "figures"), **judged}}


def samples(models: Mapping[str, Iterable[Row | None]], first: str, kept: str) -> Row:
    """Join the answers of several models, prompt by prompt, for ``samples.html.j2``.

    The first prompts are on the page: at most ``PROMPTS``, and at most ``BYTES`` of JSON. All prompts are counted.

    Args:
        models: name -> rows in the order of the prompts; None where a model has no answer. A row has ``prompt``,
            ``expert`` and ``answer``, and may have ``rejected`` (text), ``figures`` (name -> number), ``samples``
            (texts), ``sample_figures`` (name -> a number per sample) and ``expert_tokens`` (pairs of a token's text and
            its log-probability in nats).
        first: the model that the page compares with.
        kept: the model that the page compares.

    Returns:
        ``data`` for the script; ``total``, the number of prompts; ``shown``, how many of them are on the page;
        ``counts``, how many answers of all prompts are identical to the expert's for both models (``kept``), only for
        the second (``gained``), only for the first (``lost``), for neither (``never``).
    """
    names = list(models)
    one, two = names.index(first), names.index(kept)
    counts = dict.fromkeys(CHANGES.values(), 0)
    shown: list[Row] = []
    total = size = 0
    for total, rows in enumerate(zip_longest(*models.values()), 1):
        joined = join(total, rows)
        change = change_of(joined["answers"][one], joined["answers"][two])
        if change:
            counts[change] += 1
        size += len(htmlsafe_json_dumps(joined))
        if total <= PROMPTS and size <= BYTES:
            shown.append(joined)
    answers = [answer for row in shown for answer in row["answers"] if answer]
    figures = {name: figure_of(name) for answer in answers for name in answer["figures"]}
    kinds = {name: {"title": figure.title, "better": figure.better} for name, figure in figures.items()}
    drawn = (sample for answer in answers for sample in answer.get("samples", ()))
    titles = {name: figure_of(name).title for sample in drawn for name in sample["figures"]}
    data = {
        "models": names,
        "first": one,
        "kept": two,
        "figures": kinds,
        "titles": titles | {name: kind["title"] for name, kind in kinds.items()},
        "rows": shown,
    }
    return {"data": data, "total": total, "shown": len(shown), "counts": counts}


def join(place: int, rows: tuple[Row | None, ...]) -> Row:
    """Return a prompt for the script: its number, its texts, and each model's answer or None.

    Rows of a broken file can have moved up, so an answer to another prompt counts as missing.
    """
    told = next((row for row in rows if row), {})
    texts = {name: clip(told[name]) for name in ("prompt", "expert", "rejected") if told.get(name) is not None}
    ours = [row if row and row.get("prompt") == told.get("prompt") else None for row in rows]
    return {"number": place, **texts, "answers": [answer_of(row, told.get("expert")) for row in ours]}


def answer_of(row: Row | None, expert: str | None) -> Row | None:
    """Return an answer for the script: its pieces, figures and samples, and the expert's tokens with their scores."""
    if not row or row.get("answer") is None:
        return None
    answer = str(row["answer"])
    figures = {name: rounded(value) for name, value in mapping(row, "figures").items()}
    if expert is not None:
        figures.setdefault("exact_match", float(answer.strip() == str(expert).strip()))
    given = row.get("expert_tokens")
    pairs = [each for each in given if isinstance(each, list) and len(each) == 2] if isinstance(given, list) else []
    tokens = [[str(text), rounded(logp)] for text, logp in pairs]
    known = tokens and all(logp is not None for _, logp in tokens)
    split = [["=", clip(answer)]] if expert is None else pieces(clip(expert), clip(answer))
    drawn = samples_of(row)
    return {"pieces": split, "figures": figures} | ({"tokens": tokens} if known else {}) | drawn


def samples_of(row: Row) -> Row:
    """Return the further samples of an answer, each with its figures, and how many there are; nothing without any."""
    texts = row.get("samples")
    if not isinstance(texts, list) or not texts:
        return {}
    columns = {name: values for name, values in mapping(row, "sample_figures").items() if isinstance(values, list)}
    drawn = [
        {
            "text": clip(text),
            "figures": {name: rounded(values[i]) for name, values in columns.items() if i < len(values)},
        }
        for i, text in enumerate(texts[:SAMPLES])
    ]
    return {"samples": drawn, "sample_count": len(texts)}


def change_of(before: Row | None, after: Row | None) -> str | None:
    """Return what became of an answer, right or wrong; None if one of the two is missing."""
    if not before or not after:
        return None
    return CHANGES.get((before["figures"].get("exact_match"), after["figures"].get("exact_match")))


def rounded(value: Any) -> float | None:
    """Round to six digits, for a smaller page. A value that is no finite number becomes None, as JSON has no NaN."""
    return float(f"{value:.6g}") if math.isfinite(number(value)) else None


def clip(text: Any) -> str:
    text = str(text)
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} … ({len(text) - CHARACTERS:,} more characters)"


def pieces(expert: str, answer: str) -> list[list[str]]:
    """Split an answer at its differences to the expert's.

    A piece is ``["=", text]`` where both agree, ``["+", text]`` where the expert's answer lacks the text, and
    ``["-", text]`` where only the expert's answer has it. An answer that is not close to the expert's has no pieces of
    the last kind: they would drown the answer.
    """
    theirs, ours = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (expert, answer))
    close = Indel.normalized_similarity(theirs, ours) > 0.5
    split = []
    for equal, steps in groupby(Indel.opcodes(theirs, ours), lambda step: step.tag == "equal"):
        begin, *_, end = [*steps] * 2
        missing = "".join(theirs[begin.src_start : end.src_end])
        words = "".join(ours[begin.dest_start : end.dest_end])
        if missing and close and not equal:
            split.append(["-", missing])
        if words:
            split.append(["=" if equal else "+", words])
    return split
