"""The report opens offline, escapes all texts, stays small, and copes with missing or broken files."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from irlfast.common.files import InputError
from irlfast.reports.files import TIMES, number, read_metrics, read_phases, split_time
from irlfast.reports.metrics import TRAINING_KEYS
from irlfast.reports.page import clip, compare_nll, compare_shares, headline, mark, write_report

VOID = {"meta", "br", "use", "path", "input", "img", "hr", "link"}


class Page(HTMLParser):
    """Parse a page, check that its tags are balanced, and collect everything that a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.active: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        if tag in {"script", "iframe", "object", "embed", "img", "link", "base", "form"}:
            self.active.append(tag)
        for name, value in attributes:
            if name in {"href", "src", "xlink:href", "action", "srcset", "data"}:
                self.references.append(value or "")
            if name.startswith("on"):
                self.active.append(name)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def page_of(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not page.active
    assert all(reference.startswith("#") for reference in page.references)
    assert not re.search(r"url\((?!['\"]?#)|@import", text)
    assert len(text) < 2_000_000
    return text, page


@pytest.fixture
def copied(finished, tmp_path):
    """Copy a finished run without its weights, for a test to damage."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("*.safetensors", "samples", "report.html"))
    return folder


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_page_of_a_finished_run_shows_its_metrics_and_answers(copied):
    text, page = page_of(copied)
    words = " ".join(" ".join(page.words).split())
    for phase in ("sft", "stage-00", "stage-01"):
        metrics = json.loads((copied / phase / "eval.json").read_text())
        assert f"{metrics['nll']:,.2f}" in words
        assert f"{metrics['exact_match']:.1%}" in words
    for line in (copied / "sft" / "answers.jsonl").read_text().splitlines()[:20]:
        assert json.loads(line)["expert"] in words
    for count in json.loads((copied / "data.json").read_text())["train"].values():
        assert f"{count:,}" in words
    assert "Missing from this run" not in words
    assert text.count("<svg") == 12
    assert "Reward margin" in words
    assert "not measured in this run" not in words


def test_the_time_of_a_phase_is_the_sum_of_its_logged_parts(copied):
    rows = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    pairs = read_phases(copied, "pairs.json", [])
    split = split_time(read_metrics(copied, TRAINING_KEYS + TIMES, []), pairs, {})
    assert list(split) == ["sft", "stage-00", "stage-01"]
    for phase, (sampling, scoring, training, *parts) in split.items():
        assert training == pytest.approx(sum(row["seconds"] for row in rows if row["phase"] == phase))
        assert sum(parts) == pytest.approx(training)
        if phase != "sft":
            assert [sampling, scoring] == [pairs[phase]["sample_seconds"], pairs[phase]["score_seconds"]]
    words = " ".join(" ".join(page_of(copied)[1].words).split())
    assert f"{split['stage-00'][2]:,.1f}" in words


def test_the_texts_of_models_and_users_are_never_markup(copied):
    evil = '</div><script>alert(1)</script><img src=x onerror="f()">&amp;\ud83d \u202e]]>'
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("method: irft", f"method: irft\nx: {json.dumps(evil)}"))
    for phase in ("sft", "stage-01"):
        rows = [{"prompt": evil, "expert": evil + "x", "answer": evil}] * 3
        (copied / phase / "answers.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    _, page = page_of(copied)
    assert sum("<script>alert(1)</script>" in part for part in page.words) >= 6


def test_long_answers_do_not_make_a_long_page(copied):
    row = json.dumps({"prompt": "<" * 50_000, "expert": "a b " * 50_000, "answer": "& b c " * 50_000})
    for phase in ("sft", "stage-01"):
        (copied / phase / "answers.jsonl").write_text("\n".join([row] * 40))
    step = json.loads((copied / "metrics.jsonl").read_text().splitlines()[-1])
    rows = [json.dumps(step | {"step": i, "loss": i % 7}) for i in range(1, 20_001)]
    (copied / "metrics.jsonl").write_text("\n".join(rows))
    _, page = page_of(copied)
    assert "more characters" in " ".join(page.words)


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "data.json",
        "final/policy.json",
        "stage-01/eval.json",
        "stage-01/pairs.json",
        "sft/answers.jsonl",
    ],
)
@pytest.mark.parametrize("harm", ["missing", "broken"])
def test_a_missing_or_broken_file_is_named(copied, name, harm):
    if harm == "missing":
        (copied / name).unlink()
    else:
        (copied / name).write_bytes(b'{"step": 1, "ph\xff')
    _, page = page_of(copied)
    words = " ".join(page.words)
    assert "Missing from this run" in words
    assert name in words


def test_the_page_of_a_stopped_run_counts_the_stages_that_are_done(copied):
    shutil.rmtree(copied / "final")
    shutil.rmtree(copied / "stage-01")
    _, page = page_of(copied)
    assert "1 of 2 stages have been evaluated." in " ".join(page.words)


def test_values_that_are_not_finite_get_a_warning(copied):
    rows = (copied / "metrics.jsonl").read_text().splitlines()
    rows[-1] = json.dumps(json.loads(rows[-1]) | {"loss": float("nan"), "rewards/margins": float("inf")})
    (copied / "metrics.jsonl").write_text("\n".join(rows))
    edit(copied / "stage-01" / "eval.json", nll=float("nan"))
    _, page = page_of(copied)
    words = " ".join(page.words)
    assert "loss: 1 logged value is not finite" in words
    assert "nll is no longer a finite number" in words
    assert "Worse" in words or "Mixed" in words


def test_the_same_files_give_the_same_page(copied):
    assert page_of(copied)[0] == page_of(copied)[0]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no config\.yaml"):
        write_report(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "irlfast.report", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no config.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("before", "after", "rows", "sign"),
    [(0.5, 0.6, 1000, 1), (0.5, 0.6, 20, 0), (0.6, 0.5, 1000, -1), (0.5, 0.5, 1000, 0), (0.5, None, 1000, None)],
)
def test_a_change_of_a_share_is_clear_beyond_two_standard_errors(before, after, rows, sign):
    assert compare_shares("exact match", before, after, rows)["sign"] == sign


@pytest.mark.parametrize(
    ("before", "after", "sign"),
    [(2.0, 1.9, 1), (2.0, 2.03, 0), (2.0, 2.1, -1), (2.0, float("nan"), -1), (None, 2.0, None)],
)
def test_a_change_of_the_likelihood_is_clear_beyond_two_percent(before, after, sign):
    assert compare_nll(before, after)["sign"] == sign


@pytest.mark.parametrize(
    ("signs", "word"),
    [((1, 0, 1), "Improved"), ((1, -1, 0), "Mixed"), ((0, -1, 0), "Worse"), ((0, 0, None), "No clear change")],
)
def test_the_headline_follows_the_signs(signs, word):
    changes = [{"name": str(i), "sign": sign} for i, sign in enumerate(signs)]
    assert headline(changes, "sft", "stage-01")[0] == word
    assert headline(changes, "sft", "sft")[0] == "No change"


def test_the_marked_answer_without_its_marks_is_the_answer():
    marked = str(mark("the cat sat", "the <dog> sat"))
    kept = re.sub(r"<del>.*?</del>", "", marked)
    assert re.sub(r"</?mark>", "", kept) == "the &lt;dog&gt; sat"
    assert "<mark>" in marked


def test_a_long_text_is_clipped_and_only_numbers_are_numbers():
    assert clip("x" * 1200) == "x" * 1200
    assert clip("x" * 1201).endswith("… (1 more characters)")
    assert number(True) != number(True)  # a NaN
    assert number("3") != number("3")
    assert number(10**400) == float("inf")
