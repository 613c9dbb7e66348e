"""Thoughts: tokens that a policy samples after a prompt and before its answer.

A thought ends with the mark (``thought_mark``, one token), at an end token, or after ``max_thought_tokens``. Where it
does not end with the mark, the mark is put behind it. The answer follows the mark.
"""

import dataclasses
from array import array
from collections.abc import Sequence
from pathlib import Path

from irlfast.common.files import InputError
from irlfast.config import Config
from irlfast.data.encoding import Encoder
from irlfast.data.store import Example, TokenIds
from irlfast.runs.run import Run
from irlfast.sampling.generation import sample
from irlfast.sampling.shards import Sampling


def mark_of(config: Config, encoder: Encoder) -> int:
    """Return the token that closes a thought.

    Raises:
        InputError: ``thought_mark`` is not one token of the run's tokenizer.
    """
    mark = config.thought_mark
    ids = encoder.tokenizer(mark, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise InputError(f"thought_mark: found {mark!r}, which is {len(ids)} tokens of this tokenizer; expected one")
    return ids[0]


def thinking(run: Run) -> Run:
    """Return the run as the sampler of thoughts sees it: the mark ends a sample, too, and its length is a thought's."""
    config = dataclasses.replace(run.config, max_new_tokens=run.config.max_thought_tokens)
    ends = (*run.encoder.ends, mark_of(run.config, run.encoder))
    return run._replace(config=config, encoder=run.encoder._replace(ends=ends))


def answering(run: Run) -> Run:
    """Return the run as the sampler of answers sees it: if the method thinks, a prompt ends with a thought and mark."""
    if not run.config.facts.thinks:
        return run
    longest = run.config.max_prompt_length + run.config.max_thought_tokens + 1
    return run._replace(config=dataclasses.replace(run.config, max_prompt_length=longest))


def think(run: Run, policy: Path | str, examples: Sequence[Example], folder: Path, how: Sampling) -> list[Example]:
    """Sample a thought to each example's prompt; return the examples with it and its mark at the prompts' ends."""
    mark = mark_of(run.config, run.encoder)
    thoughts = sample(thinking(run), policy, examples, folder, how)
    return [
        x._replace(
            prompt_ids=array("i", [*x.prompt_ids, *thought, *missing(thought, mark)]),
            answer_ids=after_mark(x.answer_ids, mark),
        )
        for x, thought in zip(examples, thoughts, strict=True)
    ]


def with_thoughts(run: Run) -> list[Example]:
    """Return the training examples for SFT, all with a thought before the answer, so that SFT teaches the mark.

    An example that has no thought gets its own answer as one, cut to ``max_thought_tokens``.
    """
    mark, room = mark_of(run.config, run.encoder), run.config.max_thought_tokens - 1

    def thought_of(answer: TokenIds) -> list[int]:
        return [] if mark in answer else [*answer[:-1][:room], mark]

    return [x._replace(answer_ids=array("i", [*thought_of(x.answer_ids), *x.answer_ids])) for x in run.train]


def missing(thought: Sequence[int], mark: int) -> list[int]:
    """Return the mark, as a list, if the thought does not end with it; else nothing."""
    return [] if thought[-1] == mark else [mark]


def after_mark(answer: TokenIds, mark: int) -> TokenIds:
    """Return a demonstration's answer without its thought: the part behind its first mark, or all of it."""
    ids = answer.tolist()
    return answer[ids.index(mark) + 1 :] if mark in ids else answer
