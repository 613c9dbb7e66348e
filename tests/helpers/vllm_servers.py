"""vLLM's servers for tests: the real one of the CPU build, and a stand-in that speaks its protocol."""

import os
import signal
import socket
import subprocess
import time
import types
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from irlfast.config import make_config
from irlfast.sampling.shards import GREEDY, Drawn, Sampling, Shard
from irlfast.sampling.vllm_servers import server_answers
from tests.helpers.endpoint import Response, failure
from tests.helpers.shards import claims
from tests.helpers.vllm_cases import VLLM_PYTHON

ENDS = (2,)
VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
}
FLAGS = "--enable-scale-out --dtype float32 --enforce-eager --no-enable-chunked-prefill".split()


class VllmServer:
    """A real server on a port of this machine, whose log is ``log``."""

    def __init__(self, model: Path, log: Path, *flags: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        given = ["--model", str(model), "--host", "127.0.0.1", "--port", self.port, *FLAGS, *flags]
        self.command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", *given]
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            files = {"stdout": log, "stderr": log, "cwd": self.log.parent, "start_new_session": True}
            self.process = subprocess.Popen(self.command, env=os.environ | VARIABLES, **files)

    def wait(self) -> None:
        """Wait until it answers."""
        while not is_up(self.url):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def end(self, how: signal.Signals = signal.SIGKILL) -> None:
        os.killpg(self.process.pid, how)
        self.process.wait(60)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


class StandIn:
    """The replies of a server without a model. An answer is the request's seed, the prompt, and an end."""

    def __init__(self) -> None:
        self.version = "default"
        self.adapters: set[str] = set()
        self.loaded: list[str] = []  # the folders of policies
        self.asked: list[dict] = []  # the requests for answers

    def __call__(self, request: dict) -> Response:
        path = request["path"]
        if path == "/weight_info":
            return Response(200, {"weight_version": self.version})
        if path == "/v1/models":
            return Response(200, {"data": [{"id": name, "max_model_len": 100} for name in ("base", *self.adapters)]})
        if path == "/update_weight_version":
            self.version = request["new_version"]
        if path == "/collective_rpc":
            self.loaded.append(os.path.realpath(request["kwargs"]["weights_path"]))
        if path == "/v1/load_lora_adapter":
            self.loaded.append(request["lora_path"])
            self.adapters.add(request["lora_name"])
        if path == "/v1/unload_lora_adapter":
            return failure(404, "The lora adapter cannot be found.")
        return self.answer(request) if path == "/inference/v1/generate" else Response(200, {})

    def answer(self, request: dict) -> Response:
        settings, prompt = request["sampling_params"], request["token_ids"]
        if request.get("model", "base") not in {"base", *self.adapters}:
            return failure(404, f"The model `{request['model']}` does not exist.")
        logps = [None, *({str(token): {"logprob": -1.0}} for token in prompt[1:])]
        self.asked.append(request)
        seed = settings.get("seed", 0)
        choices = [
            {
                "index": k,
                "token_ids": [seed + k, *prompt, 2],
                "logprobs": {"content": [{"logprob": -0.5}] * (len(prompt) + 2)} if "logprobs" in settings else None,
                "weight_versions": [{"version": self.version, "start": 0, "end": 1}],
            }
            for k in reversed(range(settings.get("n", 1)))
        ]
        return Response(200, {"choices": choices, "prompt_logprobs": logps})


def shards(count: int, n: int = 1, sampling: Sampling = GREEDY, size: int = 2) -> list[Shard]:
    """Shards of prompts that all differ, with seeds that all differ."""
    numbers = [range(size * number, size * (number + 1)) for number in range(count)]
    return [
        Shard(number, [[i, 5] for i in chosen], [1000 * (i + 1) for i in chosen], n, sampling, 20, ENDS)
        for number, chosen in enumerate(numbers)
    ]


def answers(
    policy: Path, urls: list[str], given: list[Shard], output: Path, never: Sequence[int] = (), **keys
) -> dict[int, list[list[int]]]:
    """The servers' answers to all shards, in the order in which they came."""
    done = drawn_by(policy, urls, given, output, never, **keys)
    return {number: [each.ids for each in drawn] for number, drawn in done.items()}


def drawn_by(
    policy: Path, urls: list[str], given: list[Shard], output: Path, never: Sequence[int] = (), **keys
) -> dict[int, list[Drawn]]:
    """The same with log-probabilities."""
    run = types.SimpleNamespace(config=config_of(policy, urls, **keys), output=output)
    return dict(server_answers(policy, claims(*given), run=run, never=never))


def config_of(policy: Path, urls: list[str], **keys):
    servers = {"use_vllm": True, "vllm_server": urls, "vllm_server_requests": 4}
    return make_config(
        {"dataset_name": __file__, "model_name_or_path": str(policy), "dtype": "float32"} | servers | keys
    )
