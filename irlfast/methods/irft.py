"""One stage of IRFT (arXiv 2405.17888, algorithm 2); with its preset, one of SPIN (arXiv 2401.01335, algorithm 1)."""

import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from irlfast.common import dist
from irlfast.config import Config
from irlfast.config.types import listed
from irlfast.data.store import Example, Mapped, TokenIds
from irlfast.engine.fit import finished, fit
from irlfast.losses.pairs import irft_loss
from irlfast.methods.sft import sft_phases
from irlfast.methods.stages import (
    Phase,
    answering,
    expert_and_synthetic,
    keep_facts,
    kept_of,
    make_pairs,
    policy_plan,
    stage_name,
    stage_request,
    stage_size,
    staleness,
)
from irlfast.ops.pair_loss.losses import PAIR_LOSSES
from irlfast.runs.run import Run
from irlfast.sampling.generation import answers_to, begin, sampler_logps
from irlfast.sampling.mismatch import measure_mismatch
from irlfast.sampling.scoring import score


def irft_stage(run: Run, stage: int, policy: Path | str, reference: Path | str) -> Path:
    """Sample answers ỹ ~ π_θ to the stage's prompts, then train on the pairs (y, ỹ). Return the new policy."""
    folder = run.output / stage_name(stage)
    if finished(folder):
        return folder / "policy"
    begun = begin(folder / "samples")
    request, source = stage_request(run, stage), answering(run, stage, policy)
    answers = answers_to(source, request)
    sampler = sampler_logps(request) if reference == policy and dist.is_main() else []
    return fit_pairs(run, stage, policy, reference, request.examples, answers, begun, sampler, source)


def fit_pairs(
    run: Run,
    stage: int,
    policy: Path | str,
    reference: Path | str,
    examples: Sequence[Example],
    answers: Sequence[TokenIds],
    begun: float,
    sampler: Sequence[Tensor] = (),
    source: Path | str | None = None,
) -> Path:
    """Score the pairs (y, ỹ) under the reference, then make K steps on their loss. The stage began at ``begun``.

    ``source`` is the model that answered, and ``sampler`` has its log-probabilities of the answers where they are
    compared with the reference's.
    """
    config, folder = run.config, run.output / stage_name(stage)
    sampled, identical = time.perf_counter(), not compares(config)
    pairs, counts = make_pairs(run, stage, examples, answers, keep_identical=identical)
    # In 4 bits the reference has the quantised base of the policy in training, so that the log-ratio starts at 0.
    ref_logps = score(run, reference, pairs, folder / "reference.safetensors", in_4bit=config.load_in_4bit)
    groups = Mapped(lambda pair, logps: pair._replace(ref_logps=logps), pairs, ref_logps)
    seconds = {"sample_seconds": sampled - begun, "score_seconds": time.perf_counter() - sampled}

    def facts() -> dict[str, Any]:
        fresh = range(0) if not sampler else kept_of(expert_and_synthetic(examples, answers), identical)
        own = Mapped(sampler.__getitem__, fresh)
        trainer = Mapped(lambda both: both[1], ref_logps[: len(own)])  # those of earlier stages follow
        stale = staleness(run, source) if source else {}
        return counts | seconds | measure_mismatch(trainer, own, folder.name) | stale

    keep_facts(run, folder / "pairs.json", facts)
    loss = functools.partial(irft_loss, nll_weight=config.nll_weight, **pair_options(config, stage))
    return fit(run, folder, policy, groups, loss, policy_plan(config, stage, len(groups)))


def compares(config: Config) -> bool:
    """Return whether the loss is of differences alone, so that a pair of identical answers has no gradient."""
    return all(PAIR_LOSSES[name].of_margin for name in listed(config.loss_type))


def pair_options(config: Config, stage: int) -> dict[str, Any]:
    """Return the options of a stage's loss on pairs, as :func:`irlfast.ops.pair_loss` takes them."""
    per_stage = {name: config.at(name, stage) for name in ("beta", "renyi_alpha")}
    names = ("loss_type", "loss_weights", "label_smoothing", "discopop_tau", "reward_shift")
    return per_stage | {name: getattr(config, name) for name in names}


def irft_phases(config: Config, rows: int) -> Iterator[Phase]:
    """List the phases of a run on ``rows`` demonstrations: SFT if asked for, then a phase per stage."""
    yield from sft_phases(config, rows)
    for stage in range(config.stages):
        name, first = stage_name(stage), max(0, stage - config.history)
        pairs = sum(stage_size(config, rows, earlier) for earlier in range(first, stage + 1))
        plan = functools.partial(policy_plan, config, stage, pairs)
        yield Phase(name, plan, answers=2, sampled=pairs, files=(f"{name}/pairs.json", f"{name}/eval.json"))
