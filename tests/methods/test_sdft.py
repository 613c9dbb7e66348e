"""SDFT as a user runs it: files and metrics, a kill at any moment, and the kinds of its teacher."""

import json

import pytest
from safetensors.torch import load_file

from tests.helpers.runs import contents, run, run_killed_at
from tests.helpers.tiers import full, slow

SDFT = {"method": "sdft", "align_rounds": 2, "max_length": 160, "ref_model_mixup_alpha": 0.3}
SDFT |= {"distillation_is_clip": 2.0, "num_loss_tokens_to_skip": 1, "temperature": 0.9, "max_new_tokens": 24}
OPSD = SDFT | {"sync_ref_model": False, "distillation_alpha": 0.5, "use_peft": True, "lora_r": 4}


@pytest.fixture(scope="module")
def sdft(tmp_path_factory):
    output = tmp_path_factory.mktemp("sdft") / "run"
    run(output, **SDFT, stages=1)
    return output


def test_a_run_samples_in_every_round_and_its_teacher_follows_the_policy(sdft):
    stage = sdft / "stage-00"
    for folder in (stage / "round-00", stage):
        lines = (folder / "samples" / "00000.jsonl").read_text().splitlines()
        assert len(lines) == json.loads((folder / "round.json").read_text())["answers"] == 48
        assert (folder / "old.safetensors").exists()
    for model in ("policy", "teacher"):  # the next round's took its place
        assert (stage / model).exists() and not (stage / "round-00" / model).exists()
    rows = [json.loads(line) for line in (sdft / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["phase"].startswith("stage-00")]
    assert [row["phase"] for row in rows] == ["stage-00/round-00"] * 2 + ["stage-00"] * 2
    assert all(row["divergence"] > 0 and row["length/synthetic"] > 0 for row in rows)
    policy, teacher = (load_file(stage / model / "model.safetensors") for model in ("policy", "teacher"))
    initial = load_file(sdft / "sft" / "policy" / "model.safetensors")
    for name in policy:
        assert 0 < (teacher[name] - initial[name]).norm() < (policy[name] - initial[name]).norm(), name


def test_a_killed_run_ends_with_the_same_bytes(sdft, tmp_path):
    moments = ["stage-00/round-00/checkpoint/step-2", "stage-00/samples", "stage-00/checkpoint/step-2"]
    run_killed_at(tmp_path, moments, **SDFT, stages=1)
    run(tmp_path, **SDFT, stages=1)
    for folder in ("final", "stage-00/teacher"):
        assert contents(tmp_path / folder) == contents(sdft / folder)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=full), pytest.param(2, marks=slow)])
def test_a_frozen_teacher_with_lora_in_bf16_and_a_live_one_leave_no_second_model(tmp_path, processes):
    live = SDFT | {"sync_ref_model": True, "ref_model_mixup_alpha": 1, "distillation_mode": "topk_logits"}
    for name, keys in (("frozen", OPSD | {"dtype": "bfloat16", "zero_stage": 2}), ("live", live)):
        run(tmp_path / name, processes, **keys, stages=2)
        assert (tmp_path / name / "final").exists()
        assert not list((tmp_path / name).rglob("teacher*"))


@full
def test_rows_that_the_teacher_cannot_read_are_left_out_and_counted(tmp_path):
    _, printed = run(tmp_path, **SDFT | {"max_length": 120, "max_prompt_length": 64}, stages=1)
    assert "rows are left out, because the teacher's prompt would have more than max_length (120) tokens" in printed
