"""A run that is killed again and again ends as an undisturbed one: a few of the kills of ``benchmarks/storm.py``."""

import shutil
import signal

import pytest

from tests.helpers.killable import Start, until, warm
from tests.helpers.storm import TINY, Setting, chain, differences, stand_in, undisturbed
from tests.helpers.tiers import full, slow

ONE = Setting("irft", "1 process", {**TINY, "global_batch_size": 4})
SAMPLED = {"stages": 1, "eval_every_stage": False, "use_peft": True, "use_vllm": True}
EARLY = {"inner_steps": 8, "async_sampling": True, "eval_every_stage": False, "use_vllm": True}
ASYNC = Setting("irft that samples beside training", "1 process", {**TINY, **EARLY, "global_batch_size": 4})
TWO = Setting("irft with LoRA and a sampler", "2 processes", {**TINY, **SAMPLED, "global_batch_size": 4})


@pytest.mark.parametrize(
    "setting",
    [ONE, pytest.param(TWO, marks=full), pytest.param(ASYNC, marks=slow)],
    ids=lambda setting: setting.name,
)
def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path, setting):
    warm()
    if setting.keys.get("use_vllm"):
        setting = setting._replace(keys=setting.keys | {"vllm_python": stand_in(tmp_path)})
    whole = undisturbed(setting, tmp_path / "whole")
    kills, wrong = chain(setting, whole, "0", tmp_path / "chain", most=2)
    assert kills and not wrong, [*map(str, kills), *wrong]


def test_whatever_a_kill_may_leave_or_change_is_seen(finished, tmp_path):
    output, run = finished[0], tmp_path / "run"
    shutil.copytree(output, run)
    assert differences(run, output) == []
    (run / "sft" / "checkpoint").mkdir()
    (run / "stage-00" / "samples" / "00001.jsonl.tmp").write_text("")
    (run / "final" / "README.md").unlink()
    scores = run / "stage-01" / "reference.safetensors"
    scores.write_bytes(scores.read_bytes()[:-1] + b"?")
    rows = run / "metrics.jsonl"
    rows.write_text(rows.read_text().replace('"loss": 0', '"loss": 1').replace('"seconds": ', '"seconds": 1'))
    assert differences(run, output) == [
        "left: sft/checkpoint",
        "left: stage-00/samples/00001.jsonl.tmp",
        "missing: final/README.md",
        "other content: metrics.jsonl",
        "other content: stage-01/reference.safetensors",
        "not as its checksum says: final",
        "not as its checksum says: stage-01/reference.safetensors",
    ]


def test_a_process_that_outlives_its_run_is_seen(tmp_path):
    start = Start("1 process", ["-m", "tests.helpers.hold_lock", str(tmp_path / "run")], tmp_path)
    try:
        assert until(lambda: len(start.alive()) == 2, 30, pause=0.05)
        start.launcher()[0].send_signal(signal.SIGKILL)
        assert not start.gone(1.0) and start.code() == -signal.SIGKILL and len(start.alive()) == 1
    finally:
        start.clear()
    assert start.gone(1.0)
