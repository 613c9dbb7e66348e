"""Sampling by the processes of a run, which share a queue in torch's store."""

import pytest

from irlfast.sampling.generation import read_samples
from tests.helpers.runs import run
from tests.helpers.storm import stand_in
from tests.helpers.tiers import full

KEYS = {"max_train_samples": 96, "max_eval_samples": 8, "sft_steps": 0, "stages": 1, "inner_steps": 1, "save_steps": 0}


@full
@pytest.mark.parametrize("by", ["transformers", "vllm"])
def test_two_processes_sample_the_answers_that_one_samples(tmp_path, by):
    keys = KEYS
    if by == "vllm":
        keys = keys | {"use_vllm": True, "vllm_python": stand_in(tmp_path / "bin")}
    for processes in (1, 2):
        run(tmp_path / f"{processes}", processes, **keys)
    for place in ("initial/greedy", "initial/drawn", "stage-00/samples"):
        one, two = ([*read_samples([*(tmp_path / f"{number}" / place).glob("*.jsonl")])] for number in (1, 2))
        assert one == two and len(one) in (8, 96)
