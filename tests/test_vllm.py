"""Sampling by a real vLLM, in an interpreter that IRLFAST_VLLM_PYTHON names, against Transformers."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from irlfast.files import InputError
from irlfast.sample import Sampling, cut_at, generate_batch
from irlfast.vllm_sampler import Shard, environment, generate_vllm

PYTHON = os.environ.get("IRLFAST_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(not PYTHON, reason="IRLFAST_VLLM_PYTHON names no interpreter that has vLLM")
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11], [12, 13, 14, 15, 16, 17, 18]]
LENGTH = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Weights large enough that no two logits are close, so that greedy choices do not hang on rounding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,  # vLLM's CPU attention wants heads of 32 or more
        initializer_range=0.5,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("model")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder, model


def by_vllm(folder, shards, temperature=0.0, end_id=99, python=PYTHON):
    options = {"temperature": temperature, "top_p": 1.0, "top_k": 0, "max_new_tokens": LENGTH, "end_id": end_id}
    results = generate_vllm(folder, shards, python=python, dtype="float32", max_model_len=64, **options)
    return dict(results)


@needs_vllm
def test_greedy_ids_equal_transformers_with_and_without_the_end_token(model):
    folder, policy = model
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)
    free = generate_batch(policy, PROMPTS, 99, greedy, LENGTH)
    end_id = free[0][4]  # some answers now stop at it, and others do not
    expected = generate_batch(policy, PROMPTS, end_id, greedy, LENGTH)
    assert expected == [cut_at(answer, end_id) for answer in free]
    assert {len(answer) == LENGTH for answer in expected} == {True, False}
    shards = [Shard(0, PROMPTS[:3], 0), Shard(1, PROMPTS[3:], 0)]
    assert by_vllm(folder, shards, end_id=end_id) == {0: expected[:3], 1: expected[3:]}


@needs_vllm
def test_a_seed_gives_the_same_answers_again_and_another_gives_others(model):
    folder, _ = model
    shards = [Shard(0, PROMPTS, 7), Shard(1, PROMPTS, 7), Shard(2, PROMPTS, 8000)]
    answers = by_vllm(folder, shards, temperature=1.0)
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]
    assert by_vllm(folder, shards[:1], temperature=1.0)[0] == answers[0]


@needs_vllm
def test_a_missing_model_ends_in_what_vllm_said(tmp_path):
    with pytest.raises(RuntimeError, match="vLLM ended with code 1"):
        by_vllm(tmp_path / "gone", [Shard(0, PROMPTS, 0)])


def test_an_interpreter_without_vllm_says_how_to_get_it(tmp_path):
    if subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True, check=False).returncode == 0:
        pytest.skip("this interpreter has vLLM")
    with pytest.raises(InputError, match="has no vLLM; pip install vllm"):
        by_vllm(tmp_path, [Shard(0, PROMPTS, 0)], python=sys.executable)


def test_no_such_interpreter_is_named(tmp_path):
    with pytest.raises(InputError, match=r"vllm_python .*gone: No such file"):
        by_vllm(tmp_path, [Shard(0, PROMPTS, 0)], python=str(tmp_path / "gone"))


def test_the_child_is_no_rank_and_sees_its_own_gpu(monkeypatch):
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    child = environment()
    assert child["CUDA_VISIBLE_DEVICES"] == "6"
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"} & child.keys()
