"""`irlfast generate` against a local server that speaks OpenAI's protocol: rows, retries, failures, resuming."""

import json
import sys
from collections import Counter

import pytest

from irlfast.config import make_config
from irlfast.data.read import read_demonstrations
from irlfast.data.sources import sources_of
from irlfast.generate import main
from tests.helpers.endpoint import Response, Server, completion, failure, serving

pytest.importorskip("openai", reason="pip install openai")
WORDS = [f"word {number}" for number in range(12)]


class Script:
    """Answers a prompt with its text in capitals, and a request for a better answer with an exclamation mark more.

    ``status`` has the statuses that a prompt gets before its answers, one per request.
    """

    def __init__(self) -> None:
        self.status: dict[str, list[int]] = {}

    def __call__(self, request: dict) -> Response:
        prompt = request["messages"][-1]["content"]
        if self.status.get(prompt):
            return failure(self.status[prompt].pop(0))
        answers = [message["content"] for message in request["messages"] if message["role"] == "assistant"]
        text = f"{answers[-1]}!" if answers else "" if prompt == "silent" else f" {prompt.upper()}\n"
        return completion(text, "length" if prompt == "long" else "stop")


def asked(server: Server) -> Counter[str]:
    return Counter(request["messages"][-1]["content"] for request in server.requests)


@pytest.fixture
def endpoint():
    with serving(Script()) as server:
        yield server


@pytest.fixture
def generate(tmp_path, endpoint, monkeypatch, capsys):
    """Run the command on some prompts, and return its exit code, its rows, and what it printed."""

    def start(rows: list[dict], *more: str, url: str = endpoint.url, code: int = 0) -> tuple[list[dict], str]:
        prompts, output = tmp_path / "prompts.jsonl", tmp_path / "demonstrations.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = [str(prompts), str(output), "--base_url", url, "--model", "strong", "--max_retries", "2", *more]
        monkeypatch.setattr(sys, "argv", ["irlfast generate", *given])
        assert main() == code
        printed = capsys.readouterr()
        written = [json.loads(line) for line in output.open()] if output.exists() else []
        return written, printed.out + printed.err

    return start


def prompts(*words: str) -> list[dict]:
    return [{"prompt": word} for word in words]


def read(path) -> list:
    config = make_config({"dataset_name": str(path), "model_name_or_path": "."})
    return [*read_demonstrations(config, sources_of(config), [])]


def test_every_prompt_gets_an_answer_that_training_reads_in_the_order_of_the_prompts(generate, endpoint, tmp_path):
    (tmp_path / "system.txt").write_text("Be kind.\n")
    keys = ["--system", str(tmp_path / "system.txt"), "--temperature", "0.5", "--max_new_tokens", "7", "--seed", "100"]
    rows, printed = generate(prompts(*WORDS), *keys)
    assert "12 of 12 prompts have an answer" in printed
    demonstrations = read(tmp_path / "demonstrations.jsonl")
    assert [each.prompt[-1]["content"] for each in demonstrations] == WORDS
    assert [each.answer["content"] for each in demonstrations] == [word.upper() for word in WORDS]
    assert len(rows) == 12
    [request] = [each for each in endpoint.requests if each["messages"][-1]["content"] == "word 3"]
    assert request["path"] == "/v1/chat/completions" and request["key"] == "Bearer none"
    assert request["messages"][0] == {"role": "system", "content": "Be kind."}
    sent = {name: request[name] for name in ("model", "temperature", "max_completion_tokens", "seed")}
    assert sent == {"model": "strong", "temperature": 0.5, "max_completion_tokens": 7, "seed": 103}


def test_a_critic_makes_a_better_answer_chosen_and_the_first_one_rejected(generate, endpoint, tmp_path):
    (tmp_path / "critic.txt").write_text("Say what is wrong with it, and write a better one.")
    critic = ["--critic", str(tmp_path / "critic.txt")]
    generate(prompts("one"), *critic)
    [pair] = read(tmp_path / "demonstrations.jsonl")
    assert (pair.answer["content"], pair.rejected["content"]) == ("ONE!", "ONE")
    (tmp_path / "demonstrations.jsonl.answers").unlink()
    endpoint.requests.clear()
    generate([{"prompt": "one", "completion": "uno"}], *critic, "--edit")
    [pair] = read(tmp_path / "demonstrations.jsonl")
    assert (pair.answer["content"], pair.rejected["content"]) == ("uno!", "uno")
    [request] = endpoint.requests
    assert [message["role"] for message in request["messages"]] == ["user", "assistant", "user"]


def test_a_failed_request_is_tried_again_and_the_prompts_without_an_answer_are_counted(generate, endpoint):
    endpoint.script.status = {"busy": [503, 429], "down": [500] * 3, "bad": [400]}
    rows, printed = generate(prompts("busy", "down", "bad", "long", "silent", "word"))
    assert [row["completion"][0]["content"] for row in rows] == ["BUSY", "WORD"]
    assert asked(endpoint) == {"busy": 3, "down": 3, "bad": 1, "long": 1, "silent": 1, "word": 1}
    for reason in ("1 refused with status 500", "1 refused with status 400", "1 cut at max_new_tokens", "1 empty"):
        assert reason in printed
    endpoint.requests.clear()
    rows, printed = generate(prompts("busy", "down", "bad", "long", "silent", "word"))
    assert [row["completion"][0]["content"] for row in rows] == ["BUSY", "DOWN", "BAD", "WORD"]
    assert asked(endpoint).keys() == {"down", "bad", "long", "silent"}


def test_a_command_that_was_stopped_asks_only_for_the_answers_that_are_missing(generate, endpoint, tmp_path):
    endpoint.script.status = {"word 8": [401]}
    _, printed = generate(prompts(*WORDS), "--concurrency", "1", code=2)
    assert "irlfast: " in printed and "No" in printed and "Traceback" not in printed
    with (tmp_path / "demonstrations.jsonl.answers").open("a") as kept:
        kept.write('\0\0\n{"number": 11, "row": 7}\n{"number": 11, "row": {"pro')  # as faults and a kill leave it
    rows, printed = generate(prompts(*WORDS))
    assert "demonstrations.jsonl.answers: 3 damaged lines are left out" in printed
    assert [row["completion"][0]["content"] for row in rows] == [word.upper() for word in WORDS]
    assert asked(endpoint) == dict.fromkeys(WORDS, 1) | {"word 8": 2}
    _, printed = generate(prompts(*WORDS), "--temperature", "0.5", code=2)
    assert "--temperature: found 0.5, but the answers in" in printed and "are of 1.0" in printed
    lines = (tmp_path / "demonstrations.jsonl.answers").read_bytes().splitlines(keepends=True)
    (tmp_path / "demonstrations.jsonl.answers").write_bytes(b"".join([b"{\n", *lines[1:]]))
    _, printed = generate(prompts(*WORDS), code=2)
    assert "its first line, the settings of its answers, is damaged; expected another output" in printed


def test_wrong_input_gets_one_sentence(generate, tmp_path):
    _, printed = generate(prompts("one"), url="http://127.0.0.1:9/v1", code=2)
    assert "http://127.0.0.1:9/v1: cannot be reached" in printed
    (tmp_path / "critic.txt").write_text("Better.")
    (tmp_path / "demonstrations.jsonl.answers").unlink()
    _, printed = generate(prompts("one"), "--critic", str(tmp_path / "critic.txt"), "--edit", code=2)
    assert "line 1: found no answer to edit" in printed
    with pytest.raises(SystemExit):
        generate(prompts("one"), "--edit")
