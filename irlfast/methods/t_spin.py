"""One stage of T-SPIN (arXiv 2601.08198, algorithm 1): SPIN without a reference, also against the first policy."""

import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from irlfast.common.files import InputError
from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example, Mapped, TokenIds, where
from irlfast.engine.fit import finished, fit
from irlfast.losses.pairs import t_spin_loss
from irlfast.methods.irft import pair_options
from irlfast.methods.sft import sft_phases
from irlfast.methods.stages import (
    Phase,
    answering,
    keep_facts,
    policy_plan,
    stage_answers,
    stage_name,
    stage_request,
    staleness,
)
from irlfast.runs.run import Run
from irlfast.sampling.generation import answers_to, begin


def t_spin_stage(run: Run, stage: int, policy: Path | str, reference: Path | str) -> Path:
    """Sample answers ỹ ~ π_θ, then train on (y, ỹ) and on (ỹ, ỹ₀), where ỹ₀ is the first policy's answer.

    The answers of stage 0 are those of the first policy. There ỹ = ỹ₀, so that the stage learns from (y, ỹ) alone, as
    in the paper's experiments. Return the new policy. ``reference`` has no effect.
    """
    config, folder = run.config, run.output / stage_name(stage)
    if finished(folder):
        return folder / "policy"
    begun = begin(folder / "samples")
    request, source = stage_request(run, stage), answering(run, stage, policy)
    answers = [answers_to(source, request)]
    weight = historical_weight(config, stage)
    if weight:
        answers.append(stage_answers(run, 0))
    groups, counts = make_groups(stage, request.examples, answers)
    facts = counts | {"sample_seconds": time.perf_counter() - begun} | staleness(run, source)
    keep_facts(run, folder / "pairs.json", lambda: facts)
    loss = functools.partial(t_spin_loss, historical_weight=weight, **pair_options(config, stage))
    return fit(run, folder, policy, groups, loss, policy_plan(config, stage, len(groups)))


def historical_weight(config: Config, stage: int) -> float:
    return config.historical_weight if stage else 0.0


def make_groups(
    stage: int, examples: Sequence[Example], answers: Sequence[Sequence[TokenIds]]
) -> tuple[Sequence[PromptGroup], dict[str, int]]:
    """Make the prompt groups (prompt, (y, ỹ)) or (prompt, (y, ỹ, ỹ₀)), without those with an empty answer; count them.

    Identical answers stay, because the other pair of a triplet has a gradient.

    Raises:
        InputError: no group is left.
    """
    groups = Mapped(lambda x, *own: PromptGroup(x.prompt_ids, (x.answer_ids, *own), row=x.row), examples, *answers)
    kept = where(all(group.answers) for group in groups)
    if not kept:
        raise InputError(f"{stage_name(stage)}: all {len(groups)} prompts have an empty answer; expected some without")
    tokens = sum(map(len, answers[0]))
    return Mapped(groups.__getitem__, kept), {
        "pairs": len(kept),
        "dropped_empty": len(groups) - len(kept),
        "synthetic_tokens": tokens,
    }


def t_spin_phases(config: Config, rows: int) -> Iterator[Phase]:
    """List the phases of a run on ``rows`` demonstrations: SFT if asked for, then a phase per stage."""
    yield from sft_phases(config, rows)
    for stage in range(config.stages):
        name, plan = stage_name(stage), functools.partial(policy_plan, config, stage, rows)
        answers = 3 if historical_weight(config, stage) else 2
        yield Phase(name, plan, answers=answers, sampled=rows, files=(f"{name}/pairs.json", f"{name}/eval.json"))
