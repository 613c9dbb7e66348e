"""A stage of hidden reasoning: the policy thinks, and the demonstration is scored and learned behind its thoughts.

Log-probability rewards (arXiv 2602.03979), VeriFree (arXiv 2505.21493) and JEPO (arXiv 2503.19618) differ in their
objective alone: see :mod:`irlfast.losses.reasoning`.
"""

import functools
import itertools
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from irlfast.common import dist
from irlfast.common.artefacts import intact, keep_json
from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example
from irlfast.engine.fit import finished, fit
from irlfast.losses.reasoning import reasoning_loss
from irlfast.methods.sft import sft_phases
from irlfast.methods.stages import Phase, policy_plan, sampling, stage_examples, stage_name, stage_size
from irlfast.runs.run import Run
from irlfast.sampling.generation import begin, groups_of
from irlfast.sampling.shards import Request
from irlfast.sampling.thoughts import after_mark, mark_of, missing, thinking


def reasoning_stage(run: Run, stage: int, policy: Path | str, reference: Path | str) -> Path:
    """Sample n thoughts z ~ π_θ(z|x) to each prompt, then raise the objective of (z, y*). Return the new policy."""
    config, folder = run.config, run.output / stage_name(stage)
    if finished(folder):
        return folder / "policy"
    begun = begin(folder / "thoughts")
    request, mark = thoughts_request(run, stage), mark_of(config, run.encoder)
    sampled = groups_of(policy, request)
    groups = [answered(x, group.answers, mark) for x, group in zip(request.examples, sampled, strict=True)]
    if dist.is_main() and not intact(folder / "thoughts.json"):
        thoughts = [*itertools.chain.from_iterable(group.answers for group in sampled)]
        closed = sum(thought[-1] == mark for thought in thoughts) / len(thoughts)
        length = sum(map(len, thoughts)) / len(thoughts)
        metrics = {"thoughts": len(thoughts), "closed": closed, "thought_length": length}
        keep_json(folder / "thoughts.json", metrics | {"sample_seconds": time.perf_counter() - begun})
    loss = functools.partial(reasoning_loss, reward=config.thought_reward, thoughts=request.n)
    return fit(run, folder, policy, groups, loss, policy_plan(config, stage, len(groups)))


def thoughts_request(run: Run, stage: int) -> Request:
    config, folder = run.config, run.output / stage_name(stage) / "thoughts"
    examples = stage_examples(run.train, config, stage)
    return Request(thinking(run), examples, config.num_generations, folder, sampling(config, stage))


def reasoning_asks(run: Run, stage: int) -> list[Request]:
    """List what a stage asks of the policy that it starts from, if it is not finished: its thoughts."""
    return [] if finished(run.output / stage_name(stage)) else [thoughts_request(run, stage)]


def answered(example: Example, thoughts: Sequence[Sequence[int]], mark: int) -> PromptGroup:
    """Put the demonstration behind each thought. A mark that the thought lacks is the answer's first token."""
    answer = after_mark(example.answer_ids, mark)
    whole = tuple(array("i", [*thought, *missing(thought, mark), *answer]) for thought in thoughts)
    return PromptGroup(example.prompt_ids, whole, thoughts=tuple(map(len, thoughts)), row=example.row)


def reasoning_phases(config: Config, rows: int) -> Iterator[Phase]:
    """List the phases of a run on ``rows`` demonstrations: SFT if asked for, then a phase per stage."""
    yield from sft_phases(config, rows)
    n = config.num_generations
    for stage in range(config.stages):
        name, size = stage_name(stage), stage_size(config, rows, stage)
        plan = functools.partial(policy_plan, config, stage, size)
        yield Phase(name, plan, answers=n, sampled=size * n, files=(f"{name}/eval.json",))
