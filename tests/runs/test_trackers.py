"""TensorBoard and W&B see the whole run over its optimiser steps; W&B is the real one, offline."""

import json
import struct
import sys
from collections.abc import Iterator

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.runs.metrics_log import MetricsLog
from tests.helpers.runs import ROOT
from tests.helpers.tiers import full

WANDB = next(iter((ROOT / ".venv").glob("wandb-*")), None)  # `make test-all` installs it apart from the other packages
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


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    if WANDB is None:
        pytest.skip("wandb is not installed: make .venv/wandb-*")
    monkeypatch.setattr(sys, "path", [*sys.path, str(WANDB)])  # after the environment's own packages
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
