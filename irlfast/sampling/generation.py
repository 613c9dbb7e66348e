"""Sample the policy's own answers to prompts: token ids in, token ids out, in shards that survive a kill.

Every answer has a seed of its own (:mod:`irlfast.sampling.shards`), and the processes of the run share the shards out
as they go (:mod:`irlfast.sampling.work_queue`).
"""

import functools
import math
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irlfast.common import dist, stop
from irlfast.common.artefacts import intact, keep_jsonl
from irlfast.common.files import InputError, read_jsonl, remove
from irlfast.common.messages import Progress, log
from irlfast.common.movement import waiting
from irlfast.common.time_left import CLOCK
from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example, Mapped, TokenIds, cut
from irlfast.models.configs import embedding_rows
from irlfast.models.load import load_model, save_pretrained
from irlfast.models.lora import merge
from irlfast.models.prepare import forget
from irlfast.models.tokenizers import unused_ids
from irlfast.runs.run import Run
from irlfast.sampling import background
from irlfast.sampling.gpus import leads_engine
from irlfast.sampling.shards import Drawn, Part, Request, Sampling, Shard, parts_of
from irlfast.sampling.transformers_sampler import samples_split, transformers_answers
from irlfast.sampling.vllm_sampler import MOST_AT_ONCE, UnsupportedAdapter, generate_vllm
from irlfast.sampling.vllm_servers import Probe, probe_of, server_answers
from irlfast.sampling.work_queue import LocalStore, Queue, WorkerLost, new_queue

Answers = Iterator[tuple[int, list[Drawn]]]  # (number of a shard, its answers, those to one prompt together)
AHEAD: dict[Path, float] = {}  # seconds that the answers in a folder took before they were asked for
PAUSE = 0.1  # seconds between two looks for shards that other workers give back


def sample(
    run: Run, policy: Path | str, examples: Sequence[Example], folder: Path, sampling: Sampling
) -> Sequence[TokenIds]:
    """Sample one answer of ``policy`` to each example's prompt; return the answers' ids in the examples' order.

    An answer ends with an end token, unless ``max_new_tokens`` cut it. Shards that are in ``folder`` and intact are
    kept. The processes share the others out, and each returns all answers.
    """
    return answers_to(policy, Request(run, examples, 1, folder, sampling))


def sample_groups(
    run: Run, policy: Path | str, examples: Sequence[Example], n: int, folder: Path, sampling: Sampling
) -> Sequence[PromptGroup]:
    """Sample ``n`` answers to each example's prompt, and return each prompt with its answers."""
    return groups_of(policy, Request(run, examples, n, folder, sampling))


def groups_of(policy: Path | str, request: Request) -> Sequence[PromptGroup]:
    """Sample what is missing of a request, and return each prompt with its answers."""
    answers = cut(answers_to(policy, request), np.full(len(request.examples), request.n))
    return Mapped(lambda x, own: PromptGroup(x.prompt_ids, tuple(own), row=x.row), request.examples, answers)


def answers_to(policy: Path | str, request: Request) -> Sequence[TokenIds]:
    """Sample what is missing of a request, and return all its answers, those to one prompt together."""
    sample_all(policy, [request])
    sampled = read_samples([part.path for part in parts_of(request)])
    log_doubts(request.label(), sampled, request.run)
    return sampled


def sample_ahead(policy: Path | str, requests: Sequence[Request]) -> None:
    """Sample what is missing of several requests to one policy before they are asked for, by one start of each sampler.

    :func:`begin` counts the time for what asks for them later.
    """
    AHEAD.update(dist.on_main(background.end_work))
    begun = time.perf_counter()
    sample_all(policy, requests)
    seconds = time.perf_counter() - begun
    answers = sum(len(request.examples) * request.n for request in requests) or 1
    for request in requests:
        AHEAD[request.folder] = seconds * len(request.examples) * request.n / answers


def begin(*folders: Path) -> float:
    """Return the time now, less the seconds for which answers in these folders were sampled ahead."""
    return time.perf_counter() - sum(AHEAD.pop(folder, 0.0) for folder in folders)


def sample_all(policy: Path | str, requests: Sequence[Request]) -> None:
    """Sample what is missing of several requests to one policy, by one start of each sampler."""
    parts = [part for request in requests for part in parts_of(request)]
    dist.on_main(background.end_work)
    there = dist.on_main(lambda: [intact(part.path) for part in parts])
    missing = [part for part, is_there in zip(parts, there, strict=True) if not is_there]
    if missing:
        sample_parts(policy, missing)


def sample_parts(policy: Path | str, parts: Sequence[Part]) -> None:
    """Sample the parts of requests, each by the process that claims it.

    Raises:
        InputError: no process leads an engine of vLLM.
        WorkerLost: the engines of all processes are gone.
    """
    run, label = parts[0].request.run, ", ".join(dict.fromkeys(part.request.label() for part in parts))
    forget()
    dist.free_memory()
    queue = new_queue(len(parts))
    samples = is_worker(run.config)
    workers = sum(dist.all_gather_object(samples))
    if not workers:
        raise InputError(
            f"vllm_tensor_parallel_size: found {run.config.vllm_tensor_parallel_size}, but no process has so many GPUs "
            "from its own on; expected at most the GPUs of one machine that all its processes see"
        )
    with stop.held(f"a shard of {label}"):
        if samples:
            for number, answers in with_progress(answers_from(queue, policy, parts, workers), parts, queue, label):
                keep_answers(parts[number], answers)
                queue.finish(number)
        dist.barrier()


def is_worker(config: Config) -> bool:
    """Return whether this process samples. With vLLM, only the first one of each group of GPUs does.

    The first process of the run asks all servers.
    """
    if config.vllm_server:
        return dist.is_main()
    return not config.use_vllm or leads_engine(config.vllm_tensor_parallel_size)


def answer_in_background(policy: Path | str, requests: Sequence[Request]) -> None:
    """Have vLLM answer what is missing of requests to one policy in a thread of the main process, while it trains.

    Every process calls this. Nothing happens while an earlier thread is at work. :func:`sample_all` waits for it.
    """
    if not dist.is_main() or background.AT_WORK:
        return
    parts = [part for request in requests for part in parts_of(request) if not intact(part.path)]
    if parts:
        config, probe = parts[0].request.run.config, None
        if config.vllm_server:
            probe = probe_of(parts[0].shard(0).prompts, policy, config)
            probe.own_logps()
        background.begin_work(requests[0].folder, functools.partial(answer_beside, policy, parts, probe))


def answer_beside(policy: Path | str, parts: Sequence[Part], probe: Probe | None) -> int:
    """Have vLLM answer parts of requests, and keep the answers. Return their number."""
    queue, kept = Queue(LocalStore(), "background", len(parts)), 0
    longest, at_once = max(part.request.longest() for part in parts), min(sum(map(answer_count, parts)), MOST_AT_ONCE)
    answers_of = vllm_of(parts[0].request.run, policy, claim_of(queue, parts), longest, at_once, probe)
    for number, answers in answers_of(policy):
        keep_answers(parts[number], answers)
        queue.finish(number)
        kept += len(answers)
    return kept


def claim_of(queue: Queue, parts: Sequence[Part]) -> Callable[[], Shard | None]:
    """Return a function that claims the next part, until the process is asked to stop."""

    def claim() -> Shard | None:
        number = None if stop.asked() else queue.claim()
        return None if number is None else parts[number].shard(number)

    return claim


def answers_from(queue: Queue, policy: Path | str, parts: Sequence[Part], workers: int) -> Answers:
    """Yield this process's share of the answers, until all are there or it was asked to stop."""
    run, claim = parts[0].request.run, claim_of(queue, parts)
    generate = functools.partial(transformers_answers, run, policy, claim)
    if samples_split(run.config):
        yield from generate()
        return
    if run.config.use_vllm:
        share = math.ceil(sum(map(answer_count, parts)) / workers)
        longest = max(part.request.longest() for part in parts)
        generate = functools.partial(vllm_answers, run, policy, claim, queue, longest, min(share, MOST_AT_ONCE))
    while not stop.asked() and queue.finished() < queue.size:
        if not queue.has_more():
            with waiting():
                time.sleep(PAUSE)
            continue
        try:
            yield from generate()
        except WorkerLost as error:
            queue.give_back()
            if queue.leave() == workers:
                raise
            log(f"process {dist.rank()}: {error}; the other processes answer its prompts")
            return


def answer_count(part: Part) -> int:
    return len(part.chosen) * part.request.n


def keep_answers(part: Part, answers: Sequence[Drawn]) -> None:
    """Keep the answers to a part's prompts in its file: a row for each answer, with its number in the request.

    The sampler's log-probabilities have 9 digits, which are all of a float32.
    """
    run, examples, n, *_ = part.request
    texts = run.encoder.tokenizer.batch_decode([drawn.ids for drawn in answers], skip_special_tokens=True)
    numbers = [(i, i * n + k) for i in part.chosen for k in range(n)]
    rows = [
        {"index": number, "prompt": prompt_of(run, examples[i]), "answer": text, "answer_ids": ids}
        | ({"logps": [float(f"{logp:.9g}") for logp in logps]} if logps else {})
        for (i, number), (ids, logps), text in zip(numbers, answers, texts, strict=True)
    ]
    keep_jsonl(part.path, rows)


def log_doubts(label: str, answers: Sequence[TokenIds], run: Run) -> None:
    """Warn if little can be learned from the answers."""
    if answers and not any(answer[-1] in run.encoder.ends for answer in answers):
        log(f"warning: {label}: no answer ended within max_new_tokens ({run.config.max_new_tokens:,})")
    if answers and all(len(answer) == 1 for answer in answers):
        log(f"warning: {label}: every answer is a single token")


def prompt_of(run: Run, example: Example) -> str:
    """Return a prompt's text as the model reads it: in the template, and cut to ``max_prompt_length``."""
    return run.encoder.tokenizer.decode(example.prompt_ids.tolist())


def read_samples(shards: Sequence[Path]) -> Sequence[TokenIds]:
    """Read the sampled answers' ids, in the order of the prompts. They are views of one array."""
    ids, lengths, order = read_lists(shards, "answer_ids", "i")
    return Mapped(cut(memoryview(ids), lengths).__getitem__, order)


def read_lists(shards: Sequence[Path], field: str, kind: str) -> tuple[array, np.ndarray, np.ndarray]:
    """Read a list of numbers of each row of the shards; a row without one has an empty list.

    Return all the lists in one array of the ``kind``, their lengths, and the lists' numbers in the order of the rows'
    ``index``.
    """
    values, lengths, numbers = array(kind), array("i"), array("i")
    for path in shards:
        for _, row in read_jsonl(path):
            own = row.get(field, [])
            values.fromlist(own)
            lengths.append(len(own))
            numbers.append(row["index"])
    return values, np.array(lengths), np.argsort(numbers).astype(np.int32)


def sampler_logps(request: Request) -> Sequence[Tensor]:
    """Return the sampler's log-probability of each token of a request's answers, fp32, in the order of its answers.

    The answers are there. Nothing is returned where their sampler was not asked for it.
    """
    logps, lengths, order = read_lists([part.path for part in parts_of(request)], "logps", "f")
    if not lengths.all():
        return []
    return Mapped(cut(torch.from_numpy(np.asarray(logps)), lengths).__getitem__, order)


def with_progress(results: Answers, parts: Sequence[Part], queue: Queue, label: str) -> Answers:
    """Pass this process's results on. Show how many answers all processes have sampled, and its tokens per second."""
    begun, tokens, shown = time.perf_counter(), 0, 0
    total = sum(map(answer_count, parts))
    with Progress(label, total, "answer", seconds=10.0) as progress:
        for number, answers in results:
            yield number, answers
            tokens += sum(len(drawn.ids) for drawn in answers)
            done = round(total * queue.finished() / len(parts))
            progress.advance(done - shown)
            CLOCK.answer(done - shown)
            shown = done
            progress.show(f"{tokens / (time.perf_counter() - begun):,.0f} tokens/s")


def vllm_answers(
    run: Run,
    policy: Path | str,
    claim: Callable[[], Shard | None],
    queue: Queue,
    longest: int,
    at_once: int,
) -> Answers:
    """Yield answers by vLLM, or by servers. An adapter that vLLM does not support is merged into its base first.

    ``longest`` is the length of the longest prompt with its answer; ``at_once`` as for :func:`generate_vllm`.
    """
    answers_of = vllm_of(run, policy, claim, longest, at_once)
    try:
        yield from answers_of(policy)
    except UnsupportedAdapter:
        queue.give_back()
        merged = run.output / f"merged-{dist.rank()}.tmp"
        model: Any = merge(load_model(policy, run.config), str(policy))
        save_pretrained(merged, model, run.encoder.tokenizer)
        del model
        yield from answers_of(merged)
        remove(merged)


def vllm_of(
    run: Run,
    policy: Path | str,
    claim: Callable[[], Shard | None],
    longest: int,
    at_once: int,
    probe: Probe | None = None,
) -> Callable[[Path | str], Answers]:
    """Return the function by which vLLM, or servers of it, answer for ``policy`` or for the same one merged.

    The servers are compared with the policy by ``probe`` (default: by one of the first prompts that are claimed).
    """
    config = run.config
    never = unused_ids(run.encoder.tokenizer, embedding_rows(config, policy))
    if config.vllm_server:
        return functools.partial(server_answers, claim=claim, run=run, never=never, probe=probe)
    return functools.partial(
        generate_vllm,
        claim=claim,
        python=config.vllm_python,
        dtype=config.dtype,
        max_model_len=longest,
        never=never,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        at_once=at_once,
    )
