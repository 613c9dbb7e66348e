"""Errors that would end a run late end it at the start, in one sentence, before anything is written."""

import json
import sys

import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

from irlfast.config import make_config
from irlfast.data.packing import count_tokens
from irlfast.data.store import Example
from irlfast.startup.limits import groups_of
from irlfast.train import main
from tests.helpers.runs import ROOT, command

LATE = {
    "stages: found 200 with prompts_per_stage: split, but 96 rows to learn from": {"stages": 200},
    "max_tokens_per_batch: found 30, but a prompt with its answers can have": {"max_tokens_per_batch": 30},
    "align_rounds: found 90, but stage-00 has 48 rows": {"method": "rft", "align_rounds": 90},
    "stage-00: found no row with a rejected answer": {"method": "dpo", "stages": 1},
    "has no vLLM; pip install vllm": {"use_vllm": "true"},
    "vllm_python /nowhere/python: No such file": {"use_vllm": "true", "vllm_python": "/nowhere/python"},
    "Target modules {'nothing'} not found in the base model": {"use_peft": "true", "lora_target_modules": ["nothing"]},
    "sft_steps: found 0 with method sft": {"method": "sft", "sft_steps": 0, "inner_steps": "null"},
    "temperature: found 0 with num_generations 4": {"method": "rft", "temperature": [1.0, 0]},
    "metric_for_best_model: found 'reward_accuracy' with SFT of a new model alone": {
        "method": "sft",
        "inner_steps": "null",
        "keep": "best",
        "metric_for_best_model": "reward_accuracy",
    },
    "reward model /nowhere: cannot be loaded": {"method": "rft", "reward_model_name_or_path": "/nowhere"},
    "settings.json cannot be read as JSON": {"deepspeed": "settings.json"},
}


def ends_at_once(tmp_path, monkeypatch, capsys, **keys) -> str:
    monkeypatch.setattr(sys, "argv", command(tmp_path / "run", **keys)[1:])
    assert main() == 2
    message = capsys.readouterr().err
    assert message.startswith("irlfast: ") and message.count("\n") == 1
    assert not (tmp_path / "run").exists()
    return message


@pytest.mark.parametrize("message", LATE)
def test_a_run_that_would_end_late_ends_before_anything_is_written(message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "settings.json").write_text("{")
    keys = LATE[message]
    if "deepspeed" in keys:
        keys = {"deepspeed": tmp_path / "settings.json"}
    assert message in ends_at_once(tmp_path, monkeypatch, capsys, **keys)


def test_added_rewards_are_checked_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for labels, folder in ((1, tmp_path / "one"), (3, tmp_path / "three")):
        LlamaForSequenceClassification(LlamaConfig(vocab_size=32, num_labels=labels, **size)).save_pretrained(folder)
    common = {"method": "rft", "reward_data": "none"}
    three = ends_at_once(tmp_path, monkeypatch, capsys, **common, reward_model_name_or_path=tmp_path / "three")
    assert "three: found 3 labels, expected 1" in three
    one = {"reward_model_name_or_path": tmp_path / "one", "reward_combine": "min"}
    assert "reward_combine: found 'min', but one reward of one head" in ends_at_once(
        tmp_path, monkeypatch, capsys, **common, **one
    )


@pytest.mark.parametrize("method", ["irft", "rft"])
def test_no_prompt_group_is_longer_than_the_check_assumed(method, finished):
    """Against the answers that a real run sampled, cut at ``max_new_tokens`` = 12."""
    config = make_config({"dataset_name": __file__, "model_name_or_path": ".", "max_new_tokens": 12, "method": method})
    for path in finished[0].glob("stage-*/samples/*.jsonl"):
        for row in map(json.loads, path.open()):
            row_ids = Example(memoryview(bytes(9)), memoryview(bytes(5)))
            [longest] = [max(map(count_tokens, groups_of(config, row_ids)))]
            assert longest >= 9 + 4 + len(row["answer_ids"]) - 1
