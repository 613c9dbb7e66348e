"""The leaderboard's tasks by the real lm-eval, which reads local tasks and local copies of datasets."""

import io
import math
import shlex
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from irlfast.common.files import InputError, read_json, write_json
from irlfast.evaluation import leaderboard
from irlfast.evaluation.harness import Task, model_arguments
from irlfast.evaluation.leaderboard import (
    PUBLISHED,
    TASKS,
    average_of,
    figures_of,
    leaderboard_tables,
    parse_task,
    run_leaderboard,
)
from irlfast.evaluation.models import fingerprint_of
from irlfast.evaluation.questions import differences_of, values_of
from tests.helpers.lm_eval_tasks import LM_EVAL, environment, write_datasets, write_tasks
from tests.helpers.runs import printed, run
from tests.helpers.tiers import full, slow


@pytest.fixture
def lm_eval(monkeypatch):
    if LM_EVAL is None:
        pytest.skip("lm-eval is not installed: make .venv/lm_eval-0.4.13")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """The policies of a run with LoRA: an adapter on the run's first model, and the same merged."""
    output = tmp_path_factory.mktemp("policies") / "run"
    run(output, use_peft="true", lora_r=4, stages=1)
    return output


def results_by_hand(command: str, folder, **given) -> dict:
    """The results that lm-eval itself writes when it runs this command."""
    folder.mkdir()
    arguments = [*shlex.split(command), "--output_path", str(folder / "by-hand.json")]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=600, **given)
    assert done.returncode == 0, done.stderr
    (written,) = folder.glob("by-hand*.json")
    return read_json(written)["results"]


@full
def test_figures_equal_those_of_lm_eval_called_by_hand_and_stay_when_a_later_task_fails(lm_eval, policies, tmp_path):
    """The model is an adapter on its base; the tasks are multiple choice and generation, with two examples."""
    write_tasks(tmp_path / "tasks")
    tasks = [parse_task("local_choice:2"), parse_task("local_words:2")]
    policy = policies / "sft" / "policy"
    settings = {"include_path": str(tmp_path / "tasks"), "dtype": "float32"}
    with pytest.raises(
        InputError, match=r"cannot run arc_challenge \(ConnectionError: .*ai2_arc.*\); the whole log is"
    ):
        run_leaderboard({"run/sft": policy}, tmp_path, [*tasks, TASKS[0]], **settings)  # there is no hub here
    log = tmp_path / "leaderboard/run/sft.log"
    log.unlink()
    both = [str(policy), str(policies / "stage-00" / "policy")]
    command = ["-m", "irlfast.evaluate", *both, "--leaderboard", "--tasks", "local_choice:2,local_words:2"]
    keys = [f"output_dir={tmp_path}", "dtype=float32", "per_device_eval_batch_size=8"]
    out, _ = printed([*command, "--include_path", settings["include_path"], *keys])
    assert not log.exists()  # nothing was measured again
    board = read_json(tmp_path / "leaderboard/run/sft.json")
    assert f"{board['tasks']['local_choice']['figures']['acc,none']['mean']:.4f}" in out
    later = read_json(tmp_path / "leaderboard/run/stage-00.json")
    [(model, differences)] = read_json(tmp_path / "leaderboard/differences.json").items()
    assert model == "run/stage-00" and "run/stage-00 against run/sft" in out
    assert {*differences} == {"local_choice: acc,none", "local_choice: acc_norm,none", "local_words: exact_match,none"}
    for name, difference in differences.items():
        task, metric = name.split(": ")
        means = [each["tasks"][task]["figures"][metric]["mean"] for each in (later, board)]
        assert difference["mean"] == pytest.approx(means[0] - means[1]) and difference["count"] == 24
        assert difference["test"] == "McNemar's, exact"
    command = board["tasks"]["local_choice"]["command"]
    assert board["tasks"]["local_words"]["command"] == command.replace("local_choice", "local_words")
    by_hand = results_by_hand(command.replace("local_choice", "local_choice,local_words"), tmp_path / "by-hand")
    for task in tasks:
        measured = board["tasks"][task.name]
        assert measured["report"]["results"] == {task.name: by_hand[task.name]}
        for metric, figure in measured["figures"].items():
            error = by_hand[task.name][metric.replace(",", "_stderr,")]
            assert (figure["mean"], figure["count"]) == (by_hand[task.name][metric], 24)
            assert figure["high"] == (figure["mean"] + leaderboard.NORMAL_95 * error if error else None)
    assert {*board["tasks"]["local_choice"]["figures"]} == {"acc,none", "acc_norm,none"}


@slow
def test_the_six_tasks_run_offline_on_local_copies_of_their_datasets(lm_eval, policies, tmp_path):
    write_datasets(tmp_path / "copies")
    boards = run_leaderboard({"final": policies / "final"}, tmp_path, local_datasets=str(tmp_path / "copies"))
    counts = [boards["final"]["tasks"][task.name]["figures"][task.metric]["count"] for task in TASKS]
    assert counts == [4, 4, 4, 2, 4, 2 * 57]
    shots = [boards["final"]["tasks"][task.name]["report"]["n-shot"] for task in TASKS]
    assert [{*each.values()} for each in shots] == [{25}, {0}, {5}, {5}, {10}, {5}]
    by_hand = results_by_hand(
        boards["final"]["tasks"]["gsm8k"]["command"], tmp_path / "by-hand", cwd=tmp_path / "copies"
    )
    assert by_hand == boards["final"]["tasks"]["gsm8k"]["report"]["results"]


@pytest.mark.skipif("lm_eval" in sys.modules, reason="lm-eval is imported")
@pytest.mark.parametrize("python", [None, "/no/such/python"])
def test_an_interpreter_without_lm_eval_is_one_sentence(tmp_path, python):
    with pytest.raises(InputError, match=r"pip install lm-eval==0\.4\.13, or name an interpreter that has it"):
        run_leaderboard({"model": tmp_path}, tmp_path, python=python)


def test_a_task_is_named_with_its_shots_and_the_six_keep_theirs():
    assert parse_task("mine") == Task("mine")
    assert parse_task("mine:3") == Task("mine", 3)
    assert parse_task("gsm8k") is TASKS[3]
    assert parse_task("gsm8k:8") == Task("gsm8k", 8, "exact_match,strict-match", "GSM8K")
    for wrong in ("", "mine:", "mine:x", "mine:-1"):
        with pytest.raises(InputError, match="--tasks: found"):
            parse_task(wrong)


def test_a_task_named_twice_and_a_folder_that_is_missing_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected each task once"):
        run_leaderboard({}, tmp_path, [Task("mine"), Task("mine", 3)])
    with pytest.raises(InputError, match="--local_datasets: no such folder: /no/such"):
        run_leaderboard({}, tmp_path, local_datasets="/no/such")


def report_of(**results) -> dict:
    counts = {name: {"effective": 4} for name in results}
    return {"results": results, "n-samples": counts, "group_subtasks": {}}


def test_an_interval_is_1_96_standard_errors_and_is_left_out_where_lm_eval_has_no_error():
    results = {"acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.2, "f1_stderr,none": "N/A", "alias": "mine"}
    figures = figures_of(
        Task("mine"), report_of(mine=results | {"exact_match,none": 0.0, "exact_match_stderr,none": 0.0})
    )
    assert figures["acc,none"] == {
        "mean": 0.5,
        "low": pytest.approx(0.304, abs=1e-4),
        "high": pytest.approx(0.696, abs=1e-4),
        "count": 4,
    }
    for metric in ("f1,none", "exact_match,none"):
        assert figures[metric]["low"] is figures[metric]["high"] is None
    assert len(figures) == 3


def test_a_tag_shows_the_metrics_of_its_tasks():
    figures = figures_of(Task("tag"), report_of(one={"acc,none": 0.5}, two={"acc,none": 0.25}))
    assert {name: figure["mean"] for name, figure in figures.items()} == {"one: acc,none": 0.5, "two: acc,none": 0.25}


QUESTIONS = st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 1)), min_size=3, max_size=40)


@settings(max_examples=30, deadline=None)
@given(QUESTIONS)
def test_models_are_compared_on_the_same_questions_by_mcnemars_test_or_by_swapping_them(drawn):
    boards = {}
    for model, column in (("base", 0), ("own", 1)):
        right = [float(question[column]) for question in drawn]
        graded = [question[2] * (1 - column) for question in drawn]
        boards[model] = {"tasks": {}}
        for task, shots in (("same", 5), ("other", 5 * column)):
            conditions = {"lm_eval": "0.4.13", "shots": shots, "model": model}
            questions = {"acc,none": right, "score,none": graded}
            boards[model]["tasks"][task] = {"conditions": conditions, "questions": questions}
    [(model, each)] = differences_of(boards).items()
    assert model == "own" and {*each} == {"same: acc,none", "same: score,none"}  # shots of the other task differ
    gained = sum(own and not base for base, own, _ in drawn)
    lost = sum(base and not own for base, own, _ in drawn)
    assert each["same: acc,none"]["mean"] == pytest.approx((gained - lost) / len(drawn))
    p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert each["same: acc,none"]["p"] == pytest.approx(p)
    assert each["same: score,none"]["mean"] == pytest.approx(-sum(question[2] for question in drawn) / len(drawn))


def answer_of(values: dict, higher: bool = True) -> dict:
    report = {"group_subtasks": {"group": ["one", "two"]}}
    report["higher_is_better"] = {name: {"acc": higher} for name in ("one", "two", "mine")}
    return {"report": report, "questions": values}


def test_only_a_mean_of_questions_of_which_more_is_better_has_values():
    figure = {"mean": 0.5, "count": 4}
    parts = {"one": {"acc,none": [1.0, 0.0]}, "two": {"acc,none": [True, False]}}
    assert values_of({"acc,none": figure}, answer_of(parts), "group") == {"acc,none": [1.0, 0.0, 1.0, 0.0]}
    assert values_of({"two: acc,none": figure | {"count": 2}}, answer_of(parts), "tag") == {"two: acc,none": [1.0, 0.0]}
    for other, higher in ((figure | {"mean": 0.4}, True), (figure | {"count": 3}, True), (figure, False)):
        assert values_of({"acc,none": other}, answer_of(parts, higher), "group") == {}
    pairs = {"mine": {"acc,none": [(1.0, 2), (0.0, 2)]}}  # as perplexities have
    assert values_of({"acc,none": figure | {"count": 2}}, answer_of(pairs), "mine") == {}


def board_of(**means) -> dict:
    tasks = {}
    for task in TASKS:
        if task.name in means:
            figure = {
                "mean": means[task.name],
                "low": means[task.name] - 0.06,
                "high": means[task.name] + 0.06,
                "count": 9,
            }
            tasks[task.name] = {"conditions": {"lm_eval": "0.4.13"}, "figures": {task.metric: figure}}
    return {"tasks": tasks}


def test_the_average_needs_all_six_tasks_and_adds_their_errors_as_independent():
    means = {task.name: number / 10 for number, task in enumerate(TASKS, 1)}
    average = average_of(board_of(**means))
    assert average["mean"] == pytest.approx(0.35) and average["high"] - 0.35 == pytest.approx(0.06 / math.sqrt(6))
    assert average_of(board_of(arc_challenge=0.5)) is None


def test_the_table_has_the_published_figures_beside_the_model_whose_name_is_text():
    console = Console(width=200, file=io.StringIO())
    for table in leaderboard_tables({"[red]mine": board_of(arc_challenge=0.5)}):
        console.print(table)
    text = console.file.getvalue()
    assert "[red]mine" in text and "50.00 ± 6.00" in text and "0.4.13" in text
    assert all(f"{row.average:.2f}" in text and row.source in text for row in PUBLISHED)
    for row in PUBLISHED:
        assert not row.figures or sum(row.figures) / 6 == pytest.approx(row.average, abs=0.005)


def test_a_models_fingerprint_changes_with_its_weights_and_not_with_its_card(tmp_path):
    write_json(tmp_path / "config.json", {})
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = fingerprint_of(tmp_path)
    (tmp_path / "README.md").write_text("card")
    assert fingerprint_of(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"weightS")
    assert fingerprint_of(tmp_path) != before
    with pytest.raises(InputError, match="no-owner/no-model: found neither here nor on the hub"):
        fingerprint_of("no-owner/no-model")


def test_an_adapter_is_measured_on_its_base_with_its_own_tokenizer(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    write_json(base / "config.json", {})
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": str(base), "peft_type": "LORA"})
    write_json(adapter / "tokenizer_config.json", {})
    arguments = model_arguments(adapter, "float32", trust_remote_code=False)
    assert arguments == {
        "pretrained": str(base),
        "dtype": "float32",
        "peft": str(adapter),
        "revision": "main",
        "tokenizer": str(adapter),
    }
    assert fingerprint_of(adapter) != fingerprint_of(base)
