"""The pages of an evaluation and of several runs: their numbers are those of the files, and texts stay texts."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from irlfast.common.files import InputError
from irlfast.evaluation.table import write_figures
from irlfast.report import page_of
from irlfast.reports.browser import evaluation_samples
from irlfast.reports.files import read_run
from irlfast.reports.runs import compare_runs, final_answers
from tests.reports.test_report import Page, check_charts, values_of

EVIL = '</script><script>alert(1)</script><img src=x onerror="f()">'
PROMPTS = 300  # more than a file of rows holds


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


def evaluation(folder: Path, names: tuple[str, ...], prompt: str = "a prompt") -> Path:
    """Write an evaluation of drawn answers. Each model is better than the one before."""
    draw = np.random.default_rng(0)
    nll = draw.normal(6, 1, PROMPTS)
    for better, name in enumerate(names):
        rows = []
        for place in range(PROMPTS):
            right = [float(value) for value in draw.random(5) < 0.4 + 0.3 * better]
            margins = {} if better == 0 else {"log_ratios": {"expert": draw.normal(1), "synthetic": [draw.normal()]}}
            rows.append(
                {
                    "answer": f"{prompt} {place}",
                    "figures": {"exact_match": right[0], "nll": float(nll[place] - better)},
                    "samples": [f"{name} draws {place}.{number} for {prompt}" for number in range(4)],
                    "sample_figures": {"exact_match": right[1:]},
                    "expert_tokens": [["a", -1.0], ["b", -2.0], ["c", float(draw.uniform(-3, 0))]],
                }
                | margins
            )
        for part, start in enumerate(range(0, PROMPTS, 256)):
            write_rows(folder / "models" / name / f"part-{part:05d}.jsonl", rows[start : start + 256])
    write_rows(folder / "prompts.jsonl", [{"prompt": f"{prompt} {i}", "expert": "an answer"} for i in range(PROMPTS)])
    settings = {"models": dict.fromkeys(names, "somewhere"), "dataset_name": prompt, "beta": 0.1}
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(settings))
    (folder / "data.json").write_text(json.dumps({"fingerprint": "0123", "remarks": [prompt]}))
    write_figures(folder)
    return folder


def read_page(*folders: Path) -> tuple[str, Page]:
    page = Page(page_of([*folders]))
    assert not page.open and not page.active
    assert all(reference.startswith("#") for reference in page.references)
    assert len(page.scripts) == page.policy.count("sha256-") > 0
    return " ".join(" ".join(page.words).split()), page


def test_the_page_of_an_evaluation_has_the_figures_and_tests_of_its_files(tmp_path):
    folder = evaluation(tmp_path, ("base", "run/stage-00", "run/stage-01"))
    words, page = read_page(folder)
    figures = json.loads((folder / "figures.json").read_text())
    for model in figures["models"].values():
        for figure in model.values():
            mean, low, high = (f"{figure[key]:,.4g}" for key in ("mean", "low", "high"))
            assert f"{mean} [{low}, {high}], n = {figure['count']}" in words
    for model in figures["differences"].values():
        for figure in model.values():
            assert f"{figure['mean']:+,.4g} [{figure['low']:+,.4g}, {figure['high']:+,.4g}]" in words
            assert f"{figure['p_holm']:.2g}" in words
            assert figure["verdict"] in words
    assert "Improved Against base: 2 improved." in words
    drawn = {row["mean"] for spec in page.charts for row in values_of(spec) if row.get("model") == "run/stage-01"}
    rows = [row for part in sorted((folder / "models/run/stage-01").iterdir()) for row in map(json.loads, part.open())]
    right = np.mean([row["figures"]["exact_match"] for row in rows])
    base = [row for part in sorted((folder / "models/base").iterdir()) for row in map(json.loads, part.open())]
    right_before = np.mean([row["figures"]["exact_match"] for row in base])
    assert any(value == pytest.approx(right - right_before, rel=1e-5) for value in drawn)  # the forest plot
    sampled = np.mean([np.mean(row["sample_figures"]["exact_match"]) for row in rows])
    assert any(value == pytest.approx(sampled, rel=1e-5) for value in drawn)  # pass@1
    assert any(value == pytest.approx(math.exp(2.0), rel=1e-5) for value in drawn)  # perplexity of the second token
    counted = [sum(row["answers"] for row in values_of(spec) if "answers" in row) for spec in page.charts]
    assert [count for count in counted if count] == [2 * PROMPTS, 2 * PROMPTS]  # histograms of both models
    check_charts(page)


def test_the_page_of_an_evaluation_shows_what_judge_and_leaderboard_left(tmp_path):
    folder = evaluation(tmp_path, ("base", "other"))
    outcomes = [1.0] * 30 + [0.0] * 10 + [0.5] * 10 + [None] * 2
    write_rows(folder / "judge/other/outcomes.jsonl", [{"outcome": outcome} for outcome in outcomes])
    counts = {"prompts": 52, "wins": 30, "losses": 10, "ties": 4, "disagreements": 6, "unjudged": 2, "judge": "j-9"}
    write_rows(folder / "judge/other/counts.json", [counts])
    figures = {"acc_norm,none": {"mean": 0.5123, "low": 0.49, "high": 0.53, "count": 100}}
    write_rows(folder / "leaderboard/base.json", [{"tasks": {"arc_challenge": {"figures": figures}}}])
    difference = {"mean": -0.0512, "low": -0.09, "high": -0.02, "count": 100, "p": 0.011, "p_holm": 0.022}
    difference |= {"test": "McNemar's, exact", "better": False, "verdict": "worse", "needed": None}
    differences = {"other": {"arc_challenge: acc_norm,none": difference}}
    (folder / "leaderboard/differences.json").write_text(json.dumps(differences))
    words, _ = read_page(folder)
    assert "other against base, on the same questions of lm-eval" in words and "-0.0512 [-0.09, -0.02]" in words
    assert "70.0% [" in words and "j-9" in words  # 35 of 50
    assert "51.23 ± 2.23" in words and "zephyr-7b-sft-full" in words


def test_one_model_is_shown_without_a_comparison(tmp_path):
    words, _ = read_page(evaluation(tmp_path, ("base",)))
    assert "There is no second model to compare with." in words


def test_a_missing_part_leaves_the_other_rows_with_their_prompts(tmp_path):
    folder = evaluation(tmp_path, ("base", "other"))
    (folder / "models/other/part-00000.jsonl").unlink()
    rows = evaluation_samples(folder, ["base", "other"], [])["data"]["rows"]
    assert len(rows) == PROMPTS
    for place, row in enumerate(rows):
        _, other = row["answers"]
        text = None if other is None else "".join(piece for kind, piece in other["pieces"] if kind != "-")
        assert row["prompt"] == f"a prompt {place}"
        assert text == (None if place < 256 else f"a prompt {place}")
    assert "models/other: 256 rows are missing or unreadable." in read_page(folder)[0]


@pytest.mark.parametrize("name", ["figures.json", "data.json", "evaluation.yaml", "models/base/part-00001.jsonl"])
def test_a_broken_file_of_an_evaluation_is_named(tmp_path, name):
    folder = evaluation(tmp_path, ("base", "other"))
    (folder / name).write_text("[")
    words, _ = read_page(folder)
    assert "Missing from these files" in words
    assert name.rpartition("/")[0] in words and (name.rpartition("/")[2] in words or "models" in name)


def test_the_texts_and_names_of_an_evaluation_are_never_markup(tmp_path):
    folder = evaluation(tmp_path, ("base", EVIL.replace("/", "")), prompt=EVIL)
    words, page = read_page(folder)
    assert words.count("<script>") > 2
    assert any("<script>" in json.dumps(spec) for spec in page.charts)


def small_run(folder: Path, prompts: str = "a prompt", right: float = 0.5, **keys) -> Path:
    """Write the files of a run that the page of several runs reads."""
    draw = np.random.default_rng(len(folder.name))
    config = {"method": "irft", "beta": 0.1, "output_dir": str(folder)} | keys
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"phase": "sft", "step": step, "loss": 5 - step / 7, "seconds": 1.0} for step in range(1, 21)]
    write_rows(folder / "metrics.jsonl", rows)
    figures = [{"exact_match": float(draw.random() < right), "nll": float(draw.normal(5))} for _ in range(200)]
    answers = [{"prompt": f"{prompts} {i}", "expert": "e", "answer": "a", "figures": f} for i, f in enumerate(figures)]
    write_rows(folder / "sft/answers.jsonl", answers)
    means = {key: float(np.mean([f[key] for f in figures])) for key in ("exact_match", "nll")}
    (folder / "sft/eval.json").write_text(json.dumps(means | {"count": 200, "seconds": 2.0}))
    (folder / "data.json").write_text(json.dumps({"fingerprint": f"of-{prompts[:3]}"}))
    return folder


def test_the_page_of_several_runs_has_their_differences_and_curves(tmp_path):
    runs = [small_run(tmp_path / "one"), small_run(tmp_path / "second", right=0.8, beta=0.7, stages=3)]
    words, page = read_page(*runs)
    assert "Improved Against one, second is better on exact match" in words
    for key, values in {"beta": "0.1 0.7", "stages": "None 3"}.items():
        assert f"{key} {values}" in words
    assert "output_dir" not in words
    check_charts(page)
    for run in runs:
        figures = json.loads((run / "sft/eval.json").read_text())
        assert f"{figures['exact_match']:.1%}" in words and f"{figures['nll']:,.2f}" in words
        rows = [row for spec in page.charts for row in values_of(spec) if row.get("run") == run.name]
        assert [row["mean"] for row in rows] == [pytest.approx(5 - step / 7, rel=1e-5) for step in range(1, 21)]


def test_the_samples_of_several_runs_are_those_with_the_prompts_of_the_first(tmp_path):
    prompts = {"one": "a prompt", "two": "another prompt", "three": "a prompt"}
    runs = {name: read_run(small_run(tmp_path / name, prompts=each)) for name, each in prompts.items()}
    shown = final_answers(runs)
    assert shown["data"]["models"] == ["one", "three"] and shown["total"] == 200
    for number, row in enumerate(shown["data"]["rows"]):
        assert row["prompt"] == f"a prompt {number}" and None not in row["answers"]
    assert final_answers({}) is None


def test_runs_with_other_held_out_prompts_are_not_compared(tmp_path):
    runs = small_run(tmp_path / "one"), small_run(tmp_path / "second", prompts="another prompt", right=0.9)
    words, _ = read_page(*runs)
    assert "Not comparable" in words and "held-out prompts or prompt templates differ" in words
    changes, why = compare_runs(*map(read_run, runs))
    assert not changes and why


def test_hostile_names_and_keys_of_runs_stay_text(tmp_path):
    runs = [small_run(tmp_path / EVIL.replace("/", ""), note=EVIL), small_run(tmp_path / "second")]
    words, page = read_page(*runs)
    assert words.count("<script>") > 2
    assert any("<script>" in json.dumps(spec) for spec in page.charts)


def test_a_run_given_twice_and_an_evaluation_among_runs_are_refused(tmp_path):
    run = small_run(tmp_path / "one")
    with pytest.raises(InputError, match="found a folder twice"):
        page_of([run, tmp_path / "." / "one"])
    other = evaluation(tmp_path / "evaluation", ("base",))
    with pytest.raises(InputError, match="found an evaluation among several folders"):
        page_of([run, other])


def test_the_command_writes_one_page_of_several_runs_to_the_output(tmp_path):
    runs = [small_run(tmp_path / "one"), small_run(tmp_path / "second")]
    output = tmp_path / "pages" / "both.html"
    arguments = [sys.executable, "-m", "irlfast.report", *map(str, runs), "--output", str(output)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(output)), done.stderr
    assert not any((run / "report.html").exists() for run in runs)
    assert "<html" in output.read_text()
