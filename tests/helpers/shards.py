"""Shards of prompts for tests of samplers. The module is quick to import, for the sake of child processes."""

import functools

from irlfast.sampling.shards import GREEDY, Sampling, Shard

SETTINGS = {"python": None, "dtype": "float32", "max_model_len": 256}
LONGEST = 24  # tokens of an answer


def shard(number: int, *prompts: list[int], seed: int = 0, n: int = 1, how: Sampling = GREEDY, **more) -> Shard:
    """A shard whose prompts have the seeds from ``seed`` on, ``n`` apart."""
    seeds = [seed + n * place for place in range(len(prompts))]
    return Shard(number, prompts, seeds, n, how, **{"max_new_tokens": LONGEST, "ends": [2]} | more)


def claims(*shards: Shard):
    """A function that returns one shard after the other, and then None."""
    return functools.partial(next, iter(shards), None)
