"""Requests for answers of a policy: prompts, with settings and seeds of their answers, in shards of a fixed size.

Answer k to a prompt has a seed of its own, which follows from the run's seed, the stage, the prompt's place among the
stage's prompts, and k. So the draw depends neither on the process that makes it, nor on the prompts beside it. The
place counts, not the prompt's text: two rows with the same prompt are to get different answers.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from irlfast.data.store import Example
from irlfast.runs.run import Run

SHARD_SIZE = 64  # answers: a worker claims a shard at a time, and a kill loses those in work
MOST_SHARDS = 512  # per folder; more prompts make larger shards


class Sampling(NamedTuple):
    """The settings that answers are sampled with."""

    temperature: float  # 0 is greedy
    top_p: float  # 1 keeps every token
    top_k: int  # 0 keeps every token
    seed: tuple[int, ...]  # other numbers, other answers: the run's seed, the stage, the round
    logps: bool = False  # whether the sampler says the log-probability of each token, too


GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=(0,))
DRAWN = Sampling(temperature=1.0, top_p=1.0, top_k=0, seed=(0,))


class Request(NamedTuple):
    """Prompts that a policy is to answer, and the folder that keeps the answers."""

    run: Run
    examples: Sequence[Example]
    n: int  # answers to each prompt
    folder: Path
    sampling: Sampling

    def label(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    def longest(self) -> int:
        """Return the tokens that a prompt and its answer may have."""
        return self.run.config.max_prompt_length + self.run.config.max_new_tokens


class Shard(NamedTuple):
    """Prompts that one worker answers."""

    number: int
    prompts: Sequence[Sequence[int]]  # token ids
    seeds: Sequence[int]  # of the first answer to each prompt; answer k has the seed + k
    n: int  # answers to each prompt
    sampling: Sampling
    max_new_tokens: int
    ends: Sequence[int]  # each of these tokens ends an answer


class Drawn(NamedTuple):
    """An answer as a sampler gives it."""

    ids: list[int]
    # Of each token, fp32: the policy's log-probability as the sampler computes it, without temperature, top_p and
    # top_k. Empty where ``Sampling.logps`` does not ask for it.
    logps: list[float]


class Part(NamedTuple):
    """A shard's share of a request."""

    request: Request
    path: Path  # the file that keeps the answers
    chosen: Sequence[int]  # numbers of examples

    def shard(self, number: int) -> Shard:
        run, examples, n, _, sampling = self.request
        prompts = [examples[i].prompt_ids for i in self.chosen]
        seeds = [seed_of(sampling.seed, i) for i in self.chosen]
        return Shard(number, prompts, seeds, n, sampling, run.config.max_new_tokens, run.encoder.ends)


def parts_of(request: Request) -> list[Part]:
    """Cut a request into parts of prompts of similar lengths, longest first.

    The cut depends on the prompts and n alone.
    """
    examples, n = request.examples, request.n
    lengths = np.fromiter((len(example.prompt_ids) for example in examples), np.int64, len(examples))
    by_length = np.argsort(-lengths, kind="stable").data
    size = max(1, max(SHARD_SIZE, len(examples) * n // MOST_SHARDS) // n)
    cuts = [by_length[start : start + size] for start in range(0, len(examples), size)]
    return [Part(request, request.folder / f"{number:05d}.jsonl", cut) for number, cut in enumerate(cuts)]


def seed_of(seed: Sequence[int], place: int) -> int:
    """Return the seed of the first answer to the prompt at a place; those of the others follow it, one by one."""
    digest = hashlib.sha256(f"{[*seed]} {place}".encode()).digest()
    return int.from_bytes(digest[:7], "big")  # 56 bits: positive in any 64-bit integer
