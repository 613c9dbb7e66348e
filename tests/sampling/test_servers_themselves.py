"""Sampling by vLLM's real servers, compared with Transformers on tiny fp32 models. A start takes 40 CPU seconds."""

import json
import signal
import types

import pytest
import torch

from irlfast.common.files import InputError, read_json
from irlfast.sampling import vllm_servers
from irlfast.sampling.shards import GREEDY, Sampling, Shard
from irlfast.sampling.vllm_servers import server_answers, text_logps
from tests.helpers.runs import ROOT, contents, run
from tests.helpers.shards import claims
from tests.helpers.tiers import slow
from tests.helpers.vllm_cases import PROMPTS, VLLM_PYTHON, needs_vllm, perturbed_lora, tiny
from tests.helpers.vllm_servers import ENDS, VllmServer, answers, config_of, drawn_by
from tests.sampling.test_vllm_itself import greedy, logps_of


@pytest.fixture
def models(tmp_path):
    """Three policies and their folders: a model, the same with other weights, and an adapter on the first."""
    first, second = tiny("llama"), tiny("llama")
    torch.manual_seed(4)  # no near ties, which rounding would decide
    for weight in second.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    adapted = perturbed_lora(tiny("llama"), rank=12)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "first")
    policies = {"first": first, "second": second, "adapter": adapted}
    for name, model in policies.items():
        model.save_pretrained(tmp_path / name)
    return {tmp_path / name: model for name, model in policies.items()}


@pytest.fixture
def start(models, tmp_path):
    """A function that starts servers of the first model, and returns them when they answer."""
    servers = []

    def begin(count):
        flags = ("--skip-tokenizer-init", "--max-model-len", "256", "--enable-lora", "--max-lora-rank", "16")
        servers.extend(VllmServer(tmp_path / "first", tmp_path / f"log-{i}.txt", *flags) for i in range(count))
        for server in servers:
            server.wait()
        return servers

    yield begin
    for server in servers:
        server.end(signal.SIGKILL)


def one_prompt_each(sampling=GREEDY, n=1, times=1):
    prompts = [*PROMPTS] * times
    return [Shard(i, [ids], [1000 * i], n, sampling, 24, ENDS) for i, ids in enumerate(prompts)]


def by_transformers(model, times=1):
    return {i: [greedy(model, ids, ENDS[0])] for i, ids in enumerate([*PROMPTS] * times)}


@slow
@needs_vllm
def test_a_server_takes_policies_in_turn_and_answers_as_transformers(models, start, tmp_path, monkeypatch):
    """They agree token for token. Weights of another policy are refused by their log-probabilities."""
    [server] = start(1)
    for policy, model in [*models.items(), *models.items()]:
        got = answers(policy, [server.url], one_prompt_each(), tmp_path)
        assert got == by_transformers(model), policy.name
    drawn = one_prompt_each(Sampling(1.0, 1.0, 0, (1,), logps=True), n=3)
    first, second, _ = models
    got = drawn_by(first, [server.url], drawn, tmp_path)
    assert got == drawn_by(first, [server.url], drawn, tmp_path)
    assert len({tuple(each.ids) for group in got.values() for each in group}) > 2 * len(PROMPTS)
    for number, group in got.items():
        for each in group:
            trainer = logps_of(models[first], PROMPTS[number], each.ids)
            torch.testing.assert_close(torch.tensor(each.logps), trainer, rtol=0, atol=1e-4)
    monkeypatch.setattr(vllm_servers, "text_logps", lambda policy, config, ids: text_logps(first, config, ids))
    with pytest.raises(InputError, match=r"serves other weights than those of .*/second: the log-probabilities of"):
        answers(second, [server.url], one_prompt_each(), tmp_path)


@slow
@needs_vllm
def test_of_two_servers_one_may_be_killed_and_restarted_while_they_answer(models, start, tmp_path):
    one, two = start(2)
    urls = [one.url, two.url]
    for restarts, (policy, model) in enumerate(models.items()):
        given, got = claims(*one_prompt_each(times=4)), {}
        run = types.SimpleNamespace(config=config_of(policy, urls, vllm_server_requests=2), output=tmp_path)
        for number, answer in server_answers(policy, given, run=run):
            got[number] = [drawn.ids for drawn in answer]
            if len(got) == 5:
                one.end()
                if restarts:
                    one.start()  # with the first model's weights
                    one.wait()
        assert got == by_transformers(model, times=4)
        if not restarts:
            one.start()
            one.wait()
    assert one.log.read_text().count("/update_weight_version") > 6  # it has taken the policies after its restarts


@slow
@needs_vllm
def test_a_run_by_servers_ends_with_the_model_of_a_run_by_its_own_vllm(tmp_path):
    """The servers follow the policy from stage to stage, also for a run of two processes, of which one asks them."""
    untied = read_json(ROOT / "irlfast/demo/config.json") | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(untied))
    keys = {"use_vllm": True, "max_train_samples": 24, "max_eval_samples": 4, "sft_steps": 2, "inner_steps": 2}
    keys |= {"config_name": str(tmp_path / "config.json")}
    run(tmp_path / "own", vllm_python=VLLM_PYTHON, **keys)
    server = VllmServer(tmp_path / "own" / "sft" / "policy", tmp_path / "log.txt", "--max-model-len", "76")
    try:
        server.wait()
        run(tmp_path / "served", vllm_server=[server.url], **keys)
        run(tmp_path / "two", 2, vllm_server=[server.url], **keys | {"sft_steps": 0})
    finally:
        server.end()
    for folder in ("stage-00/samples", "stage-01/samples", "stage-01/policy", "final"):
        served, own = (contents(tmp_path / name / folder) for name in ("served", "own"))
        served.pop("README.md", None), own.pop("README.md", None)
        assert served == own, folder
    assert len([*(tmp_path / "two" / "stage-01" / "samples").glob("*.jsonl")]) > 0
