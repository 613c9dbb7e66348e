"""The pages of runs and evaluations whose files are changed, damaged or hostile: texts stay text."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from altair.utils.schemapi import debug_mode
from hypothesis import strategies as st

from irlfast.report import page_of
from tests.fuzz.guards import WORK, fresh_folder, refusal
from tests.fuzz.inputs import changed, damaged, values
from tests.reports import test_other_pages
from tests.reports.test_report import Page

LEAKS = {"length": 0.6, "first_token": 0.5}
ROUND = {"sample_seconds": 1.0, "score_seconds": 0.5, "reward": 0.1}
ROUND |= {"sampling/sampling_logp_difference/mean": 0.01, "sampling/importance_sampling_ratio/max": 1.5}
PAIRS = {"pairs": 10, "dropped_identical": 1, "sample_seconds": 2.0, "score_seconds": 1.0}
START = {
    "time": "2026-01-01 00:00:00",
    "command": "irlfast train",
    "device": "cpu",
    "processes": 1,
    "versions": {"a": "1"},
}
EVAL = {"nll": 2.0, "exact_match": 0.5, "margin": 1.0, "count": 3, "seconds": 1.0, "intervals": {"nll": [1.0, 3.0]}}
ANSWER = {
    "prompt": "p",
    "expert": "an answer",
    "answer": "the answer",
    "rejected": "no",
    "figures": {"exact_match": 0.0, "nll": 2.0, "margin": 1.0},
    "expert_tokens": [["an", -1.0], [" answer", -2.0]],
    "log_ratios": {"expert": 0.5, "synthetic": [0.1, 0.2]},
}
METRIC = {"phase": "stage-00", "step": 1, "loss": 1.0, "rewards/margins": 0.1, "seconds": 1.0, "tokens_per_second": 9.0}
RUN_FILES: dict[str, Any] = {
    "config.yaml": {"method": "irft", "stages": 1, "beta": 0.1, "model_name_or_path": "m", "output_dir": "o"},
    "metrics.jsonl": [METRIC, METRIC | {"step": 2}],
    "data.json": {"fingerprint": "0123", "remarks": ["a remark"], "train": {"rows": 3, "kept": 2}},
    "starts.jsonl": [START],
    "final/policy.json": {"kept": "stage-00", "why": "the last", "phases": ["sft", "stage-00"]},
    "sft/eval.json": EVAL,
    "sft/answers.jsonl": [ANSWER] * 3,
    "stage-00/eval.json": EVAL,
    "stage-00/answers.jsonl": [ANSWER | {"answer": "an answer"}] * 3,
    "stage-00/pairs.json": PAIRS,
    "stage-00/reward/leaks.json": LEAKS,
    "stage-00/round-00/round.json": ROUND,
}
BOARD = {
    "tasks": {"gsm8k": {"conditions": {"shots": 5}, "figures": {"exact_match,strict-match": {"mean": 0.1, "low": 0.0}}}}
}


def jsonl(rows: Any) -> bytes:
    return "\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows])).encode()


def written(name: str, value: Any) -> bytes:
    """Return the content of a file with this value; lone surrogates, which no file has, are replaced."""
    if name.endswith(".yaml"):
        return yaml.safe_dump(json.loads(json.dumps(value))).encode(errors="replace")
    return jsonl(value) if name.endswith(".jsonl") else json.dumps(value).encode()


@functools.cache
def evaluation_files() -> dict[str, Any]:
    """Return the files of a small evaluation with two models: name -> value."""
    test_other_pages.PROMPTS, before = 8, test_other_pages.PROMPTS
    try:
        folder = test_other_pages.evaluation(WORK / "evaluation", ("base", "other"))
    finally:
        test_other_pages.PROMPTS = before
    files: dict[str, Any] = {
        "judge/other/counts.json": {"prompts": 8, "wins": 3, "losses": 2, "ties": 3, "judge": "j", "named_first": 0.5},
        "judge/other/outcomes.jsonl": [{"outcome": each} for each in (1.0, 0.5, 0.0, None) * 2],
        "leaderboard/other.json": BOARD,
        "starts.jsonl": [START],
    }
    for path in (path for path in folder.rglob("*") if path.is_file()):
        text, name = path.read_text(), path.relative_to(folder).as_posix()
        if name.endswith(".jsonl"):
            files[name] = [json.loads(line) for line in text.splitlines()]
        else:
            files[name] = yaml.safe_load(text)
    shutil.rmtree(folder)
    return files


@st.composite
def folders(draw: Any, files: dict[str, Any]) -> dict[str, bytes | None]:
    """Draw the files of a folder that differ: name -> content, None for a file that is deleted."""
    edits: dict[str, bytes | None] = {}
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=3)):
        what = draw(st.sampled_from(["change", "change", "value", "damage", "delete"]))
        if what == "change":
            edits[name] = written(name, draw(changed(files[name])))
        elif what == "value":
            edits[name] = written(name, draw(values))
        elif what == "damage":
            edits[name] = draw(damaged(written(name, files[name])))
        else:
            edits[name] = None
    return edits


@st.composite
def pages(draw: Any) -> tuple:
    kind = draw(st.sampled_from(["run", "runs", "evaluation"]))
    name = draw(st.sampled_from(["one", "<b>", "a&b"]))
    return kind, name, draw(folders(evaluation_files() if kind == "evaluation" else RUN_FILES))


INPUTS = pages()
EXAMPLES: list[Any] = [
    ("runs", "one", {"metrics.jsonl": b"null"}),
    ("run", "one", {"stage-00/answers.jsonl": b'{"prompt": "p", "answer": "a", "expert_tokens": [1]}'}),
    (
        "evaluation",
        "one",
        {"figures.json": b'{"models": {"a": 1}, "curves": {"a": 3}, "differences": {"a": {"b": true}}}'},
    ),
]


def write_folder(folder: Path, files: dict[str, Any], edits: dict[str, bytes | None]) -> None:
    for name in {**files, **edits}:
        content = edits[name] if name in edits else written(name, files[name])
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def check(drawn: tuple) -> None:
    kind, name, edits = drawn
    folder = fresh_folder()
    write_folder(folder / name, evaluation_files() if kind == "evaluation" else RUN_FILES, edits)
    given = [folder / name]
    if kind == "runs":
        write_folder(folder / "other", RUN_FILES, {})
        given.append(folder / "other")
    refusal(check_page, given, names=[str(folder)])


def check_page(given: list[Path]) -> None:
    """Check that the page is well formed, loads nothing, and runs its own scripts alone."""
    with debug_mode(False):  # Altair's own checks of its charts take a second
        page = Page(page_of(given))
    assert not page.open and not page.active
    assert all(reference.startswith("#") for reference in page.references)
    assert len(page.scripts) == page.policy.count("sha256-") == 3
