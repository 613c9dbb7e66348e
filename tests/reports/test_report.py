"""The report opens offline, escapes all texts, stays small, and copes with missing or broken files."""

import base64
import hashlib
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import altair as alt
import numpy as np
import pytest
import scipy.stats

import irlfast
from irlfast.common.files import InputError
from irlfast.reports.browser import BYTES, CHARACTERS
from irlfast.reports.charts import draw_timeline, vega
from irlfast.reports.files import number, read_run, split_time
from irlfast.reports.metrics import HELD_OUT, TRAINING
from irlfast.reports.page import write_report
from irlfast.reports.render import HERE, SCRIPTS, STYLES
from irlfast.reports.verdict import Change, compare_policies, headline

VOID = {"meta", "br", "use", "path", "input", "img", "hr", "link"}


class Page(HTMLParser):
    """Parse a page, check that its tags are balanced, and collect everything that a browser would fetch or run."""

    CDATA_CONTENT_ELEMENTS = ("script", "style")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.active: list[str] = []
        self.policy = ""  # the content security policy
        self.scripts: list[str] = []  # what a browser would run
        self.charts: list[dict] = []
        self.samples: list[dict] = []  # the rows of the sample browser
        self.script: dict[str, str | None] = {}  # the attributes of the script that is open
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.script = dict(attributes)
        if dict(attributes).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attributes)["content"]
        if tag in {"iframe", "object", "embed", "img", "link", "base", "form"}:
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
        if self.open and self.open[-1] == "script":
            if self.script.get("id") == "samples-data":
                self.samples = json.loads(data)["rows"]
            elif self.script.get("type") == "application/json":
                self.charts.append(json.loads(data))
            else:
                self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)


def page_of(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not page.active
    assert all(reference.startswith("#") for reference in page.references)
    assert not any(re.search(r"url\((?!['\"]?#)|@import", (HERE / name).read_text()) for name in STYLES)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert page.policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"
    assert page.scripts == [vega(), *((HERE / name).read_text() for name in SCRIPTS)]
    assert len(text) < len(vega()) + BYTES + 1_000_000
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
    _, page = page_of(copied)
    words = " ".join(" ".join(page.words).split())
    for phase in ("sft", "stage-00", "stage-01"):
        metrics = json.loads((copied / phase / "eval.json").read_text())
        assert f"{metrics['nll']:,.2f}" in words
        assert f"{metrics['exact_match']:.1%}" in words
    written = [json.loads(line) for line in (copied / "sft" / "answers.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["expert"]) for row in page.samples] == [(x["prompt"], x["expert"]) for x in written]
    for count in json.loads((copied / "data.json").read_text())["train"].values():
        assert f"{count:,}" in words
    assert "Missing from these files" not in words
    assert len(page.charts) >= 13
    check_charts(page)
    assert "Reward margin" in words
    assert "not measured in this run" not in words


def check_charts(page: Page) -> None:
    """Have Altair hold each chart to Vega-Lite's schema, which irlfast leaves out: it raises what it finds."""
    for spec in page.charts:
        alt.Chart.from_dict(spec)


def values_of(spec: dict) -> list[dict]:
    """Return all data of a chart and its layers."""
    return [
        *spec.get("data", {}).get("values", []),
        *(row for layer in spec.get("layer", []) for row in values_of(layer)),
    ]


def test_every_point_of_the_charts_is_a_number_of_the_files(copied):
    _, page = page_of(copied)
    held_out = [metric for metric in HELD_OUT if metric.panel and "preference" not in metric.key]
    logged = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    training = [metric for metric in TRAINING if any(key in row for row in logged for key in metric.keys)]
    assert len(page.charts) == len(held_out) + 2 + 1 + len(training)  # two histograms and the timeline between them
    for metric, spec in zip(held_out, page.charts, strict=False):
        drawn = {row["phase"]: row for row in values_of(spec) if "phase" in row}
        assert list(drawn) == ["sft", "00", "01"]
        for phase in ("sft", "stage-00", "stage-01"):
            figures = json.loads((copied / phase / "eval.json").read_text())
            row = drawn[phase.removeprefix("stage-")]
            assert row["value"] == (
                None if figures[metric.key] is None else pytest.approx(figures[metric.key], rel=1e-5)
            )
            ends = figures["intervals"].get(metric.key, [None, None])
            assert [row["low"], row["high"]] == [None if end is None else pytest.approx(end, rel=1e-5) for end in ends]
    starts = {"sft": 0, "stage-00": 6, "stage-01": 10}
    for metric, spec in zip(training, page.charts[len(held_out) + 3 :], strict=True):
        drawn = {(row["phase"], row["step"], row["series"]): row["mean"] for row in values_of(spec) if "series" in row}
        assert len(drawn) == len(metric.keys) * len(logged)
        for row in logged:
            for key, series in zip(metric.keys, ("expert", "synthetic"), strict=False):
                value = drawn[row["phase"], starts[row["phase"]] + row["step"], series]
                assert value == (pytest.approx(row[key], rel=1e-5) if key in row else None)


def test_the_time_of_a_phase_is_the_sum_of_its_logged_parts(copied):
    rows = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    run = read_run(copied)
    pairs, split = run.pairs, split_time(run)
    assert list(split) == ["sft", "stage-00", "stage-01"]
    for phase, (sampling, scoring, training, *parts, evaluation) in split.items():
        assert evaluation == json.loads((copied / phase / "eval.json").read_text())["seconds"]
        assert training == pytest.approx(sum(row["seconds"] for row in rows if row["phase"] == phase))
        assert sum(parts) == pytest.approx(training)
        if phase != "sft":
            assert [sampling, scoring] == [pairs[phase]["sample_seconds"], pairs[phase]["score_seconds"]]
    words = " ".join(" ".join(page_of(copied)[1].words).split())
    assert f"{split['stage-00'][2]:,.1f}" in words


def test_the_bars_of_the_timeline_add_up_to_the_times_of_the_files(copied):
    run = read_run(copied)
    bars = values_of(draw_timeline(split_time(run))[0].spec)
    for phase, (sampling, scoring, training, *_, evaluation) in split_time(run).items():
        drawn = {row["part"]: row["seconds"] for row in bars if row["stage"] == phase}
        whole = sum(number(value) for value in (sampling, scoring, training, evaluation) if value is not None)
        assert sum(drawn.values()) == pytest.approx(whole, rel=1e-4)
        assert drawn["evaluation"] == pytest.approx(evaluation, rel=1e-4)
        assert drawn.get("sampling") == (None if sampling is None else pytest.approx(sampling, rel=1e-4))
    assert all(one["end"] == pytest.approx(other["begin"]) for one, other in itertools.pairwise(bars))


def test_a_histogram_counts_the_log_ratios_of_the_answers(copied):
    _, page = page_of(copied)
    drawn = [values_of(spec) for spec in page.charts if any("answers" in row for row in values_of(spec))]
    assert len(drawn) == 2  # stage-00 and stage-01; the first policy is its own reference
    for phase, bars in zip(("stage-00", "stage-01"), drawn, strict=True):
        rows = [json.loads(line) for line in (copied / phase / "answers.jsonl").read_text().splitlines()]
        for row in rows:
            expert, [synthetic] = row["log_ratios"]["expert"], row["log_ratios"]["synthetic"]
            assert row["figures"].get("margin", expert - synthetic) == pytest.approx(expert - synthetic)
        for series, values in {
            "expert": [row["log_ratios"]["expert"] for row in rows],
            "synthetic": [value for row in rows for value in row["log_ratios"]["synthetic"]],
        }.items():
            bins = [row for row in bars if row.get("series") == series]
            for row in bins[1:-1]:
                inside = sum(row["from"] < value < row["to"] for value in values)
                assert abs(row["answers"] - inside) <= 1  # the ends of a bin are rounded on the page
            assert sum(row["answers"] for row in bins) == len(values)


def test_the_page_has_the_commands_and_versions_that_the_run_was_started_with(copied):
    starts = [json.loads(line) for line in (copied / "starts.jsonl").read_text().splitlines()]
    words = " ".join(page_of(copied)[1].words)
    assert starts
    for start in starts:
        assert start["versions"]["irlfast"] == irlfast.__version__
        assert start["command"] in words
        assert all(version in words for version in start["versions"].values())
    assert json.loads((copied / "data.json").read_text())["fingerprint"] in words


def test_the_speed_of_a_phase_is_the_median_of_its_steps(copied):
    rows = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    words = " ".join(page_of(copied)[1].words)
    for phase in ("sft", "stage-00", "stage-01"):
        speeds = [row["tokens_per_second"] for row in rows if row["phase"] == phase]
        assert f"{statistics.median(speeds):,.0f}" in words


def test_the_texts_of_models_and_users_are_never_markup(copied):
    evil = '</div><script>alert(1)</script><img src=x onerror="f()">&amp;\ud83d \u202e]]>'
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("method: irft", f"method: irft\nx: {json.dumps(evil)}"))
    for phase in ("sft", "stage-00", "stage-01"):
        rows = [{"prompt": evil, "expert": evil + "x", "answer": evil}] * 3
        (copied / phase / "answers.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    _, page = page_of(copied)
    assert any("<script>alert(1)</script>" in part for part in page.words)
    assert [row["prompt"] for row in page.samples] == [evil] * 3


def test_long_answers_do_not_make_a_long_page(copied):
    row = json.dumps({"prompt": "<" * 50_000, "expert": "a b " * 50_000, "answer": "& b c " * 50_000})
    for phase in ("sft", "stage-01"):
        (copied / phase / "answers.jsonl").write_text("\n".join([row] * 40))
    step = json.loads((copied / "metrics.jsonl").read_text().splitlines()[-1])
    rows = [json.dumps(step | {"step": i, "loss": i % 7}) for i in range(1, 20_001)]
    (copied / "metrics.jsonl").write_text("\n".join(rows))
    _, page = page_of(copied)
    assert 0 < len(page.samples) < 40
    assert f"the first {len(page.samples)} of 40" in " ".join(" ".join(page.words).split())
    assert page.samples[0]["prompt"].endswith(f"… ({50_000 - CHARACTERS:,} more characters)")


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
    assert "Missing from these files" in words
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
    assert "no longer a finite number" in words
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


def write_answers(folder: Path, right: list[float], nll: list[float], accuracy: list[float] | None = None) -> None:
    """Write answers of a policy: their figures per prompt, and nothing else that the verdict reads."""
    rows = []
    for place, values in enumerate(zip(right, nll, accuracy or right, strict=True)):
        figures = dict(zip(("exact_match", "nll", "reward_accuracy"), values, strict=True))
        if accuracy is None:
            del figures["reward_accuracy"]
        rows.append({"prompt": str(place), "expert": "a", "answer": "b", "figures": figures})
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_the_verdict_has_the_p_values_and_counts_of_the_paired_tests(copied):
    draw = np.random.default_rng(1)
    before, after = (draw.random((2, 400)) < np.array([[0.6], [0.75]])).astype(float)
    nll = draw.normal(5, 1, 400)
    accuracy = (draw.random(400) < 0.7).astype(float)
    write_answers(copied / "sft", [*before], [*nll])
    write_answers(copied / "stage-01", [*after], [*(nll + draw.normal(0, 1, 400))], [*accuracy])
    edit(copied / "final" / "policy.json", kept="stage-01")
    words = " ".join(" ".join(page_of(copied)[1].words).split())
    gained, lost = (after > before).sum(), (after < before).sum()
    p = scipy.stats.binomtest(gained, gained + lost).pvalue  # McNemar's exact test
    [change, likelihood, reward] = compare_policies(read_run(copied))
    assert f"p = {2 * p:.2g} on 400 prompts: better" in change.words  # by Holm: the second lowest of three
    assert change.sign == 1 and reward.sign == 1 and likelihood.sign == 0
    assert f"{100 * before.mean():.1f}%" in change.before and f"{100 * after.mean():.1f}%" in change.after
    assert reward.before == "50.0%"
    for each in (change, likelihood, reward):
        assert each.words in words
        assert "on 400 prompts" in each.words and "[" in each.words and "[" in each.after
    assert "no difference shown;" in likelihood.words and "prompts would show" in likelihood.words
    assert "Improved" in words and "better on exact match and reward accuracy; not shown to differ on" in words


def test_a_policy_with_the_same_answers_has_no_difference(copied):
    draw = np.random.default_rng(2)
    right, nll = (draw.random(100) < 0.5).astype(float), draw.normal(5, 1, 100)
    for phase in ("sft", "stage-01"):
        write_answers(copied / phase, [*right], [*nll])
    words = " ".join(" ".join(page_of(copied)[1].words).split())
    assert "No difference shown" in words
    assert "better on" not in words and "worse on" not in words


@pytest.mark.parametrize(
    "harm",
    [
        lambda rows: rows[:-1],
        lambda rows: [*rows[:-1], {**rows[-1], "figures": {"nll": "many"}}],
        lambda rows: [{key: value for key, value in row.items() if key != "figures"} for row in rows],
    ],
)
def test_answers_that_cannot_be_compared_become_a_note(copied, harm):
    path = copied / "stage-01" / "answers.jsonl"
    rows = harm([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("\n".join(map(json.dumps, rows)))
    assert "The policies are not compared" in " ".join(page_of(copied)[1].words)


@pytest.mark.parametrize(
    ("signs", "word"),
    [((1, 0, 1), "Improved"), ((1, -1, 0), "Mixed"), ((0, -1, 0), "Worse"), ((0, 0), "No difference shown")],
)
def test_the_headline_follows_the_signs(signs, word):
    changes = [Change(str(i), "", "", sign, "") for i, sign in enumerate(signs)]
    assert headline(changes, "sft", "stage-01")[0] == word
    assert headline(changes, "sft", "sft")[0] == "No change"


def test_only_numbers_are_numbers():
    assert number(True) != number(True)  # a NaN
    assert number("3") != number("3")
    assert number(10**400) == float("inf")
