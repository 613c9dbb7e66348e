"""Helpers that several methods share: a stage's name, rows, sampling, pairs and plan."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from irlfast.common import dist
from irlfast.common.files import InputError, write_json
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example, TokenIds
from irlfast.engine.plan import Plan, plan_phase
from irlfast.runs.run import Run
from irlfast.sampling.generation import Sampling, read_samples


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


def stage_size(config: Config, rows: int, stage: int) -> int:
    """Return the number of examples that :func:`stage_examples` returns for a stage."""
    return rows if config.prompts_per_stage == "all" else len(range(stage, rows, config.stages))


def stage_examples(examples: Sequence[Example], config: Config, stage: int) -> list[Example]:
    """Return all examples, or the stage's share of them in the order of a seeded shuffle."""
    if config.prompts_per_stage == "all":
        return list(examples)
    order = np.random.default_rng([config.seed, 1]).permutation(len(examples))
    return [examples[i] for i in np.array_split(order, config.stages)[stage]]


def round_examples(examples: Sequence[Example], config: Config, stage: int, number: int) -> list[Example]:
    """Return a round's share of a stage's examples, in their order."""
    chosen = stage_examples(examples, config, stage)
    return [chosen[i] for i in np.array_split(np.arange(len(chosen)), config.align_rounds)[number]]


def with_rejected(examples: list[Example]) -> tuple[list[Example], list[TokenIds]]:
    """Return the examples that have a rejected answer, and these answers.

    Raises:
        InputError: no example has one.
    """
    pairs = [(example, example.rejected_ids) for example in examples if example.rejected_ids is not None]
    if not pairs:
        raise InputError("no demonstration has a rejected answer to the prompt; expected rows of chosen and rejected")
    if len(pairs) < len(examples):
        log(f"{len(examples) - len(pairs):,} of {len(examples):,} rows have no rejected answer to the prompt: left out")
    kept, answers = zip(*pairs, strict=True)
    return list(kept), list(answers)


def sampling(config: Config, stage: int) -> Sampling:
    """Return how a stage's answers are sampled."""
    seed = (config.seed * 1000 + stage) * 100_000  # a shard adds its number
    return Sampling(config.at("temperature", stage), config.top_p, config.top_k, seed)


def round_sampling(config: Config, stage: int, number: int) -> Sampling:
    """Return how the answers of a round of alignment are sampled."""
    how = sampling(config, stage)
    return how._replace(seed=how.seed + 50_000 + 1000 * number)


def make_pairs(
    run: Run, stage: int, examples: list[Example], answers: Sequence[TokenIds], keep_identical: bool = False
) -> tuple[list[PromptGroup], dict[str, int]]:
    """Make the prompt groups (prompt, (expert, synthetic)) of a stage and of ``history`` earlier ones; count them.

    Pairs whose synthetic answer is empty are left out. So are pairs of two identical answers, whose gradient is zero
    in a loss of differences. A discriminator, and a loss of each reward alone, must see identical answers
    (``keep_identical``): without them they would learn another density.

    Raises:
        InputError: no pair is left.
    """
    pairs = [PromptGroup(x.prompt_ids, (x.answer_ids, answer)) for x, answer in zip(examples, answers, strict=True)]
    fresh = len(pairs)
    for earlier in range(max(0, stage - run.config.history), stage):
        old = read_samples(run.output / stage_name(earlier) / "samples")
        prompts = stage_examples(run.train, run.config, earlier)
        pairs += [PromptGroup(x.prompt_ids, (x.answer_ids, answer)) for x, answer in zip(prompts, old, strict=True)]
    counts = {
        "dropped_identical": 0 if keep_identical else sum(pair.answers[0] == pair.answers[1] for pair in pairs),
        "dropped_empty": sum(not pair.answers[1] for pair in pairs),
        "from_history": len(pairs) - fresh,
        "synthetic_tokens": sum(map(len, answers)),
    }
    kept = [pair for pair in pairs if pair.answers[1] and (keep_identical or pair.answers[0] != pair.answers[1])]
    if not kept:
        raise InputError(
            f"{stage_name(stage)}: all {len(pairs)} synthetic answers equal the expert's or are empty; "
            "expected some that differ (nothing is left to learn, or temperature is too low)"
        )
    return kept, {"pairs": len(kept)} | counts


def write_counts(place: Path, counts: dict[str, int], begun: float) -> None:
    """Write ``pairs.json``: the counts of the pairs, and the seconds since ``begun`` that their answers took."""
    if dist.is_main() and not (place / "pairs.json").exists():
        write_json(place / "pairs.json", counts | {"sample_seconds": time.perf_counter() - begun})


def policy_plan(config: Config, stage: int, count: int) -> Plan:
    """Plan the K inner steps of a stage over ``count`` prompt groups."""
    return plan_phase(
        config,
        count,
        stage=stage,
        epochs=config.at("inner_epochs", stage),
        steps=config.at("inner_steps", stage),
        learning_rate=config.at("learning_rate", stage),
        optim=config.optim,
        seed=[2, stage],
    )
