"""Sampling by servers, with stand-ins that speak vLLM's protocol. ``test_servers_themselves.py`` asks the real ones."""

import os
import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.sampling import vllm_server, vllm_servers
from irlfast.sampling.shards import Sampling
from irlfast.sampling.vllm_sampler import UnsupportedAdapter
from irlfast.sampling.vllm_servers import check_servers
from tests.helpers.endpoint import Response, failure, serving
from tests.helpers.vllm_cases import perturbed_lora, tiny
from tests.helpers.vllm_servers import StandIn, answers, config_of, drawn_by, shards


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def asked(model, tmp_path, monkeypatch):
    """A function that has scripts answer shards. The policy's own log-probabilities are those of the stand-ins.

    It returns the answers' ids; with ``how=drawn_by``, their log-probabilities, too.
    """
    monkeypatch.setattr(vllm_servers, "text_logps", lambda policy, config, ids: [-1.0] * (len(ids) - 1))
    monkeypatch.setattr(vllm_servers, "PAUSE", 0.05)
    monkeypatch.setattr(vllm_servers, "POLL", 0.01)
    monkeypatch.setattr(vllm_servers, "PATIENCE", 0.2)

    def ask(*scripts, given=None, policy=model, how=answers, **keys):
        with ExitStack() as stack:
            servers = [stack.enter_context(serving(script)) for script in scripts]
            urls = [server.url.removesuffix("/v1") for server in servers]
            return how(policy, urls, given or shards(8), tmp_path, never=[98, 99], **keys)

    return ask


def expected(given):
    return {
        shard.number: [
            [seed + k, *ids, 2] for ids, seed in zip(shard.prompts, shard.seeds, strict=True) for k in range(shard.n)
        ]
        for shard in given
    }


def test_answers_have_the_order_seeds_and_rules_of_the_runs_own_vllm(asked, model):
    given, server = shards(5, n=3, sampling=Sampling(0.7, 0.9, 5, (1,))), StandIn()
    assert asked(server, given=given) == expected(given)
    probe, *requests = server.asked
    assert probe["sampling_params"]["prompt_logprobs"] == 0
    assert server.loaded == [str(model)]
    for request in requests:
        settings = request["sampling_params"]
        seed = settings.pop("seed")
        assert request["token_ids"][0] == seed / 1000 - 1
        assert settings == {
            "n": 3,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 5,
            "max_tokens": 20,
            "stop_token_ids": [2],
            "ignore_eos": True,
            "detokenize": False,
            "logit_bias": {"98": -1e9, "99": -1e9},
        }
        assert request["cache_salt"] == server.version


def test_the_log_probability_of_each_token_comes_where_it_is_asked_for(asked):
    server, how = StandIn(), Sampling(1.0, 1.0, 0, (1,), logps=True)
    drawn = asked(server, given=shards(2, n=2, sampling=how), how=drawn_by)
    assert all(each.logps == [-0.5] * len(each.ids) for group in drawn.values() for each in group)
    assert {request["sampling_params"]["logprobs"] for request in server.asked[1:]} == {0}
    assert not any(each.logps for group in asked(StandIn(), how=drawn_by).values() for each in group)


def test_a_policy_that_a_server_has_is_not_loaded_again_and_another_is(asked, model, tmp_path):
    server = StandIn()
    asked(server)
    asked(server)
    assert server.loaded == [str(model)]
    other = tmp_path / "other"
    tiny("gpt_neox").save_pretrained(other)
    asked(server, policy=other)
    assert server.loaded == [str(model), str(other)]
    assert not [*tmp_path.glob("served*")]  # the links by which they were loaded


def slow_to_load(there: list[bool], meanwhile=lambda: None):
    """A server that loads weights for half a second, and notes whether they are still there at the end."""
    server = StandIn()

    def script(request: dict) -> Response:
        if request["path"] == "/collective_rpc":
            meanwhile()
            time.sleep(0.5)
            there.append(Path(request["kwargs"]["weights_path"]).exists())
        return server(request)

    return script


def test_a_server_that_still_loads_when_all_is_answered_reads_its_weights_to_the_end(asked, tmp_path):
    there: list[bool] = []
    given = shards(1)
    assert asked(StandIn(), slow_to_load(there), given=given) == expected(given)
    assert there == [True]
    assert not [*tmp_path.glob("served*")]


def test_a_server_that_is_gone_while_it_loads_keeps_nobody_waiting(asked, monkeypatch, capfd):
    """Its machine closes no connection. The other server answers all, or there is no other one."""
    monkeypatch.setattr(vllm_server, "HEARTBEAT", 0.1)
    server, release = StandIn(), threading.Event()

    def gone(request: dict) -> Response:
        if request["path"] in ("/collective_rpc", "/health"):
            release.wait(60)
        return server(request)

    given = shards(1)
    try:
        assert asked(StandIn(), gone, given=given) == expected(given)
        with pytest.raises(InputError, match=r"no server answers \(\S+ cannot be reached\)"):
            asked(gone, given=given)
    finally:
        release.set()
    assert "cannot be reached; it is asked again until it is back" in capfd.readouterr().err


def test_an_adapter_is_loaded_on_its_base_under_a_name_of_its_own(asked, model, tmp_path):
    adapted = perturbed_lora(tiny("llama"), rank=12)
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(tmp_path / "adapter")
    server = StandIn()
    asked(server, policy=tmp_path / "adapter")
    [name] = server.adapters
    assert server.loaded == [str(model), str(tmp_path / "adapter")]
    assert {request["model"] for request in server.asked} == {name}

    def without_lora(request):
        refused = request["path"] == "/v1/load_lora_adapter"
        return failure(500, "Gemma does not support LoRA yet.") if refused else server(request)

    server.adapters.clear()
    with pytest.raises(UnsupportedAdapter):
        asked(without_lora, policy=tmp_path / "adapter")


def test_shards_of_a_server_that_dies_are_answered_by_the_others(asked, capfd):
    given, dying, other, died = shards(12), StandIn(), StandIn(), threading.Event()

    def dies(request):
        if len(dying.asked) < 3:  # the probe, and two answers
            return dying(request)
        died.set()
        return failure(503)

    def waits(request):
        assert died.wait(60)
        return other(request)

    assert asked(dies, waits, given=given) == expected(given)
    assert len(dying.asked) == 3
    assert capfd.readouterr().err.count("the other servers answer its prompts until it is back") == 1


def test_answers_of_a_server_that_restarts_do_not_count_until_it_has_the_policy_again(asked, capfd):
    given, server, restarts = shards(12), StandIn(), []

    def restarting(request):
        if len(server.asked) == 6 and not restarts:
            restarts.append(True)
            server.version = "default"  # of a fresh process, which serves the weights that it was started with
        response = server(request)
        if server.version == "default" and "choices" in response.body:
            for choice in response.body["choices"]:
                choice["token_ids"] = [66, 66, 2]
        return response

    assert asked(restarting, given=given) == expected(given)
    assert len(server.loaded) == 2
    assert "has restarted, without the policy; it is asked again until it is back" in capfd.readouterr().err


def test_other_weights_are_refused(asked, monkeypatch):
    monkeypatch.setattr(vllm_servers, "text_logps", lambda policy, config, ids: [-1.5] * (len(ids) - 1))
    with pytest.raises(InputError, match=r"serves other weights than those of .*: the log-probabilities of 1 tokens"):
        asked(StandIn())


def test_a_server_that_another_run_uses_is_refused(asked):
    server = StandIn()

    def taken(request):
        if len(server.asked) == 4:
            server.version = "another"
        return server(request)

    with pytest.raises(InputError, match="another run loads its policies into it"):
        asked(taken)


def test_an_answer_that_nothing_ended_is_refused(asked):
    server = StandIn()

    def cutting(request):
        response = server(request)
        for choice in response.body.get("choices", []):
            choice["token_ids"] = choice["token_ids"][:-1]
        return response

    with pytest.raises(InputError, match=r"cut an answer to a prompt of 2 tokens after 3 .* a larger --max-model-len"):
        asked(cutting)


def test_a_server_that_cannot_load_the_policy_is_refused_with_its_reason(asked):
    server = StandIn()

    def failing(request):
        return failure(500, "Worker failed") if request["path"] == "/collective_rpc" else server(request)

    with pytest.raises(InputError, match=r"cannot load .*: it says: Worker failed"):
        asked(failing)


def test_an_interruption_while_servers_answer_stays_one(asked):
    server, once = StandIn(), threading.Lock()

    def interrupting(request):
        if len(server.asked) == 3 and once.acquire(blocking=False):
            signal.raise_signal(signal.SIGINT)  # Python handles it in the main thread, which waits for the answer
            time.sleep(0.2)
        return server(request)

    with interruptible(), pytest.raises(KeyboardInterrupt):
        asked(interrupting)


def test_an_interruption_while_a_server_loads_waits_for_its_load(asked, tmp_path):
    there: list[bool] = []

    def interrupt():
        time.sleep(0.1)  # the main thread waits by now
        os.kill(os.getpid(), signal.SIGINT)

    with interruptible(), pytest.raises(KeyboardInterrupt):
        asked(slow_to_load(there, interrupt))
    assert there == [True]
    assert not [*tmp_path.glob("served*")]


@contextmanager
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_sentence_says_that_no_server_answers(asked):
    def dead(request):
        return failure(503)

    with pytest.raises(
        InputError, match=r"vllm_server: no server answers \(http.*; http.*\); the same command resumes"
    ):
        asked(dead, dead)


@pytest.mark.parametrize(
    ("path", "response", "said"),
    [
        ("/weight_info", Response(404, {"detail": "Not Found"}), "has no /weight_info; expected vLLM 0.32"),
        ("/inference/v1/generate", failure(403, "Restart with --enable-scale-out."), "--enable-scale-out"),
        ("/v1/unload_lora_adapter", Response(404, {"detail": "Not Found"}), "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ("/v1/models", failure(401, "Unauthorized"), "refused /v1/models: Unauthorized"),
        (None, None, "takes 100 tokens, but a prompt with its answer can have 101"),
    ],
)
def test_what_a_server_lacks_is_said_before_a_run_begins(model, path, response, said):
    server = StandIn()
    with serving(lambda request: response if request["path"] == path else server(request)) as served:
        config = config_of(model, [served.url], use_peft=True)
        with pytest.raises(InputError, match=said):
            check_servers(config, longest=101 if path is None else 100)


def test_a_run_begins_if_one_server_answers_and_not_without_any(model, capfd):
    with serving(StandIn()) as served, serving(StandIn()) as gone:
        gone.die()
        check_servers(config_of(model, [served.url, gone.url]), longest=100)
        assert "cannot be reached; the others sample until it is back" in capfd.readouterr().err
        with pytest.raises(InputError, match=r"no server answers \(http.* cannot be reached\)"):
            check_servers(config_of(model, [gone.url]), longest=100)


def test_a_model_that_vllm_reloads_in_part_is_refused_but_not_its_adapters(tmp_path):
    model = tiny("llama")
    model.config.tie_word_embeddings = True
    model.config.save_pretrained(tmp_path)
    with serving(StandIn()) as served:
        with pytest.raises(InputError, match="only a part; expected a model with embeddings of their own"):
            check_servers(config_of(tmp_path, [served.url]), longest=100)
        check_servers(config_of(tmp_path, [served.url], use_peft=True), longest=100)


@pytest.mark.parametrize(
    ("servers", "use_vllm", "said"),
    [
        (["localhost:8000"], True, "vllm_server: found no http://"),
        (["http://a:1", "http://a:1"], True, "found an address twice"),
        (["http://a:1"], False, "expected use_vllm: true"),
    ],
)
def test_addresses_that_cannot_be_are_refused(servers, use_vllm, said):
    with pytest.raises(InputError, match=said):
        make_config({"dataset_name": __file__, "model_name_or_path": "m", "use_vllm": use_vllm, "vllm_server": servers})
