"""`irlfast generate` and the judge against the real vLLM's server, which serves a tiny model."""

import collections
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from irlfast.common.endpoint import Endpoint
from irlfast.common.files import read_jsonl
from irlfast.evaluation.judge import Case, JudgeSettings, judge, requests_for
from irlfast.generate import main
from tests.helpers.tiers import slow
from tests.helpers.tokenizers_like import qwen
from tests.helpers.vllm_cases import VLLM_PYTHON, needs_vllm

PROMPTS = ["What is the capital of France?", "a b c", "user assistant", "Paris", "of of of", "is the is the"]
TOKENS = 16
PARTIAL = "\ufffd"  # a character whose last bytes are missing; vLLM leaves it out at the end of a text


def greedy(model, tokenizer, messages: list[dict]) -> tuple[int, list[int]]:
    """The number of the prompt's tokens, and the answer's ids with its end token."""
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = inputs["input_ids"].shape[1]
    return length, model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[0, length:].tolist()


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A tiny model. Its end token is one that occurs in many of its answers, but not in all."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = qwen()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    answers = [greedy(model, tokenizer, [{"role": "user", "content": prompt}])[1] for prompt in PROMPTS]
    counts = collections.Counter(token for answer in answers for token in set(answer))
    end = next(token for token, count in counts.most_common() if count < len(PROMPTS))
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(policy):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    given = ["--model", policy, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", port]
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", *given, "--dtype", "float32", "--enforce-eager"]
    log = (policy / "log.txt").open("w")
    server = subprocess.Popen(
        [*map(str, command)],
        cwd=policy,
        env=os.environ | settings,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        while not answers(f"http://127.0.0.1:{port}/v1/models"):
            assert server.poll() is None, (policy / "log.txt").read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


@slow
@needs_vllm
def test_answers_and_verdicts_of_a_served_model_are_its_own(policy, url, tmp_path, monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    end = model.generation_config.eos_token_id

    asked, output = tmp_path / "prompts.jsonl", tmp_path / "demonstrations.jsonl"
    asked.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    given = ["--base_url", url, "--model", "tiny", "--temperature", "0", "--max_new_tokens", str(TOKENS)]
    monkeypatch.setattr(sys, "argv", ["irlfast generate", str(asked), str(output), *given])
    assert main() == 0
    expected = {}
    for prompt in PROMPTS:
        ids = greedy(model, tokenizer, [{"role": "user", "content": prompt}])[1]
        text = tokenizer.decode(ids[:-1], skip_special_tokens=True).strip()
        expected |= {prompt: text} if ids[-1] == end and text else {}
    rows = [row for _, row in read_jsonl(output)]
    assert {row["prompt"][0]["content"]: row["completion"][0]["content"] for row in rows} == expected
    assert 0 < len(rows) < len(PROMPTS)

    settings = JudgeSettings(Endpoint(url, "tiny", 0.0, TOKENS), concurrency=2)
    cases = [Case(prompt, "one", "two") for prompt in PROMPTS[:3]]
    counts = judge(tmp_path, "other", cases, settings)
    assert counts["unjudged"] == 3 and counts["missing"].total() == 6  # the model has not learned to give verdicts
    replies = {row["key"]: row for _, row in read_jsonl(tmp_path / "judge" / "replies.jsonl")}
    for request in (request for case in cases for request in requests_for(case, settings)):
        length, ids = greedy(model, tokenizer, request.messages)
        reply = replies[request.key]
        text = tokenizer.decode(ids[:-1] if ids[-1] == end else ids, skip_special_tokens=True).strip()
        assert reply["text"].rstrip(PARTIAL).strip() == text.rstrip(PARTIAL).strip()
        assert reply["finish"] == ("stop" if ids[-1] == end else "length")
        assert (reply["prompt_tokens"], reply["completion_tokens"]) == (length, len(ids))
    kept = (tmp_path / "judge" / "replies.jsonl").read_bytes()
    assert judge(tmp_path, "other", cases, settings) == counts
    assert (tmp_path / "judge" / "replies.jsonl").read_bytes() == kept
