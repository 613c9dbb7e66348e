"""Sample by running vLLM servers, on this machine or on others. The servers share the shards out as they go.

The first process of a run asks all servers; :mod:`irlfast.sampling.vllm_server` is the talk with one of them. The
shards of a server that fails are answered by the others, and the server is asked again from time to time.
"""

import asyncio
import dataclasses
import functools
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from irlfast.common.files import InputError
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.models.configs import load_model_config
from irlfast.models.load import load_model
from irlfast.runs.run import Run
from irlfast.sampling.shards import Drawn, Shard
from irlfast.sampling.vllm_server import (
    CONNECT,
    Policy,
    Server,
    ServerFailed,
    answer,
    cancel,
    check_server,
    connect,
    served_policy,
    take_policy,
)

PAUSE = 2.0  # seconds before a server that failed is asked again
PATIENCE = 60.0  # seconds without any server that answers, before the run ends
POLL = 0.1  # seconds between two looks for a shard
PROBED = 256  # most tokens of the text by which a server's log-probabilities are compared with the policy's own
NEVER = -1e9  # added to the logits of ids that are not drawn; JSON has no infinity


@dataclasses.dataclass
class Work:
    """The shards of one call, and where they are."""

    claim: Callable[[], Shard | None]
    returned: list[Shard]  # those of servers that failed
    in_work: int = 0  # shards that servers are answering
    done: asyncio.Queue = dataclasses.field(default_factory=asyncio.Queue)  # results, an error, or None: all are done

    def next_shard(self) -> Shard | None:
        shard = self.returned.pop() if self.returned else self.claim()
        self.in_work += shard is not None
        return shard


class Probe(NamedTuple):
    """A text by which a server's log-probabilities are compared with the policy's own."""

    ids: Sequence[int]
    own_logps: Callable[[], Sequence[float]]  # of all ids but the first; loads the policy when it is called first


def probe_of(prompts: Sequence[Sequence[int]], policy: Path | str, config: Config) -> Probe:
    """Return the longest of some prompts as a probe of a policy."""
    longest = max(prompts, key=len)
    ids = [*longest][:PROBED] if len(longest) > 1 else [*longest] * 2
    return Probe(ids, functools.cache(functools.partial(text_logps, policy, config, tuple(ids))))


def server_answers(
    policy: Path | str,
    claim: Callable[[], Shard | None],
    *,
    run: Run,
    never: Sequence[int] = (),
    probe: Probe | None = None,
) -> Iterator[tuple[int, list[Drawn]]]:
    """Yield (shard number, its answers, those to one prompt together) as shards are done.

    The answers follow the rules of :func:`irlfast.sampling.vllm_sampler.generate_vllm`, and have the same seeds.
    ``claim`` returns the next shard, or None if there is none now. The ``probe`` is a prompt by default.

    Raises:
        InputError: the policy is no folder, or no server answers, or a server cannot load the policy, computes other
            log-probabilities than Transformers does, or is used by another run.
        UnsupportedAdapter: ``policy`` is an adapter that a server refuses.
    """
    first = claim()
    if first is None:
        return
    probe = probe or probe_of(first.prompts, policy, run.config)
    served = served_policy(policy, probe.ids, probe.own_logps, run.config.dtype)
    servers = [connect(url, run.config.stall_timeout) for url in run.config.vllm_server]
    room = max(1, run.config.vllm_server_requests // (len(first.prompts) * first.n))
    loop = asyncio.new_event_loop()
    results = answer_all(servers, served, Work(claim, [first]), room, dict.fromkeys(never, NEVER), run.output)
    try:
        while True:
            try:
                result = loop.run_until_complete(anext(results))
            except StopAsyncIteration:
                return
            yield result
    finally:
        loop.run_until_complete(leave(servers))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def leave(servers: Sequence[Server]) -> None:
    """End what still runs in the loop but loads of weights, also after an interruption, and close the connections."""
    kept = {asyncio.current_task(), *(server.loading for server in servers)}
    await cancel([*asyncio.all_tasks() - kept])
    for server in servers:
        await server.client.close()


@torch.no_grad()
def text_logps(policy: Path | str, config: Config, ids: tuple[int, ...]) -> list[float]:
    """Return a policy's log-probabilities of a text's tokens, without the first one, by Transformers on the CPU."""
    model = load_model(policy, dataclasses.replace(config, attn_implementation="auto"))  # others may need a GPU
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


async def answer_all(
    servers: Sequence[Server], policy: Policy, work: Work, room: int, bias: dict[int, float], output: Path
) -> AsyncGenerator[tuple[int, list[Drawn]], None]:
    """Yield (shard number, answers) as shards are done. A server has ``room`` shards in work at a time."""
    tasks = [
        asyncio.create_task(serve(server, servers, policy, work, bias, output))
        for _ in range(room)
        for server in servers
    ]
    try:
        while (result := await work.done.get()) is not None:
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        await cancel(tasks)


async def serve(
    server: Server, servers: Sequence[Server], policy: Policy, work: Work, bias: dict[int, float], output: Path
) -> None:
    """Have one server answer shards, one after the other, until this task is cancelled.

    A server that fails gives its shard back, and is asked again later. Any other error ends the work.
    """
    while True:
        try:
            async with server.taking:
                await take_policy(server, policy, output)
            shard = work.next_shard()
            if shard is None:
                if not work.in_work:
                    work.done.put_nowait(None)
                await asyncio.sleep(POLL)
                continue
            try:
                answers = await answer(server, policy, shard, bias)
            except Exception:
                work.returned.append(shard)
                raise
            finally:
                work.in_work -= 1
            work.done.put_nowait((shard.number, answers))
        except ServerFailed as error:
            note_failure(server, str(error), alone=len(servers) == 1)
            if all(each.failure for each in servers) and now() - max(each.failed_at for each in servers) > PATIENCE:
                work.done.put_nowait(InputError(no_server(servers)))
            await asyncio.sleep(PAUSE)
        except Exception as error:
            work.done.put_nowait(error)
            return


def now() -> float:
    return asyncio.get_running_loop().time()


def note_failure(server: Server, why: str, alone: bool) -> None:
    if not server.failure:
        server.failed_at = now()
        what = "it is asked again" if alone else "the other servers answer its prompts"
        log(f"warning: vllm_server {server.url} {why}; {what} until it is back")
    server.ready, server.failure = False, why


def no_server(servers: Sequence[Server]) -> str:
    """Return the message for a run without any server that answers."""
    causes = "; ".join(f"{server.url} {server.failure}" for server in servers)
    return f"vllm_server: no server answers ({causes}); the same command resumes once one of them is back"


def check_servers(config: Config, longest: int) -> None:
    """Check at the start that the servers can sample for this run; ``longest`` is a prompt with its answer, in tokens.

    Raises:
        InputError: a server lacks what the run needs, or none can be reached, or vLLM cannot reload the model.
    """
    if load_model_config(config).get_text_config().tie_word_embeddings and not config.use_peft:
        raise InputError(
            "vllm_server: found a model whose output embeddings are its input embeddings, of which vLLM 0.32 reloads "
            "only a part; expected a model with embeddings of their own, use_peft: true, or no vllm_server"
        )
    servers = [connect(url, CONNECT) for url in config.vllm_server]

    async def look() -> None:
        for server in servers:
            try:
                await check_server(server, longest, config.use_peft)
            except ServerFailed as error:
                server.failure = str(error)
            await server.client.close()

    asyncio.run(look())
    if all(server.failure for server in servers):
        raise InputError(no_server(servers))
    for server in servers:
        if server.failure:
            log(f"warning: vllm_server {server.url} {server.failure}; the others sample until it is back")
