"""The talk with one vLLM server (``vllm serve``): have it load a policy, and have it answer, token ids in and out.

A server gets a policy by a path that it shares with the run: it reloads its weights from the folder, or loads the
adapter. The policy's *version* is a hash of its files. A server is given the version once its weights are there, and
names it with every answer. A server that has restarted, or that another run has loaded other weights into, names
another version, and its answers do not count.

docs/scaling.md shows how servers are started. The requests are those of vLLM 0.32.
"""

import asyncio
import dataclasses
import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from irlfast.common.artefacts import checksums, notes
from irlfast.common.endpoint import client_options
from irlfast.common.files import InputError, find_path, remove
from irlfast.common.messages import first_sentence, log
from irlfast.models.lora import base_and_adapter
from irlfast.sampling.shards import Drawn, Shard
from irlfast.sampling.vllm_sampler import REFUSALS, UnsupportedAdapter, settings_of

CONNECT = 10.0  # seconds that a connection may take
HEARTBEAT = 20.0  # seconds between looks at a server that is answering: a machine that is gone closes no connection
FRESH, LOADING = "default", "loading"  # versions: of a server that has just started, and while it loads a policy
TOLERANCE = {"float32": 0.001, "bfloat16": 0.1}  # nats: the mean difference of a token's log-probabilities, at most
DEVELOPMENT = "expected vLLM 0.32 or later, started with VLLM_SERVER_DEV_MODE=1"
RUNTIME_LORA = "expected it started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


class ServerFailed(Exception):
    """Raised when a server does not answer as it should, so that the others take its prompts. The message is why."""


class Refusal(ServerFailed):
    """Raised when a server says that it could not do what it was asked."""


class Policy(NamedTuple):
    """A policy that the servers are to serve."""

    base: Path  # the folder of a model
    version: str  # of the model: follows from its files
    adapter: Path | None  # the folder of a LoRA on the model
    name: str | None  # of the adapter on the servers: follows from its files
    probe: Sequence[int]  # token ids of a text
    own_logps: Callable[[], Sequence[float]]  # the policy's log-probabilities of all ids of the probe but the first
    tolerance: float


@dataclasses.dataclass
class Server:
    """A server, and what became of it."""

    url: str
    client: Any  # openai.AsyncOpenAI
    taking: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)  # held while it takes the policy
    loading: asyncio.Task | None = None  # its last load of weights, which it cannot call off
    ready: bool = False  # whether it has the policy
    failure: str = ""  # why it failed; empty for one that answers
    failed_at: float = 0.0


def connect(url: str, timeout: float) -> Server:
    """Return a server that is asked with OpenAI's client; an answer may take ``timeout`` seconds, or any time if 0.

    Raises:
        InputError: the address or the key cannot be used, or the client is not installed.
    """
    options = client_options("vllm_server", url)
    try:
        import openai
    except ImportError as error:
        raise InputError("vllm_server: found no package openai; expected pip install 'irlfast[generate]'") from error
    root = options["base_url"].rstrip("/").removesuffix("/v1")
    return Server(root, openai.AsyncOpenAI(**options, timeout=openai.Timeout(timeout or None, connect=CONNECT)))


async def check_server(server: Server, longest: int, adapters: bool) -> None:
    """Check that a server has what a run needs. ``longest`` is a prompt with its answer, in tokens.

    Raises:
        InputError: it has not; the message says how to start it.
        ServerFailed: it cannot be reached.
    """
    await ask(server, "get", "/weight_info")
    [model, *_] = (await ask(server, "get", "/v1/models"))["data"]
    if model["max_model_len"] < longest:
        raise InputError(
            f"vllm_server {server.url}: takes {model['max_model_len']:,} tokens, but a prompt with its answer can have "
            f"{longest:,}; expected --max-model-len {longest} or more"
        )
    await ask(server, "post", "/inference/v1/generate", {"token_ids": [0], "sampling_params": {"max_tokens": 1}})
    if adapters:
        try:
            await ask(server, "post", "/v1/unload_lora_adapter", {"lora_name": "irlfast"}, RUNTIME_LORA)
        except Refusal:
            return  # it has the path, and no such adapter


# ---------------------------------------------------------------- the policy


def served_policy(
    policy: Path | str, probe: Sequence[int], own_logps: Callable[[], Sequence[float]], dtype: str
) -> Policy:
    """Return what servers need to know of a policy.

    Raises:
        InputError: it is no folder, which servers could read, too.
    """
    base, adapter = base_and_adapter(policy)
    folder = find_path(base)
    if not folder:
        raise InputError(f"vllm_server: found policy {base}, expected a folder that the servers can read, too")
    if not adapter:
        return Policy(folder.resolve(), version_of(folder), None, None, probe, own_logps, TOLERANCE[dtype])
    adapter = adapter.resolve()
    name = f"irlfast-{version_of(adapter)}"
    return Policy(folder.resolve(), version_of(folder), adapter, name, probe, own_logps, TOLERANCE[dtype])


def version_of(folder: Path) -> str:
    """Return a hash of a folder's names and contents. The run has noted the checksums of a folder that it wrote."""
    sums = notes(folder.parent).get(folder.name) or checksums(folder)
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


async def take_policy(server: Server, policy: Policy, output: Path) -> None:
    """Have a server load the policy, unless it serves it already.

    Raises:
        InputError: it cannot, or its log-probabilities are not the policy's.
        UnsupportedAdapter: it refuses the adapter.
    """
    if server.ready:
        return
    version = (await ask(server, "get", "/weight_info"))["weight_version"]
    models = await ask(server, "get", "/v1/models")
    if version != policy.version or policy.name not in (None, *(each["id"] for each in models["data"])):
        if version != policy.version:
            await load_weights(server, policy, output)
        if policy.adapter:
            await load_adapter(server, policy)
        await compare(server, policy)
        await set_version(server, policy.version)
    if server.failure:
        log(f"vllm_server {server.url} is back")
    server.ready, server.failure = True, ""


async def load_weights(server: Server, policy: Policy, output: Path) -> None:
    """Have a server reload its weights from the policy's folder.

    The path is a link that has just been made in the run's folder: a server that sees another file system finds none.
    The link stays until the server has loaded: vLLM without half of its weights dies of the next request.
    """
    await set_version(server, LOADING)
    link = output / f"served-{secrets.token_hex(8)}.tmp"
    link.symlink_to(policy.base)
    try:
        arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(link.absolute())}}
        server.loading = asyncio.create_task(ask(server, "post", "/collective_rpc", arguments))
        await loaded(server, server.loading)
    except Refusal as error:
        raise InputError(f"vllm_server {server.url}: cannot load {policy.base}: it {error}") from error
    finally:
        remove(link)


async def loaded(server: Server, loading: asyncio.Task) -> None:
    """Wait until a server has loaded its weights or is gone. If this task is cancelled, it ends when that has happened.

    Raises:
        ServerFailed: it is gone.
        Refusal: it could not load them.
    """
    cancelled = False
    while not loading.done():
        try:
            await asyncio.wait([loading], timeout=HEARTBEAT)
            if not loading.done():
                await ask(server, "get", "/health", timeout=HEARTBEAT)
        except asyncio.CancelledError:
            cancelled = True
        except ServerFailed:
            loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)  # or asyncio complains of an error that nobody has read
    if cancelled:
        raise asyncio.CancelledError
    if loading.cancelled():
        raise ServerFailed("cannot be reached")
    loading.result()


async def load_adapter(server: Server, policy: Policy) -> None:
    arguments = {"lora_name": policy.name, "lora_path": str(policy.adapter), "load_inplace": True}
    try:
        await ask(server, "post", "/v1/load_lora_adapter", arguments, RUNTIME_LORA)
    except Refusal as error:
        if any(refusal in str(error) for refusal in REFUSALS):
            raise UnsupportedAdapter from error
        raise InputError(f"vllm_server {server.url}: cannot load {policy.adapter}: it {error}") from error


async def compare(server: Server, policy: Policy) -> None:
    """Compare a server's log-probabilities of the probe with the policy's own.

    Raises:
        InputError: their mean difference is larger than rounding explains.
    """
    settings = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
    reply = await generate(server, policy, policy.probe, settings)
    pairs = zip(policy.probe[1:], reply["prompt_logprobs"][1:], policy.own_logps(), strict=True)
    differences = [abs(served[str(token)]["logprob"] - own) for token, served, own in pairs]
    mean = sum(differences) / len(differences)
    if not mean <= policy.tolerance:
        raise InputError(
            f"vllm_server {server.url}: serves other weights than those of {policy.adapter or policy.base}: the "
            f"log-probabilities of {len(differences)} tokens differ by {mean:.3g} nats on average, expected "
            f"{policy.tolerance:g} at most"
        )


async def set_version(server: Server, version: str) -> None:
    await ask(server, "post", "/update_weight_version", {"new_version": version})


# ---------------------------------------------------------------- answers


async def answer(server: Server, policy: Policy, shard: Shard, bias: dict[int, float]) -> list[Drawn]:
    """Return the server's answers to a shard's prompts, those to one prompt together."""
    settings = settings_of(shard) | {"logit_bias": bias or None}
    asked = zip(shard.prompts, shard.seeds, strict=True)
    tasks = [asyncio.create_task(answers_to(server, policy, ids, settings | {"seed": seed})) for ids, seed in asked]
    try:
        waiting: set[asyncio.Task] = {*tasks}
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=HEARTBEAT, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            if waiting:
                await ask(server, "get", "/health", timeout=HEARTBEAT)
        return [drawn for task in tasks for drawn in task.result()]
    finally:
        await cancel(tasks)


async def answers_to(server: Server, policy: Policy, prompt: Sequence[int], sampling: dict[str, Any]) -> list[Drawn]:
    """Return the server's answers to one prompt.

    Raises:
        ServerFailed: they are not the policy's, because the server has restarted.
        InputError: they are another policy's, or no end token ends one although it is shorter than ``max_new_tokens``.
    """
    choices = (await generate(server, policy, prompt, sampling))["choices"]
    versions = {span["version"] for choice in choices for span in choice["weight_versions"]}
    if versions & {FRESH, LOADING}:
        raise ServerFailed("has restarted, without the policy")
    if versions != {policy.version}:
        raise InputError(f"vllm_server {server.url}: another run loads its policies into it; expected a server per run")
    answers = [
        Drawn(choice["token_ids"], [each["logprob"] for each in (choice.get("logprobs") or {}).get("content", ())])
        for choice in sorted(choices, key=lambda choice: choice["index"])
    ]
    for ids, _ in answers:
        if ids[-1] not in sampling["stop_token_ids"] and len(ids) < sampling["max_tokens"]:
            raise InputError(
                f"vllm_server {server.url}: cut an answer to a prompt of {len(prompt):,} tokens after {len(ids):,} "
                f"tokens, expected up to max_new_tokens ({sampling['max_tokens']:,}); give it a larger --max-model-len"
            )
    return answers


async def generate(server: Server, policy: Policy, prompt: Sequence[int], sampling: dict[str, Any]) -> Any:
    """Have a server answer token ids. The salt keeps it from using cached states of other weights."""
    body = {"token_ids": [*prompt], "sampling_params": sampling, "cache_salt": policy.version}
    if policy.name:
        body["model"] = policy.name
    return await ask(server, "post", "/inference/v1/generate", body)


async def ask(
    server: Server,
    method: str,
    path: str,
    body: Any = None,
    missing: str = DEVELOPMENT,
    timeout: float | None = None,
) -> Any:
    """Return a server's reply to a request. OpenAI's client tries a failed request twice more.

    Raises:
        ServerFailed: it fails or cannot be reached.
        InputError: it refuses the request, or has no such ``path``; the message then says what is ``missing``.
    """
    import openai

    client = server.client.with_options(timeout=timeout) if timeout else server.client
    options = {"body": body} if body is not None else {}
    try:
        return await getattr(client, method)(server.url.rstrip("/") + path, cast_to=object, **options)
    except openai.APITimeoutError as error:
        raise ServerFailed("took too long to answer") from error
    except openai.APIConnectionError as error:
        raise ServerFailed("cannot be reached") from error
    except openai.APIStatusError as error:
        why = reason(error)
        if error.status_code == 404 and "The model" in why:
            raise ServerFailed("has restarted, without the adapter") from error
        if error.status_code == 404 and not why:
            raise InputError(f"vllm_server {server.url}: has no {path}; {missing}") from error
        if error.status_code in (404, 500):
            raise Refusal(f"says: {why}") from error
        if error.status_code in (408, 409, 429) or error.status_code > 500:
            raise ServerFailed(f"answers with status {error.status_code}") from error
        raise InputError(f"vllm_server {server.url}: refused {path}: {why or first_sentence(error)}") from error


def reason(error: Any) -> str:
    """Return the message of vLLM's error, on one line; empty for an error that is not vLLM's, as of a missing path."""
    body = error.body if isinstance(error.body, dict) else {}
    return " ".join(str(body.get("message") or "").split())


async def cancel(tasks: Sequence[asyncio.Task]) -> None:
    """Cancel the tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
