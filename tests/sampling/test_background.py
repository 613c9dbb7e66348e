"""Sampling in the background: one thread, whose failure costs time alone, and which runs no model."""

import threading
import types

import pytest

from irlfast.common.files import InputError, read_jsonl
from irlfast.config import make_config
from irlfast.sampling import background, generation, vllm_servers
from irlfast.sampling.generation import answer_in_background, answers_to
from irlfast.sampling.shards import GREEDY, Drawn, Request
from tests.helpers.endpoint import serving
from tests.helpers.vllm_cases import VOCABULARY, tiny
from tests.helpers.vllm_servers import StandIn

WORDS = {str(token): token for token in range(VOCABULARY)}


@pytest.fixture
def request_of(tmp_path):
    """A function that makes a request for answers to 100 prompts, in two shards."""

    def make(**keys):
        config = make_config({"dataset_name": __file__, "model_name_or_path": ".", "use_vllm": True, **keys})
        decode = lambda many, skip_special_tokens: [str(ids) for ids in many]  # noqa: E731
        tokenizer = types.SimpleNamespace(
            batch_decode=decode, decode=str, get_vocab=lambda: WORDS, save_pretrained=lambda folder: None
        )
        encoder = types.SimpleNamespace(tokenizer=tokenizer, ends=(2,))
        run = types.SimpleNamespace(config=config, encoder=encoder, output=tmp_path)
        examples = [types.SimpleNamespace(prompt_ids=Ids([i, 5]), row=i) for i in range(100)]
        return Request(run, examples, 1, tmp_path / "stage-01" / "samples", GREEDY)

    return make


class Ids(list):
    def tolist(self):
        return [*self]


def test_a_failure_in_the_background_is_a_warning_and_what_is_missing_is_sampled_afterwards(
    request_of, tmp_path, monkeypatch, capfd
):
    """The first shard is answered beside training; then vLLM dies."""
    asked, request = [], request_of()

    def dies(run, policy, claim, *_):
        def answers(policy):
            shard = claim()
            yield shard.number, [Drawn([7, 2], [])] * len(shard.prompts)
            raise InputError("vLLM was killed. More of it")

        return answers

    def later(policy, parts):
        asked.append((policy, [part.path.name for part in parts]))
        for part in parts:
            generation.keep_answers(part, [Drawn([8, 2], [])] * len(part.chosen))

    monkeypatch.setattr(generation, "vllm_of", dies)
    monkeypatch.setattr(generation, "sample_parts", later)
    answer_in_background(tmp_path / "early", [request])
    answer_in_background(tmp_path / "other", [request])  # one thread at a time
    answers = answers_to(tmp_path / "early", request)
    assert asked == [(tmp_path / "early", ["00001.jsonl"])]
    assert [[*ids] for ids in answers] == [[7, 2]] * 64 + [[8, 2]] * 36
    assert (
        "stage-01/samples: sampling beside training ended (vLLM was killed); what is left is" in capfd.readouterr().err
    )
    assert not background.AT_WORK


def test_servers_answer_in_a_thread_and_the_policy_that_they_are_compared_with_is_loaded_before_it(
    request_of, tmp_path, monkeypatch
):
    model, loaded, server = tmp_path / "model", [], StandIn()
    tiny("llama").save_pretrained(model)
    monkeypatch.setattr(vllm_servers, "POLL", 0.01)

    def logps(policy, config, ids):
        loaded.append((policy, threading.current_thread()))
        return [-1.0] * (len(ids) - 1)

    monkeypatch.setattr(vllm_servers, "text_logps", logps)
    with serving(server) as at:
        request = request_of(vllm_server=[at.url.removesuffix("/v1")])
        answer_in_background(model, [request])
        [work] = background.AT_WORK
        assert work.thread is not threading.main_thread()
        work.thread.join()
        assert work.error is None and work.kept == 100
        assert [*background.end_work()] == [request.folder]
    assert server.loaded == [str(model)]
    assert loaded == [(model, threading.main_thread())]
    rows = [row for part in generation.parts_of(request) for _, row in read_jsonl(part.path)]
    found = {row["index"]: row["answer_ids"][1:] for row in rows}  # the stand-in's first id is the seed
    assert found == {i: [i, 5, 2] for i in range(100)}


def test_nothing_is_started_where_all_answers_are_there(request_of, tmp_path):
    request = request_of()
    for part in generation.parts_of(request):
        generation.keep_answers(part, [Drawn([7, 2], [])] * len(part.chosen))
    answer_in_background(tmp_path, [request])
    assert not background.AT_WORK
    assert background.end_work() == {}
