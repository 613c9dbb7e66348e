"""A run as a plan has it: the memory of a process, and the seconds of a step and of each phase."""

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from irlfast.config import Config
from irlfast.config.methods import SFT_TEACHERS
from irlfast.data.packing import count_tokens
from irlfast.data.sets import Sets
from irlfast.data.store import Example, Examples
from irlfast.methods import phases_of
from irlfast.methods.stages import Phase
from irlfast.startup.limits import different_lengths, groups_of
from irlfast.startup.plan_memory import (
    Room,
    copy_bytes,
    sampling_memory,
    scoring_memory,
    tokens_per_batch,
    training_memory,
)
from irlfast.startup.plan_seconds import (
    Lengths,
    Rates,
    group_of,
    load_seconds,
    sampling_seconds,
    scoring_seconds,
    split_scoring_seconds,
    step_seconds,
)
from irlfast.startup.sizes import Size

SAMPLER_STARTS, MODEL_LOADS = 1, 2  # per phase that samples: to answer; to score, and to train
EVALUATION_STARTS, EVALUATION_LOADS = 1, 1  # to answer held-out prompts, and to score their demonstrations


class Work(NamedTuple):
    """The rows and tokens of a run, from its data, or from the limits that its keys set."""

    rows: int
    prompts: int  # without demonstrations
    held_out: int
    lengths: Lengths
    longest: int  # tokens of the longest prompt group
    measured: bool  # False: the data cannot be read here, and every row is as long as the keys allow


class PlannedPhase(NamedTuple):
    name: str
    steps: int
    groups: int  # per step, of all processes
    step: dict[str, float]  # seconds of the parts of a step
    seconds: dict[str, float]  # of the parts of the phase
    beside: float = 0.0  # more seconds of sampling, beside the training of the stage before


class Planned(NamedTuple):
    room: Room
    tokens: int  # of the largest micro-batch
    memory: dict[str, dict[str, float]]  # bytes of the parts, by moment
    copied: float  # bytes of host memory while a checkpoint is written beside training
    phases: list[PlannedPhase]

    def seconds(self) -> float:
        return sum(sum(phase.seconds.values()) for phase in self.phases)


def work_of(config: Config, sets: Sets | None) -> Work:
    """Return the work of a run on ``sets``; without them, that of ``max_train_samples`` rows of the greatest length."""
    if sets is None:
        most = max(1, config.max_length - config.max_prompt_length)
        rows, held_out = config.max_train_samples or 0, config.max_eval_samples or 0
        lengths = Lengths(config.max_prompt_length, most, config.max_new_tokens)
        longest = longest_group(config, [full_row(config)])
        return Work(rows, 0, held_out, lengths, longest, measured=False)
    return work_on(config, sets.train, len(sets.prompts), len(sets.held_out))


def work_on(config: Config, train: Examples, prompts: int, held_out: int) -> Work:
    """Return the work of a run on demonstrations, so many ``prompts`` without one, and so many that are held out."""
    prompt, answer = (float(n) for n in train.lengths[:, :2].mean(0))
    lengths = Lengths(prompt, answer, min(answer, config.max_new_tokens))
    return Work(len(train), prompts, held_out, lengths, longest_group(config, different_lengths(train)), measured=True)


def full_row(config: Config) -> Example:
    """Make a row as long as the configuration allows."""
    answer = max(1, config.max_length - config.max_prompt_length)
    return Example(array("i", bytes(4 * config.max_prompt_length)), array("i", bytes(4 * answer)))


def longest_group(config: Config, rows: Sequence[Example] | Examples) -> int:
    return max(count_tokens(group) for row in rows for group in groups_of(config, row))


def plan_run(config: Config, size: Size, room: Room, rates: Rates, work: Work) -> Planned:
    """Plan a run of ``room.processes`` processes."""
    phases = phases_of(config, work.rows, work.prompts)
    groups = max((phase.plan().steps[0].size for phase in phases), default=room.processes)
    answers = max((phase.answers for phase in phases), default=1)
    own = math.ceil(groups / room.processes) * count_tokens(group_of(work.lengths, answers))
    tokens = tokens_per_batch(config, size, room, work.longest, own)
    scored = room_to_score(config, work, room)
    memory = training_memory(config, size, room, tokens, math.ceil(own / tokens))
    if any(phase.sampled for phase in phases):
        memory["scoring"] = scoring_memory(config, size, room, scored)
    memory["sampling"] = sampling_memory(config, size, room, config.max_prompt_length)
    cache = memory["sampling"]["cache"]
    if config.vllm_server:
        del memory["sampling"]  # not in the memory of the GPUs that train
    planned = [plan_phase_of(config, size, room, rates, work, phase, tokens, scored, cache) for phase in phases]
    if config.async_sampling and config.vllm_server:
        planned = sampled_beside(phases, planned)
    return Planned(room, tokens, memory, copy_bytes(config, size, room), planned)


def sampled_beside(phases: Sequence[Phase], planned: Sequence[PlannedPhase]) -> list[PlannedPhase]:
    """Leave of each phase's sampling only what ``async_sampling`` lets a stage wait for.

    The servers answer while the stage before takes the steps after those of its early policy. They answer for all
    phases of the next stage up to the first that trains the policy; later rounds are sampled without overlap.
    """
    left, free = [], 0.0
    for phase, own in zip(phases, planned, strict=True):
        plan, beside = phase.plan(), min(free, own.seconds["sampling"])
        left.append(own._replace(seconds=own.seconds | {"sampling": own.seconds["sampling"] - beside}, beside=beside))
        free -= beside
        if not plan.reward:
            after = 0 if plan.early is None else len(plan.steps) - plan.early
            free = own.seconds["training"] * after / len(plan.steps)
    return left


def room_to_score(config: Config, work: Work, room: Room) -> int:
    """Return the tokens of a batch that is scored."""
    if config.max_tokens_per_batch != "auto":
        return config.max_tokens_per_batch
    return work.longest * (config.per_device_eval_batch_size if room.on_gpu else 1)


def plan_phase_of(
    config: Config,
    size: Size,
    room: Room,
    rates: Rates,
    work: Work,
    phase: Phase,
    tokens: int,
    tokens_scored: int,
    cache: float,
) -> PlannedPhase:
    """Plan a phase whose micro-batches have so many ``tokens``, and whose batches to score ``tokens_scored``."""
    plan, lengths = phase.plan(), work.lengths
    groups = plan.steps[0].size
    own = groups / room.processes * count_tokens(group_of(lengths, phase.answers))
    micro_batches = max(1, math.ceil(own / tokens))
    step = step_seconds(config, size, room, rates, lengths, plan, phase.answers, micro_batches)
    if teaches(config, phase):
        forward = scoring_seconds(size, room, rates._replace(scoring=1.0), lengths, groups, phase.answers, 1)
        step["forward and backward"] += forward
    loads = load_seconds(config, size, rates)
    evaluated = work.held_out if f"{phase.name}/eval.json" in phase.files else 0
    starts = SAMPLER_STARTS * bool(phase.sampled) + EVALUATION_STARTS * bool(evaluated)
    read = 1 + (MODEL_LOADS - 1) * bool(models_scoring(config, phase)) + EVALUATION_LOADS * bool(evaluated)
    per_prompt = config.num_generations if config.facts.aligns and not plan.reward else 1
    scored = phase.sampled / per_prompt

    def scoring(groups: float, answers: int, models: int) -> float:
        gathering = split_scoring_seconds(config, size, room, rates, lengths, groups, answers, tokens_scored)
        return scoring_seconds(size, room, rates, lengths, groups, answers, models) + models * gathering

    seconds = {
        "sampling": sampling_seconds(config, size, room, rates, lengths, phase.sampled, cache),
        "scoring": scoring(scored, phase.answers, models_scoring(config, phase)),
        "training": len(plan.steps) * sum(step.values()),
        "evaluation": sampling_seconds(config, size, room, rates, lengths, evaluated, cache) + scoring(evaluated, 1, 1),
        "loads": starts * loads["sampler"] + read * loads["model"],
    }
    return PlannedPhase(phase.name, len(plan.steps), groups, step, seconds)


def teaches(config: Config, phase: Phase) -> bool:
    """Return whether a second model runs beside the policy in this phase."""
    if phase.name == "sft":
        return config.sft_loss_type in SFT_TEACHERS
    return config.facts.has_teacher and phase.name != "sft-nll"


def models_scoring(config: Config, phase: Phase) -> int:
    """Return how many models score a phase's answers before it trains."""
    facts = config.facts
    if not phase.sampled or facts.thinks or facts.triplets or phase.plan().reward:
        return 0
    if facts.has_teacher:
        return int(config.distillation_is_clip is not None)
    if not facts.aligns:
        return 1  # the reference
    rewards = config.reward_models * (config.reward_data != "none") + len(config.reward_model_name_or_path)
    same = config.reference == "stage" and config.align_rounds == 1
    return rewards + len(config.implicit_reward_policy) + 1 + (not same)
