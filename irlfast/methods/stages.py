"""Helpers that several methods share: a stage's name, rows, sampling, pairs and plan."""

import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from irlfast.common import dist
from irlfast.common.artefacts import intact, keep_json
from irlfast.common.files import InputError, read_json, remove
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example, Examples, Mapped, TokenIds, joined, where
from irlfast.engine.early import EARLY, has_early, staleness_of
from irlfast.engine.fit import finished, phase_of
from irlfast.engine.plan import Plan, plan_phase
from irlfast.runs.run import Run
from irlfast.sampling.generation import answers_to
from irlfast.sampling.shards import Request, Sampling


class Phase(NamedTuple):
    """A part of a run that trains one model: ``--dry_run`` shows it, and the report expects its files."""

    name: str  # the phase's folder in the run
    plan: Callable[[], Plan]  # a function, because the report reads the other fields alone
    answers: int  # trained on, per prompt group
    sampled: int  # answers that are sampled, and scored, before training
    files: tuple[str, ...]  # paths in the run of the files that the report reads


def stage_name(stage: int) -> str:
    return f"stage-{stage:02d}"


def round_folder(stage: int, number: int) -> str:
    """Return the folder of a round's answers and reward."""
    return f"{stage_name(stage)}/round-{number:02d}"


def round_name(config: Config, stage: int, number: int) -> str:
    """Return the name of a round's phase. The last round of a stage has the name of the stage."""
    return stage_name(stage) if number == config.align_rounds - 1 else round_folder(stage, number)


def wants_sft(config: Config) -> bool:
    return bool(config.sft_epochs or config.sft_steps)


def stage_size(config: Config, rows: int, stage: int) -> int:
    """Return the number of examples that :func:`stage_examples` returns for a stage."""
    return rows if config.prompts_per_stage == "all" else len(range(stage, rows, config.stages))


def stage_examples(examples: Examples, config: Config, stage: int) -> Examples:
    """Return all examples, or the stage's share of them in the order of a seeded shuffle."""
    if config.prompts_per_stage == "all":
        return examples
    order = np.random.default_rng([config.seed, 1]).permutation(len(examples))
    return examples[np.array_split(order, config.stages)[stage]]


def round_examples(examples: Examples, config: Config, stage: int, number: int) -> Examples:
    """Return a round's share of a stage's examples, in their order."""
    chosen = stage_examples(examples, config, stage)
    return chosen[np.array_split(np.arange(len(chosen)), config.align_rounds)[number]]


def with_rejected(examples: Sequence[Example]) -> tuple[Sequence[Example], Sequence[TokenIds]]:
    """Return the examples that have a rejected answer, and these answers.

    Raises:
        InputError: no example has one.
    """
    kept = where(example.rejected_ids is not None for example in examples)
    if not kept:
        raise InputError("no demonstration has a rejected answer to the prompt; expected rows of chosen and rejected")
    if len(kept) < len(examples):
        log(f"{len(examples) - len(kept):,} of {len(examples):,} rows have no rejected answer to the prompt: left out")
    chosen = Mapped(examples.__getitem__, kept)
    return chosen, Mapped(lambda example: example.rejected_ids, chosen)


def check_policy_left(run: Run, stage: int, policy: Path | str) -> None:
    """Check that a stage which is not finished, or is damaged, still has the policy that it starts from.

    Raises:
        InputError: ``save_total_limit`` has deleted the policy.
    """
    folder = run.output / stage_name(stage)
    if isinstance(policy, Path) and not dist.on_main(policy.exists) and not finished(folder):
        raise InputError(
            f"{folder.name}: its policy is damaged or missing, and that of {policy.parent.name}, from which it could "
            "be made again, was deleted by save_total_limit; put one of them back, or take a new output_dir"
        )


def delete_policies(run: Run, stage: int, best: str) -> None:
    """Delete the policies that ``save_total_limit`` no longer keeps after a stage, but not that of the phase ``best``.

    ``DONE`` first says that nothing is left: a model that it lists would be made again.
    """
    limit = run.config.save_total_limit
    if limit and dist.is_main():
        for name in map(stage_name, range(stage + 1 - limit)):
            if name != best:
                keep_json(run.output / name / "DONE", [])
                for model in ("policy", "teacher", EARLY):
                    remove(run.output / name / model)
    dist.barrier()


def sampling(config: Config, stage: int, *more: int, logps: bool = False) -> Sampling:
    """Return how a stage's answers are sampled. Other answers to the same prompts take ``more`` numbers as a seed.

    With ``logps``, the sampler also says its log-probabilities, to compare them with those of the trainer.
    """
    return Sampling(config.at("temperature", stage), config.top_p, config.top_k, (config.seed, stage, *more), logps)


def answering(run: Run, stage: int, policy: Path | str) -> Path | str:
    """Return the policy that answers a stage's prompts: the one that the stage starts from, ``policy``.

    With ``async_sampling``, it is the early policy of the stage before, if that stage came so far.
    """
    before = run.output / stage_name(stage - 1)
    return before / EARLY if run.config.async_sampling and stage and has_early(before) else policy


def staleness(run: Run, sampler: Path | str) -> dict[str, int]:
    """Return how stale a phase's answers are, as in metrics.jsonl; nothing without ``async_sampling``.

    That is the optimiser steps from ``sampler``, which answered, to the policy that the stage starts from.
    """
    return {"sampling/staleness": staleness_of(sampler)} if run.config.async_sampling else {}


def early_step(config: Config, stage: int, number: int, steps: int) -> int | None:
    """Return after how many of a round's ``steps`` its policy answers the next stage's prompts; None: it does not.

    The last round of a stage does, if there is a next stage. A method without rounds has one.
    """
    last = config.align_rounds - 1 if config.facts.aligns else 0
    if not config.async_sampling or stage == config.stages - 1 or number != last:
        return None
    return max(1, int(steps * config.async_sampling_at))


def stage_request(run: Run, stage: int) -> Request:
    """Return the request for one answer to each of a stage's prompts."""
    config, folder = run.config, run.output / stage_name(stage) / "samples"
    scored = config.facts.learns_pairs and not config.facts.triplets and (config.reference == "stage" or not stage)
    how = sampling(config, stage, logps=scored)  # scored by the policy that draws them, which is the reference
    return Request(run, stage_examples(run.train, config, stage), 1, folder, how)


def stage_asks(run: Run, stage: int) -> list[Request]:
    """List what a stage asks of the policy that it starts from, if it is not finished: one answer to each prompt."""
    return [] if finished(run.output / stage_name(stage)) else [stage_request(run, stage)]


def stage_answers(run: Run, stage: int) -> Sequence[TokenIds]:
    """Return the answers that an earlier stage sampled. Damaged ones are sampled anew from the policy before it."""
    config, policy = run.config, run.initial
    if stage or wants_sft(config):
        policy = run.output / (stage_name(stage - 1) if stage else "sft") / "policy"
    return answers_to(answering(run, stage, policy), stage_request(run, stage))


def rounds_done(run: Run, stage: int) -> int:
    """Return how many rounds of a stage are done: all up to the newest whose models are there and intact."""
    rounds = range(run.config.align_rounds, 0, -1)
    return next((n for n in rounds if finished(run.output / round_name(run.config, stage, n - 1))), 0)


def round_sampling(config: Config, stage: int, number: int) -> Sampling:
    """Return how the answers of a round of alignment are sampled."""
    return sampling(config, stage, 1, number, logps=config.facts.aligns)


def make_pairs(
    run: Run, stage: int, examples: Sequence[Example], answers: Sequence[Sequence[int]], keep_identical: bool = False
) -> tuple[Sequence[PromptGroup], dict[str, int]]:
    """Make the prompt groups (prompt, (expert, synthetic)) of a stage and of ``history`` earlier ones; count them.

    Pairs whose synthetic answer is empty are left out. So are pairs of two identical answers, whose gradient is zero
    in a loss of differences. A discriminator, and a loss of each reward alone, must see identical answers
    (``keep_identical``): without them they would learn another density.

    Raises:
        InputError: no pair is left.
    """
    prompts, sampled = [examples], [answers]
    for earlier in range(max(0, stage - run.config.history), stage):
        sampled.append(stage_answers(run, earlier))
        prompts.append(stage_examples(run.train, run.config, earlier))
    pairs = expert_and_synthetic(joined(prompts), joined(sampled))
    counts = {
        "dropped_identical": 0 if keep_identical else sum(pair.answers[0] == pair.answers[1] for pair in pairs),
        "dropped_empty": sum(not answer for part in sampled for answer in part),
        "from_history": sum(map(len, sampled[1:])),
        "synthetic_tokens": sum(map(len, answers)),
    }
    kept = kept_of(pairs, keep_identical)
    if not kept:
        raise InputError(
            f"{stage_name(stage)}: all {len(pairs)} synthetic answers equal the expert's or are empty; "
            "expected some that differ (nothing is left to learn, or temperature is too low)"
        )
    return Mapped(pairs.__getitem__, kept), {"pairs": len(kept)} | counts


def kept_of(pairs: Sequence[PromptGroup], keep_identical: bool) -> array:
    """Return the numbers of the pairs that :func:`make_pairs` keeps."""
    return where(bool(new) and (keep_identical or old != new) for old, new in (pair.answers for pair in pairs))


def expert_and_synthetic(examples: Sequence[Example], answers: Sequence[Sequence[int]]) -> Sequence[PromptGroup]:
    """Return the pair (y, ỹ) of each example's own answer and a sampled one."""
    return Mapped(lambda x, answer: PromptGroup(x.prompt_ids, (x.answer_ids, answer), row=x.row), examples, answers)


def keep_facts(run: Run, path: Path, facts: Callable[[], dict[str, Any]]) -> None:
    """Keep what is known of a phase before its first step in the file ``path`` of its folder, if it is not there.

    All rows of the phase in metrics.jsonl have those facts that are named ``sampling/…``, too.
    """
    if not dist.is_main():
        return
    if not intact(path):
        keep_json(path, facts())
    known = {name: value for name, value in read_json(path).items() if name.startswith("sampling/")}
    run.metrics_log.known[phase_of(run, path.parent)] = known


def write_counts(place: Path, counts: dict[str, int], begun: float) -> None:
    """Write ``pairs.json``: the counts of the pairs, and the seconds since ``begun`` that their answers took."""
    if dist.is_main() and not intact(place / "pairs.json"):
        keep_json(place / "pairs.json", counts | {"sample_seconds": time.perf_counter() - begun})


def policy_plan(config: Config, stage: int, count: int, number: int = 0) -> Plan:
    """Plan the K inner steps of a stage, or of round ``number`` of one, over ``count`` prompt groups."""
    plan = plan_phase(
        config,
        count,
        stage=stage,
        epochs=config.at("inner_epochs", stage),
        steps=config.at("inner_steps", stage),
        learning_rate=config.at("learning_rate", stage),
        optim=config.optim,
        seed=[2, stage, number],
    )
    return plan._replace(early=early_step(config, stage, number, len(plan.steps)))
