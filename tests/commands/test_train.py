"""The main job as a user runs it: one command, killed anywhere, on one process or two, on bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from irlfast.train import main
from tests.helpers.runs import DEMO, PYTHON, ROOT, TORCHRUN, command, contents, run, run_killed_at
from tests.helpers.tiers import first_then_full, full, one_run_or_each_its_own, slow
from tests.helpers.tokenizers_like import pythia


def test_the_files_of_a_run(finished):
    output, out, _ = finished
    assert yaml.safe_load((output / "config.yaml").read_text())["stages"] == 2
    for stage in ("stage-00", "stage-01"):
        assert (output / stage / "reference.safetensors").exists()
        assert list((output / stage / "samples").glob("*.jsonl"))
        assert (output / stage / "DONE").exists()
        assert not (output / stage / "checkpoint").exists()
    assert not list(output.rglob("*.tmp"))
    assert "<html" in (output / "report.html").read_text()
    for phase in ("sft", "stage-00", "stage-01"):
        assert phase in out


def test_metrics_use_trls_names(finished):
    rows = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["step"]) for row in rows] == [
        *(("sft", step) for step in (2, 4, 6)),
        *((f"stage-0{stage}", step) for stage in (0, 1) for step in (2, 4)),
    ]
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"}
    assert names <= set(rows[-1])
    assert rows[-1]["stage"] == 1
    assert rows[0]["stage"] == -1
    for row in rows:
        known = {name: value for name, value in row.items() if name.startswith("sampling/")}
        assert bool(known) == (row["phase"] != "sft")
        if known:
            assert 0 < known["sampling/sampling_logp_difference/max"] < 1e-4  # both by Transformers, in fp32
            assert known.items() <= json.loads((finished[0] / row["phase"] / "pairs.json").read_text()).items()


def test_final_loads_with_plain_transformers_and_stops_at_the_end_token(finished):
    model = AutoModelForCausalLM.from_pretrained(finished[0] / "final")
    tokenizer = AutoTokenizer.from_pretrained(finished[0] / "final")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model(torch.tensor([tokenizer("half past nine").input_ids])).logits.isfinite().all()


def test_the_same_command_again_changes_nothing(finished):
    output, *_ = finished
    before = contents(output / "final") | {"metrics": (output / "metrics.jsonl").read_bytes()}
    _, err = run(output, PYTHON)
    assert contents(output / "final") | {"metrics": (output / "metrics.jsonl").read_bytes()} == before
    assert "leaked" not in err  # by Triton's binding, at the very end


KILLED_AT = [
    "initial/policy",
    "sft/checkpoint/step-2",
    "sft/policy",
    "stage-00/samples/00000.jsonl",
    "stage-00/checkpoint/step-2",
    "stage-01/reference.safetensors",
]


@full
@pytest.mark.parametrize("moments", one_run_or_each_its_own(KILLED_AT))
def test_a_run_that_is_killed_at_any_moment_resumes_to_the_same_bytes(finished, tmp_path, moments):
    run_killed_at(tmp_path / "run", moments)
    run(tmp_path / "run")
    assert contents(tmp_path / "run" / "final") == contents(finished[0] / "final")
    rows = [(row["phase"], row["step"]) for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())]
    assert len(rows) == len(set(rows)) == 7


def test_a_changed_config_or_dataset_is_refused_with_the_difference(finished, tmp_path):
    _, err = run(finished[0], code=2, beta=0.75)
    assert "another configuration (beta: 0.5 -> 0.75)" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("zero_stage", first_then_full([3, 2]))
def test_two_processes_end_with_the_parameters_of_one(tmp_path, zero_stage):
    """Samples come from seeds by shard, so both see the same pairs."""
    run(tmp_path / "one", zero_stage=zero_stage)
    several = {"max_tokens_per_batch": 96}  # micro-batches a step
    run(tmp_path / "two", TORCHRUN if zero_stage == 2 else 2, zero_stage=zero_stage, **several)
    waited = [
        [
            json.loads(line)["time/communication"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("one", "two")
    ]
    assert max(waited[0]) < min(waited[1])
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    start_ = load_file(tmp_path / "one" / "initial" / "policy" / "model.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        moved = (one[name] - start_[name]).abs().max()
        assert moved > 0
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-3 * moved.item())


@full
def test_a_stage_warns_and_stops_early_when_demonstrations_become_unlikely(tmp_path):
    keys = DEMO | {"learning_rate": 3e-3, "beta": 0.1, "stages": 1, "inner_steps": 20, "max_expert_drop": 2.0}
    _, err = run(tmp_path / "run", **keys)
    assert "warning: stage-00" in err
    assert "lower learning_rate, raise beta, or set nll_weight" in err
    assert "are more than max_expert_drop" in err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] < 20


@full
@pytest.mark.parametrize("inner_steps", [2, pytest.param(4, marks=slow)])  # 2: the only bad step is the last one
def test_a_learning_rate_that_breaks_the_model_ends_the_run_without_a_policy(tmp_path, inner_steps):
    _, err = run(tmp_path / "run", code=2, learning_rate=1e9, sft_steps=0, inner_steps=inner_steps)
    assert "warning: stage-00: with a learning rate of 1e+09, each step moves every weight by about 1e+09" in err
    assert "loss or gradient were not finite, also with a tenth of the learning rate" in err.splitlines()[-1]
    assert not (tmp_path / "run" / "stage-00" / "policy").exists()


@full
def test_a_full_disk_ends_the_run_in_one_sentence_and_the_run_resumes_with_room(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        for room in ("14m", "200m"):  # the disk is too small for what the run will need, or already full
            _, err = run(disk / "run", code=2, **DEMO)
            full = "its disk is full.*; 0.0 GB are free there, and .* GB for temporary files; the same command resumes$"
            small = "are free.* room, or a smaller save_total_limit, "
            assert re.search(f"{full}|{small}", err.splitlines()[-1])
            assert "Traceback" not in err
            subprocess.run(["mount", "-o", f"remount,size={room}", str(disk)], check=True)
        run(disk / "run", **DEMO)
        run(tmp_path / "whole", **DEMO)
        assert contents(disk / "run" / "final") == contents(tmp_path / "whole" / "final")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def bad(tmp_path: Path, case: str) -> dict:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    if case == "wrong key":
        return {"betta": 1}
    if case == "missing file":
        return {"dataset_name": str(tmp_path / "gone.jsonl")}
    if case == "wrong column":
        rows.write_text('{"head": "a", "tail": "b"}\n')
    if case == "not JSON":
        rows.write_text('{"prompt": "a", "completion": "b"}\nnonsense\n')
    if case == "empty dataset":
        rows.write_text("")
    if case == "only empty answers":
        rows.write_text('{"prompt": "a", "completion": " "}\n' * 3)
    if case == "model without weights":
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
        return {"model_name_or_path": str(tmp_path / "model"), "config_name": "null", "train_tokenizer": "null"}
    if case == "unwritable output_dir":
        (tmp_path / "file").write_text("")
        return {"output_dir": str(tmp_path / "file" / "run")}
    if case == "not a model config":
        (tmp_path / "config.json").write_text("{}")
        return {"config_name": str(tmp_path / "config.json")}
    if case == "too few positions":
        (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_positions": 95}')
        return {"config_name": str(tmp_path / "config.json")}
    if case == "no end token":
        tokenizer = pythia()
        tokenizer.eos_token = None
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        return {"tokenizer_name_or_path": str(tmp_path / "tokenizer"), "train_tokenizer": "null"}
    if case == "too many frozen layers":
        return {"method": "rft", "reward_frozen_layers": 3}
    return {"dataset_name": str(rows)}


CASES = {
    "wrong key": "unknown key 'betta' on the command line; did you mean beta?",
    "missing file": "dataset_name: no such file or folder",
    "wrong column": "rows.jsonl, line 1: found columns head, tail; expected prompt and completion, messages",
    "not JSON": "rows.jsonl, line 2: not JSON",
    "empty dataset": "rows.jsonl: 0 rows read",
    "only empty answers": "left out: 3 without an answer",
    "model without weights": "found no weights, expected *.safetensors",
    "unwritable output_dir": "cannot be written",
    "not a model config": "not a Transformers config",
    "no end token": "no end token",
    "too many frozen layers": "reward_frozen_layers: found 3, but the model has 2 layers",
    "too few positions": "found up to 96 tokens, but the model has 95 positions",
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_the_run_in_one_sentence_and_writes_nothing(tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command(tmp_path / "run", **bad(tmp_path, case))[1:])
    assert main() == 2
    message = capsys.readouterr().err
    assert CASES[case] in message
    assert message.startswith("irlfast: ")
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()
