"""Sample the policy's own answers to prompts: token ids in, token ids out, in shards that survive a kill.

The answers of a shard depend only on its prompts and its seed, not on the process that samples them or on other shards.
"""

import functools
import itertools
import math
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from irlfast.common import dist
from irlfast.common.files import read_json, read_jsonl, remove, write, write_json, write_jsonl
from irlfast.common.messages import Progress
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example, TokenIds
from irlfast.models.configs import embedding_rows
from irlfast.models.load import load_model, save_pretrained
from irlfast.models.lora import merge
from irlfast.models.tokenizers import unused_ids
from irlfast.runs.run import Run
from irlfast.sampling.vllm_sampler import Shard, UnsupportedAdapter, generate_vllm

SHARD_SIZE = 1024  # prompts at most: no sampler has larger batches, and a kill loses little


class Sampling(NamedTuple):
    """The settings that answers are sampled with."""

    temperature: float  # 0 is greedy
    top_p: float  # 1 keeps every token
    top_k: int  # 0 keeps every token
    seed: int  # of the first shard; each later shard adds its number


GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)
DRAWN = Sampling(temperature=1.0, top_p=1.0, top_k=0, seed=0)


def sample(run: Run, policy: Path | str, examples: list[Example], folder: Path, sampling: Sampling) -> list[TokenIds]:
    """Sample one answer of ``policy`` to each example's prompt; return the answers' ids in the examples' order.

    An answer ends with an end token, unless ``max_new_tokens`` cut it. Shards that are in ``folder`` already are kept.
    Each process samples its share of the shards, and returns all answers.
    """
    by_length = sorted(range(len(examples)), key=lambda i: (-len(examples[i].prompt_ids), i))
    size = shard_size(folder, len(examples), run.config.use_vllm)
    cuts = [by_length[start : start + size] for start in range(0, len(examples), size)]
    paths = [folder / f"{number:05d}.jsonl" for number in range(len(cuts))]
    mine = [
        Shard(number, [examples[i].prompt_ids for i in cut], sampling.seed + number)
        for number, cut in enumerate(cuts)
        if number % dist.world_size() == dist.rank() and not paths[number].exists()
    ]
    dist.free_memory()
    if mine:
        generate = vllm_answers if run.config.use_vllm else transformers_answers
        for number, answers in with_progress(generate(run, policy, mine, sampling), mine, folder):
            texts = run.encoder.tokenizer.batch_decode(answers, skip_special_tokens=True)
            rows = [
                {"index": i, "prompt": prompt_of(run, examples[i]), "answer": text, "answer_ids": ids}
                for i, ids, text in zip(cuts[number], answers, texts, strict=True)
            ]
            write_jsonl(paths[number], rows)
    dist.barrier()
    return read_samples(folder)


def shard_size(folder: Path, count: int, use_vllm: bool) -> int:
    """Return the number of prompts per shard.

    With vLLM every process gets the same number of shards, and a folder with some samples keeps the size that it began
    with. With Transformers the size is fixed, so that the answers do not depend on the number of processes.
    """
    if not use_vllm:
        return SHARD_SIZE
    path, processes = folder / "shards.json", dist.world_size()
    if dist.is_main() and not path.exists():
        rounds = math.ceil(count / (SHARD_SIZE * processes))
        write_json(path, {"prompts": math.ceil(count / (rounds * processes)) if processes > 1 else SHARD_SIZE})
    dist.barrier()
    return read_json(path)["prompts"]


def sample_groups(
    run: Run, policy: Path | str, examples: list[Example], n: int, folder: Path, sampling: Sampling
) -> list[PromptGroup]:
    """Sample ``n`` answers to each example's prompt, and return each prompt with its answers."""
    answers = iter(sample(run, policy, [example for example in examples for _ in range(n)], folder, sampling))
    return [
        PromptGroup(example.prompt_ids, tuple(itertools.islice(answers, n)), row=example.row) for example in examples
    ]


def prompt_of(run: Run, example: Example) -> str:
    """Return a prompt's text as the model reads it: in the template, and cut to ``max_prompt_length``."""
    return run.encoder.tokenizer.decode(example.prompt_ids.tolist())


def read_samples(folder: Path) -> list[TokenIds]:
    """Read the sampled answers' ids, in the order of the prompts."""
    rows = (row for path in sorted(folder.glob("*.jsonl")) for _, row in read_jsonl(path))
    answers = {row["index"]: array("i", row["answer_ids"]) for row in rows}
    return [answers[i] for i in range(len(answers))]


def with_progress(
    results: Iterator[tuple[int, list[list[int]]]], shards: list[Shard], folder: Path
) -> Iterator[tuple[int, list[list[int]]]]:
    """Pass the results on, and show how many prompts are answered and the tokens per second."""
    begun, tokens = time.perf_counter(), 0
    sizes = {shard.number: len(shard.prompts) for shard in shards}
    label = f"{folder.parent.name}/{folder.name}"
    with Progress(label, sum(sizes.values()), "prompt", seconds=10.0) as progress:
        for number, answers in results:
            yield number, answers
            tokens += sum(map(len, answers))
            progress.advance(sizes[number])
            progress.show(f"{tokens / (time.perf_counter() - begun):,.0f} tokens/s")


def vllm_answers(
    run: Run, policy: Path | str, shards: list[Shard], sampling: Sampling
) -> Iterator[tuple[int, list[list[int]]]]:
    """Yield (shard number, answers) by vLLM. An adapter that vLLM does not support is merged into its base first."""
    config = run.config
    answers_of = functools.partial(
        generate_vllm,
        shards=shards,
        python=config.vllm_python,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=config.max_new_tokens,
        ends=run.encoder.ends,
        never=unused_ids(run.encoder.tokenizer, embedding_rows(config, policy)),
        dtype=config.dtype,
        max_model_len=config.max_prompt_length + config.max_new_tokens,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
    )
    try:
        yield from answers_of(policy)
    except UnsupportedAdapter:
        merged = run.output / f"merged-{dist.rank()}"
        model = merge(load_model(policy, config), str(policy))
        write(merged, lambda temporary: save_pretrained(temporary, model, run.encoder.tokenizer))
        del model
        yield from answers_of(merged)
        remove(merged)


@torch.no_grad()
def transformers_answers(
    run: Run, policy: Path | str, shards: list[Shard], sampling: Sampling
) -> Iterator[tuple[int, list[list[int]]]]:
    """Yield (shard number, answers) by Transformers' ``generate``."""
    config = run.config
    model = load_model(policy, config).to(dist.device()).eval()
    never = unused_ids(run.encoder.tokenizer, model.get_output_embeddings().weight.shape[0])
    for shard in shards:
        torch.manual_seed(shard.seed)
        answers: list[list[int]] = []
        for start in range(0, len(shard.prompts), config.per_device_eval_batch_size):
            prompts = shard.prompts[start : start + config.per_device_eval_batch_size]
            answers += generate_batch(model, prompts, run.encoder.ends, sampling, config.max_new_tokens, never)
        yield shard.number, answers


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    never: Sequence[int] = (),
) -> list[list[int]]:
    """Generate an answer to each prompt, up to its first token in ``ends``; ids in ``never`` are not drawn."""
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    ids = torch.tensor([[*[ends[0]] * (longest - len(prompt)), *prompt] for prompt in prompts])  # left-padded
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    greedy = sampling.temperature == 0
    draw = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    model.generation_config = GenerationConfig()  # the checkpoint's defaults (top_k 50, penalties) would bias samples
    generated = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
            suppress_tokens=list(never) or None,
            **draw,
        ),
    )
    return [cut_at(answer, ends) for answer in generated[:, longest:].tolist()]


def cut_at(answer: list[int], ends: Sequence[int]) -> list[int]:
    """Return the answer up to and with its first end token. Only padding follows that token."""
    first = next((i for i, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: first + 1]
