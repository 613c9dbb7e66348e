"""Self-distillation from demonstrations: SDFT (arXiv 2601.19897, algorithm 1) and OPSD (arXiv 2601.18734, algorithm 1).

The policy answers its prompts, and learns from a teacher to answer them better: the teacher is the same model with the
demonstration in its prompt.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from irlfast.common import dist
from irlfast.common.artefacts import intact, keep_json
from irlfast.common.files import InputError, remove
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.data.packing import Batch, PromptGroup
from irlfast.data.store import Example, TokenIds
from irlfast.data.teacher_prompts import teacher_prompts
from irlfast.engine.fit import fit
from irlfast.losses.distillation import distillation_loss, tempered
from irlfast.methods.sft import sft_phases
from irlfast.methods.stages import (
    Phase,
    policy_plan,
    round_name,
    round_sampling,
    rounds_done,
    stage_examples,
    stage_name,
    stage_size,
)
from irlfast.ops import Head
from irlfast.runs.run import Run
from irlfast.sampling.generation import sample
from irlfast.sampling.scoring import score, token_logps


def sdft_stage(run: Run, stage: int, policy: Path | str, reference: Path | str) -> Path | str:
    """Distil the teacher into the policy in rounds of fresh samples. Return the new policy.

    The teacher begins as the reference. One that follows the policy goes on from round to round, and from stage to
    stage where ``reference`` is ``initial``.
    """
    config = run.config
    teacher = reference
    if stage and config.reference == "initial":
        teacher = latest_teacher(run.output / stage_name(stage - 1), teacher)
    examples = stage_examples(run.train, config, stage)
    done = rounds_done(run, stage)
    for number, part in enumerate(np.array_split(np.arange(len(examples)), config.align_rounds)):
        folder = run.output / round_name(config, stage, number)
        if number >= done:
            distil(run, stage, number, policy, teacher, [examples[i] for i in part])
        if number and dist.is_main():
            for model in ("policy", "teacher"):
                remove(run.output / round_name(config, stage, number - 1) / model)
        dist.barrier()
        policy, teacher = folder / "policy", latest_teacher(folder, teacher)
    return policy


def latest_teacher(folder: Path, teacher: Path | str) -> Path | str:
    """Return the teacher that a phase left in ``folder``, if it followed the policy, else the teacher it began as."""
    left = folder / "teacher"
    return left if dist.on_main(left.exists) else teacher


def distil(
    run: Run, stage: int, number: int, policy: Path | str, teacher: Path | str, examples: Sequence[Example]
) -> None:
    """Do one round: sample an answer to each prompt, and bring the policy's distributions along it to the teacher's."""
    config, folder = run.config, run.output / round_name(run.config, stage, number)
    examples, prompts = with_teacher_prompts(run, folder, examples)
    begun = time.perf_counter()
    answers = sample(run, policy, examples, folder / "samples", round_sampling(config, stage, number))
    sampled, skipped = time.perf_counter(), config.num_loss_tokens_to_skip
    groups = [
        PromptGroup(x.prompt_ids, (answer,), learned=range(skipped, len(answer)), teacher_prompt=prompt, row=x.row)
        for x, answer, prompt in zip(examples, answers, prompts, strict=True)
        if len(answer) > skipped
    ]
    if not groups:
        raise InputError(f"num_loss_tokens_to_skip: found {skipped}, but no sampled answer has more tokens")
    temperature = config.at("temperature", stage)
    if config.distillation_is_clip is not None:
        measure = functools.partial(tempered_logps, temperature=temperature)
        old = score(run, policy, groups, folder / "old.safetensors", measure=measure, in_4bit=config.load_in_4bit)
        groups = [x._replace(old_logps=(logps[skipped:],)) for x, (logps,) in zip(groups, old, strict=True)]
    if dist.is_main() and not intact(folder / "round.json"):
        ended = sum(answer[-1] in run.encoder.ends for answer in answers) / len(answers)
        seconds = {"sample_seconds": sampled - begun, "score_seconds": time.perf_counter() - sampled}
        tokens = {
            "synthetic_tokens": sum(map(len, answers)),
            "teacher_tokens": sum(len(x.teacher_prompt or ()) + len(x.answers[0]) for x in groups),  # per pass
        }
        keep_json(folder / "round.json", {"answers": len(answers), "ended": ended} | tokens | seconds)
    loss = functools.partial(
        distillation_loss,
        mode=config.distillation_mode,
        alpha=config.distillation_alpha,
        top_k=config.distillation_topk,
        add_tail=config.distillation_add_tail,
        is_clip=config.distillation_is_clip,
        temperature=temperature,
    )
    fit(run, folder, policy, groups, loss, policy_plan(config, stage, len(groups), number), teacher)


def with_teacher_prompts(run: Run, folder: Path, examples: Sequence[Example]) -> tuple[list[Example], list[TokenIds]]:
    """Return the examples that a teacher's prompt can be made of, and these prompts.

    Raises:
        InputError: no example is left.
    """
    assert run.rows
    prompts = teacher_prompts((run.rows[example.row] for example in examples), run.encoder, run.config)
    kept = [(example, prompt) for example, prompt in zip(examples, prompts, strict=True) if prompt]
    reason = (
        f"the teacher's prompt would have more than max_length ({run.config.max_length}) tokens, or does not end with "
        "a turn of the user"
    )
    if not kept:
        raise InputError(f"{folder.name}: all {len(examples):,} rows are left out, because {reason}")
    if len(kept) < len(examples):
        log(f"{folder.name}: {len(examples) - len(kept):,} of {len(examples):,} rows are left out, because {reason}")
    return [example for example, _ in kept], [prompt for _, prompt in kept]


def tempered_logps(hidden: Tensor, head: Head, batch: Batch, *, temperature: float) -> Sequence[Tensor]:
    """Return the log-probabilities of each answer's tokens at the temperature that sampled them."""
    return token_logps(hidden, tempered(head, temperature), batch)


def sdft_phases(config: Config, rows: int) -> Iterator[Phase]:
    """List the phases of a run on ``rows`` demonstrations: SFT if asked for, then the rounds of each stage."""
    yield from sft_phases(config, rows)
    for stage in range(config.stages):
        size = stage_size(config, rows, stage)
        for number in range(config.align_rounds):
            share = len(range(number, size, config.align_rounds))
            name = round_name(config, stage, number)
            files = (f"{name}/eval.json",) if name == stage_name(stage) else ()
            plan = functools.partial(policy_plan, config, stage, share, number)
            yield Phase(name, plan, answers=1, sampled=share, files=files)
