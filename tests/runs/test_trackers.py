"""Every tracker sees the whole run over its optimiser steps. All are the real ones, offline."""

import importlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.runs.metrics_log import MetricsLog
from irlfast.runs.trackers import Tracker, name_of
from tests.helpers.runs import ROOT
from tests.helpers.tiers import full

# pytest-xdist's main process lacks the packages of the trackers, and so cannot read their classes of warnings.
pytestmark = pytest.mark.filterwarnings("ignore")

ANSWERS = [{"prompt": "a|b", "expert": "two\nlines", "answer": "c"}]


def row(phase: str, step: int, **metrics) -> dict:
    return {"phase": phase, "stage": 0, "step": step, **metrics}


def write_all(log: MetricsLog) -> None:
    """A run of SFT and two stages, the second of which was killed after step 4 and resumes from step 2."""
    log.write_held_out({"phase": "initial", "nll": 9.0})
    log.start_phase("sft", 0)
    log.write(row("sft", 10, loss=3.0))
    log.write(row("sft", 15, loss=2.0))
    log.write_held_out({"phase": "sft", "nll": 8.0, "reward_accuracy": None}, ANSWERS)
    log.start_phase("stage-00/reward", 0)
    log.write(row("stage-00/reward", 5, loss=0.7))
    log.write_held_out({"reward_accuracy": 0.6}, kind="eval_reward")
    log.start_phase("stage-00", 0)
    log.write(row("stage-00", 2, loss=0.5))
    log.write(row("stage-00", 4, loss=99.0))


def resume(log: MetricsLog) -> None:
    log.start_phase("stage-00", 2)
    log.write(row("stage-00", 4, loss=0.4))
    log.write_held_out({"phase": "stage-00", "nll": 7.0}, ANSWERS)


CURVES = {
    "sft/loss": [(10, 3.0), (15, 2.0)],
    "reward/loss": [(20, 0.7)],
    "rft/loss": [(22, 0.5), (24, 0.4)],
    "eval/nll": [(0, 9.0), (15, 8.0), (24, 7.0)],
    "eval_reward/reward_accuracy": [(20, 0.6)],
}


def config_of(report_to: str, **keys):
    given = {"dataset_name": __file__, "model_name_or_path": ".", "method": "rft", "report_to": report_to}
    return make_config(given | keys)


def test_tensorboard_has_curves_by_kind_over_the_steps_of_the_run_without_rows_lost_to_a_kill(tmp_path):
    config = config_of("tensorboard")
    write_all(MetricsLog(tmp_path, config))
    resume(MetricsLog(tmp_path, config))
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    curves = {name: [(x.step, pytest.approx(x.value)) for x in events.Scalars(name)] for name in CURVES}
    assert curves == CURVES
    assert {*events.Tags()["scalars"]} == {*CURVES}
    samples = events.Tensors("eval/samples/text_summary")
    assert [x.step for x in samples] == [15, 24]
    assert b"| a\\|b | two<br>lines | c |" in samples[0].tensor_proto.string_val[0]


def install(name: str, monkeypatch) -> None:
    """Let a package be imported that `make test-all` installs apart from the other packages."""
    folder = next(iter((ROOT / ".venv").glob(f"{name}-*")), None)
    if folder is None:
        pytest.skip(f"{name} is not installed: make .venv/{name}-*")
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])  # after the environment's own packages


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    install("wandb", monkeypatch)
    for name, value in {"MODE": "offline", "SILENT": "true", "PROJECT": "of-the-environment"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    import wandb

    return wandb


def records(folder) -> list:
    """The records that W&B wrote, start by start."""
    from wandb.proto.wandb_internal_pb2 import Record

    paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [Record.FromString(data) for path in paths for data in pieces(path.read_bytes())]


def pieces(log: bytes, block: int = 32768) -> Iterator[bytes]:
    """Read records in LevelDB's log format, after W&B's own header."""
    at, whole = 7, b""
    while at < len(log):
        if block - at % block < 7:  # the last bytes of a block hold no record
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


@full
def test_wandb_has_the_same_curves_and_axis_and_the_config_project_and_samples(wandb, tmp_path):
    config = config_of("wandb", run_name="mine")
    for write in (write_all, resume):
        write(MetricsLog(tmp_path, config))
        wandb.teardown()
    written = records(tmp_path)
    runs = [record.run for record in written if record.HasField("run")]
    assert {run.project for run in runs} == {"of-the-environment"}
    assert {run.display_name for run in runs} == {"mine"}
    assert len({run.run_id for run in runs}) == 1
    keys = {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
    assert (keys["method"], keys["beta"], keys["run_name"]) == ("rft", 0.1, "mine")
    axes = {record.metric.step_metric for record in written if record.HasField("metric") and record.metric.glob_name}
    assert axes == {"global_step"}
    curves: dict = {}
    for record in (record for record in written if record.HasField("history")):
        items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
        for name in CURVES.keys() & items.keys():
            curves.setdefault(name, {})[items["global_step"]] = items[name]  # W&B shows the last value of a step
        if "eval/samples" in items:
            assert items["eval/samples"]["nrows"] == 1
    assert {name: [*curve.items()] for name, curve in curves.items()} == CURVES


@full
def test_the_configurations_project_wins_over_the_environments(wandb, tmp_path):
    MetricsLog(tmp_path, config_of("wandb", project="of-the-run"))
    wandb.teardown()
    assert {record.run.project for record in records(tmp_path) if record.HasField("run")} == {"of-the-run"}


@full
def test_wandb_that_cannot_start_is_one_sentence(wandb, tmp_path, monkeypatch):
    def fails(**_):
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", fails)
    with pytest.raises(InputError, match=r"report_to: wandb cannot start \(no API key\); `wandb login`, or"):
        MetricsLog(tmp_path, config_of("wandb"))


@full
def test_trackio_has_the_same_curves_of_one_run_and_the_config_project_and_samples(monkeypatch, tmp_path):
    install("trackio", monkeypatch)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_PROJECT", "of-the-environment")
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    for write in (write_all, resume):
        write(MetricsLog(tmp_path, config_of("trackio", run_name="mine")))
        trackio.finish()
    MetricsLog(tmp_path / "other", config_of("trackio", run_name="mine")).write_held_out({"nll": 1.0})
    trackio.finish()
    name, other = sorted(SQLiteStorage.get_runs("of-the-environment"), key=lambda name: name != named(tmp_path))
    assert name == named(tmp_path) != other  # of another folder, with the same run_name
    assert SQLiteStorage.get_run_config("of-the-environment", name)["beta"] == 0.1
    rows = SQLiteStorage.get_logs("of-the-environment", name)
    assert curves_of((name, row["step"], value) for row in rows for name, value in row.items()) == CURVES
    assert [row["step"] for row in rows if "eval/samples" in row] == [15, 24]


def named(output) -> str:
    return name_of(output, "mine")


def curves_of(points) -> dict:
    """The curves of (name, step, value), where a later value of a step replaces an earlier one."""
    curves: dict = {}
    for name, step, value in points:
        if name in CURVES:
            curves.setdefault(name, {})[step] = pytest.approx(value)
    return {name: [*curve.items()] for name, curve in curves.items()}


@full
def test_mlflow_has_the_same_curves_of_one_run_and_the_config_experiment_and_samples(monkeypatch, tmp_path):
    install("mlflow-skinny", monkeypatch)
    monkeypatch.chdir(tmp_path)  # where MLflow keeps artifacts
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of-the-environment")
    import mlflow

    output = tmp_path / "it's"
    output.mkdir()
    for write in (write_all, resume):
        write(MetricsLog(output, config_of("mlflow", run_name="mine")))
        mlflow.end_run()
    MetricsLog(tmp_path / "other", config_of("mlflow", run_name="mine"))
    mlflow.end_run()
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("of-the-environment")
    runs = {run.data.tags["irlfast.run"]: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 2  # one of each folder
    run = runs[name_of(output, "run")]
    assert (run.info.run_name, run.data.params["method"], run.data.params["beta"]) == ("mine", "rft", "0.1")
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in CURVES}
    assert curves_of((name, x.step, x.value) for name, points in histories.items() for x in points) == CURVES
    names = [item.path for item in client.list_artifacts(run.info.run_id, "samples")]
    assert names == ["samples/step-000015.md", "samples/step-000024.md"]


@full
@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_no_tracker_gets_a_secret_of_the_configuration_the_environment_or_the_command(monkeypatch, tmp_path, name):
    install({"mlflow": "mlflow-skinny"}.get(name, name), monkeypatch)
    monkeypatch.chdir(tmp_path)
    key, password, token = "ab" * 20, "correct-horse", f"hf_{'cd' * 17}"
    variables = {"WANDB_API_KEY": key, "SERVICE_PASSWORD": password, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    variables |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", ["irlfast", f"run_name={token}"])
    (tmp_path / "run").mkdir()
    config = config_of(name, run_name=f"run {token}", project=f"project-{password}", hub_model_id=f"me/{key}")
    write_all(MetricsLog(tmp_path / "run", config))
    tracker = importlib.import_module(name)
    getattr(tracker, {"wandb": "teardown", "trackio": "finish", "mlflow": "end_run"}[name])()
    places = tmp_path, Path(getattr(tracker, "TRACKIO_DIR", tmp_path))  # Trackio keeps the folder of its first import
    contents = {path: path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()}
    assert any(b"SECRET-" in content for content in contents.values())
    assert not [
        str(path)
        for path, content in contents.items()
        for secret in (key, password, token)
        if secret.encode() in content
    ]


def test_a_tracker_that_fails_gets_no_more_metrics_and_the_run_goes_on(tmp_path, capsys):
    log = MetricsLog(tmp_path, config_of("tensorboard"))
    told = []

    def fails(*_):
        raise ConnectionError("the server is gone. Try later.")

    log.trackers.insert(0, Tracker("mlflow", fails, fails, fails))
    log.trackers.append(Tracker("last", lambda *of: told.append(of), lambda *_: None, lambda *_: None))
    write_all(log)
    assert [tracker.name for tracker in log.trackers] == ["tensorboard", "last"]
    assert len(told) == 8
    assert capsys.readouterr().err == "warning: mlflow gets no more metrics, as it failed (the server is gone)\n"
    assert len(log.path.read_text().splitlines()) == 5


def test_a_file_in_the_place_of_tensorboards_folder_is_set_aside(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    write_all(MetricsLog(tmp_path, config_of("tensorboard")))
    assert (tmp_path / "tensorboard").is_dir()
