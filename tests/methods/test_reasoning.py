"""Hidden reasoning as a user runs it: thoughts and their marks, evaluation behind thoughts, a kill and a resume."""

import json

import pytest
from transformers import AutoTokenizer

from irlfast.common.files import InputError
from irlfast.config import make_config
from tests.helpers.runs import contents, run, run_killed_at

KEYS = {"method": "reasoning", "thought_mark": "|", "max_thought_tokens": 5, "num_generations": 2, "stages": 1}
SMALL = {"max_train_samples": 16, "max_eval_samples": 4, "sft_steps": 2, "inner_steps": 2}


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_thinks_before_it_trains_and_before_it_is_evaluated_and_resumes_to_the_same_bytes(tmp_path):
    output = tmp_path / "whole"
    run(output, **KEYS, **SMALL)
    mark = AutoTokenizer.from_pretrained(output / "final")("|", add_special_tokens=False).input_ids
    thoughts = lines(output / "stage-00/thoughts/00000.jsonl")
    assert len(thoughts) == 16 * 2
    assert max(len(row["answer_ids"]) for row in thoughts) <= 5
    assert all(mark[0] not in row["answer_ids"][:-1] for row in thoughts)
    assert all(row["prompt"].endswith("|") for row in lines(output / "stage-00/greedy/00000.jsonl"))
    summary = json.loads((output / "stage-00/thoughts.json").read_text())
    assert summary["closed"] == sum(row["answer_ids"][-1] == mark[0] for row in thoughts) / 32
    run_killed_at(tmp_path / "killed", ["stage-00/thoughts/00000.jsonl"], **KEYS, **SMALL)
    run(tmp_path / "killed", **KEYS, **SMALL)
    assert contents(tmp_path / "killed/final") == contents(output / "final")


def test_a_mark_of_several_tokens_is_refused(tmp_path):
    _, err = run(tmp_path / "run", code=2, **KEYS | {"thought_mark": "</think>"}, **SMALL)
    assert "thought_mark: found '</think>', which is" in err
    assert "tokens of this tokenizer; expected one" in err


def test_thoughts_need_a_temperature():
    given = {"dataset_name": __file__, "model_name_or_path": ".", "method": "reasoning", "temperature": 0}
    with pytest.raises(InputError, match="temperature: found 0 with num_generations 4"):
        make_config(given)
