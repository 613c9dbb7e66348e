"""Sampling by vLLM's real servers, compared with Transformers on tiny fp32 models. A start takes 40 CPU seconds."""

import json
import os
import re
import signal
import time
import types
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from irlfast.common.files import InputError
from irlfast.sampling import vllm_servers
from irlfast.sampling.shards import GREEDY, Sampling, Shard
from irlfast.sampling.vllm_servers import server_answers, text_logps
from tests.helpers.runs import Forked, command, contents, run
from tests.helpers.shards import claims
from tests.helpers.storm import differences
from tests.helpers.tiers import slow
from tests.helpers.vllm_cases import PROMPTS, VLLM_PYTHON, needs_vllm, perturbed_lora, tiny
from tests.helpers.vllm_servers import ENDS, VllmServer, answers, config_of, drawn_by
from tests.runs.test_async_sampling import drawn_by as drawn_alone
from tests.runs.test_async_sampling import kept, seconds_of
from tests.sampling.test_vllm_itself import greedy, logps_of

VOCABULARY = 300  # as many tokens as the tokenizer that runs here train: their models have the same shapes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three policies and their folders: a model, the same with other weights, and an adapter on the first."""
    folder = tmp_path_factory.mktemp("models")
    first, second, base = (tiny("llama", VOCABULARY) for _ in range(3))
    torch.manual_seed(4)  # this seed and the next give no near ties, which rounding would decide
    for weight in second.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    torch.manual_seed(3)
    adapted = perturbed_lora(base, rank=12)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "first")
    policies = {"first": first, "second": second, "adapter": adapted}
    for name, model in policies.items():
        model.save_pretrained(folder / name)
    return {folder / name: model for name, model in policies.items()}


@pytest.fixture(scope="module")
def started(models, tmp_path_factory):
    """Two servers of the first model."""
    folder, first = tmp_path_factory.mktemp("servers"), next(iter(models))
    flags = ("--skip-tokenizer-init", "--max-model-len", "256", "--enable-lora", "--max-lora-rank", "16")
    servers = [VllmServer(first, folder / f"log-{i}.txt", *flags) for i in range(2)]
    yield servers
    for server in servers:
        server.end(signal.SIGKILL)


@pytest.fixture
def servers(started):
    """The same, which answer, whatever an earlier test has done to them."""
    return up(started)


def up(servers):
    for server in servers:
        if server.process.poll() is not None:
            server.start()
    for server in servers:
        server.wait()
    return servers


def one_prompt_each(sampling=GREEDY, n=1, times=1):
    prompts = [*PROMPTS] * times
    return [Shard(i, [ids], [1000 * i], n, sampling, 24, ENDS) for i, ids in enumerate(prompts)]


def by_transformers(model, times=1):
    return {i: [greedy(model, ids, ENDS[0])] for i, ids in enumerate([*PROMPTS] * times)}


@slow
@needs_vllm
def test_a_server_takes_policies_in_turn_and_answers_as_transformers(models, servers, tmp_path, monkeypatch):
    """They agree token for token. Weights of another policy are refused by their log-probabilities."""
    server, _ = servers
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
def test_of_two_servers_one_may_be_killed_and_restarted_while_they_answer(models, servers, tmp_path):
    """It is killed while they answer for the first policy, and comes back while they answer for the second one."""
    one, two = servers
    half_way = [one.end, one.wait, lambda: None]
    for (policy, model), event in zip(models.items(), half_way, strict=True):
        run = types.SimpleNamespace(config=config_of(policy, [one.url, two.url], vllm_server_requests=2))
        run.output, got = tmp_path, {}
        for number, answer in server_answers(policy, claims(*one_prompt_each(times=4)), run=run):
            got[number] = [drawn.ids for drawn in answer]
            if len(got) == 5:
                event()
        assert got == by_transformers(model, times=4)
        if event == one.end:
            taken = times_it_took_weights(one)
            one.start()  # with the first model's weights
    assert times_it_took_weights(one) > taken


def times_it_took_weights(server: VllmServer) -> int:
    return server.log.read_text().count("/update_weight_version")


@slow
@needs_vllm
def test_a_run_by_servers_ends_with_the_model_of_a_run_by_its_own_vllm(models, servers, tmp_path):
    """The servers follow the policy from phase to phase, also for a run of two processes, of which one asks them."""
    keys = {"use_vllm": True, "max_train_samples": 24, "max_eval_samples": 4, "sft_steps": 2, "inner_steps": 2}
    keys |= {"config_name": str(next(iter(models)) / "config.json"), "stages": 1}
    served = keys | {"vllm_server": [server.url for server in servers]}
    run(tmp_path / "own", vllm_python=VLLM_PYTHON, **keys)
    run(tmp_path / "served", **served)
    run(tmp_path / "two", 2, **served | {"sft_steps": 0})
    for folder in ("stage-00/samples", "stage-00/policy", "final"):
        one, other = (contents(tmp_path / name / folder) for name in ("served", "own"))
        one.pop("README.md", None), other.pop("README.md", None)
        assert one == other, folder
    assert len([*(tmp_path / "two" / "stage-00" / "samples").glob("*.jsonl")]) > 0


# Stage 1 asks for 512 answers in eight shards, of which each server has one in work. Meanwhile stage 0 takes 380 steps.
BESIDE = {
    "use_vllm": True,
    "vllm_python": VLLM_PYTHON,
    "vllm_server_requests": 64,
    "async_sampling": True,
    "async_sampling_at": 0.05,
    "eval_every_stage": False,
    "max_train_samples": 1024,
    "max_eval_samples": 8,
    "max_new_tokens": 6,
    "sft_steps": 2,
    "inner_steps": [400, 2],
    "learning_rate": 1e-4,
}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def undisturbed(request, models, started, tmp_path_factory):
    """A run that both servers answer beside training: its number of processes, keys, folder and messages."""
    keys = BESIDE | {
        "config_name": str(next(iter(models)) / "config.json"),
        "vllm_server": [server.url for server in up(started)],
    }
    output = tmp_path_factory.mktemp("beside") / "run"
    return request.param, keys, output, run(output, request.param, **keys)[1]


@slow
@needs_vllm
def test_servers_answer_beside_training_as_the_early_policy_does(undisturbed):
    """The answers are those that the early policy draws alone, by the run's own vLLM."""
    *_, output, said = undisturbed
    took, waited = seconds_of(said)
    assert waited < took
    assert kept(output / "stage-01/samples") == drawn_alone(output / "stage-00/early", output, 1)
    assert json.loads((output / "stage-01/pairs.json").read_text())["sampling/staleness"] == 380
    print(f"answers in {took:.1f} s beside training, and {waited:.1f} s of waiting")


def load_other(server: VllmServer, policy) -> None:
    """Load another run's policy into a server, whose version changes first, as by that run."""
    weights = {"method": "reload_weights", "kwargs": {"weights_path": str(policy)}}
    for path, body in (("/update_weight_version", {"new_version": "another"}), ("/collective_rpc", weights)):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.url}{path}", json.dumps(body).encode(), headers)
        urllib.request.urlopen(request, timeout=60).close()


CANNOT = r"warning: vllm_server \S+ (cannot be reached|answers with status 503); the other servers answer its prompts"
BY_OTHERS = r"sampling beside training ended \(vllm_server \S+: another run loads its policies into it.*is sampled now"


@slow
@needs_vllm
@pytest.mark.parametrize(
    ("event", "code", "says"),
    [("a server is killed", 0, CANNOT), ("other weights are loaded", 0, BY_OTHERS), ("preempted", 75, "resumes")],
)
def test_whatever_comes_while_servers_answer_beside_training_the_run_ends_as_an_undisturbed_one(
    models, servers, undisturbed, tmp_path, event, code, says
):
    """It comes when the first of eight shards is there, to both servers at a time: one may still load the policy."""
    count, keys, whole, _ = undisturbed
    output = tmp_path / "run"
    started = Forked(command(output, **keys), count)
    while not [*output.glob("stage-01/samples/*.jsonl")]:
        assert started.processes[0].is_alive(), started.wait(0)
        time.sleep(0.01)
    assert not (output / "stage-00/DONE").exists()
    if event == "a server is killed":
        max(servers, key=lambda server: server.log.stat().st_mtime).end()  # one that answers, not one that still loads
    elif event == "preempted":
        os.kill(started.processes[0].pid, signal.SIGTERM)
    else:
        with ThreadPoolExecutor() as pool:
            [*pool.map(load_other, servers, [[*models][1]] * 2)]
    ended, _, said = started.wait(600)
    assert ended == code and re.search(says, said), said
    if code:
        run(output, count, **keys)
    assert differences(output, whole) == []
