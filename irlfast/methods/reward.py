"""Learn a reward from demonstrations (arXiv 2405.17888, RFT; Inverse-RLignment, AfD): pairs, leaks, training."""

import dataclasses
import functools
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from irlfast.common import dist
from irlfast.common.artefacts import intact, keep_json
from irlfast.common.files import read_json
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.data.leaks import find_leaks, log_leaks
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example, Mapped
from irlfast.engine.fit import finished, fit, phase_of
from irlfast.engine.plan import Plan, plan_phase
from irlfast.losses.rewards import reward_loss
from irlfast.methods.sft import sft_phases
from irlfast.methods.stages import (
    Phase,
    answering,
    make_pairs,
    round_folder,
    round_name,
    round_sampling,
    sampling,
    stage_examples,
    stage_name,
    stage_request,
    stage_size,
    with_rejected,
    write_counts,
)
from irlfast.runs.run import Run
from irlfast.sampling.generation import answers_to, begin
from irlfast.sampling.rewards import combine, learned_reward, recipe, summed
from irlfast.sampling.shards import DRAWN, Request


def reward_stage(run: Run, stage: int, policy: Path | str, reference: Path | str) -> Path:
    """Train the reward model of method ``reward``, which has one stage and no reference, and return its folder."""
    [model] = learn_rewards(run, stage, policy)
    return model


def learn_rewards(run: Run, stage: int, policy: Path | str) -> list[Path]:
    """Train the reward models of a stage, one after the other on the same pairs, and return their folders.

    The first stage starts from ``reward_backbone``, or else from the policy; each later stage from the reward models of
    the stage before. All stages share those of the first one where their pairs do not depend on the policy.
    """
    config = run.config
    if not learns_in(config, stage):
        stage = 0
    place = run.output / stage_name(stage)
    models = reward_models(config, place)
    if not all(finished(model.parent) for model in models):
        pairs = reward_pairs(run, stage, policy)
        check_leaks(run, models[0].parent, pairs)
        first = [config.reward_backbone or policy] * len(models)
        starts = reward_models(config, run.output / stage_name(stage - 1)) if stage else first
        fit_rewards(run, [stage], starts, models, pairs)
    evaluate_rewards(run, models, policy)
    return models


def learn_rewards_in_round(
    run: Run, stage: int, number: int, policy: Path | str, examples: Sequence[Example]
) -> list[Path]:
    """Train the reward models further on the answers that a round aligns the policy with, and return their folders.

    Each of the n answers to a prompt is compared with the prompt's demonstration, if there is one. The first round of
    the first stage continues the models of :func:`learn_rewards`, and each other round those of the round before.
    """
    config, place = run.config, run.output / round_folder(stage, number)
    models = reward_models(config, place)
    if not all(finished(model.parent) for model in models):
        rollouts = run.output / round_name(config, stage, number) / "rollouts"
        begun = begin(rollouts)
        source, n = policy if number else answering(run, stage, policy), config.num_generations
        answers = answers_to(source, Request(run, examples, n, rollouts, round_sampling(config, stage, number)))
        known = array("i", (n * i + k for i, x in enumerate(examples) if x.answer_ids for k in range(n)))
        shown = Mapped(lambda answer: examples[answer // n], known)
        synthetic = Mapped(answers.__getitem__, known)
        pairs, counts = make_pairs(run, stage, shown, synthetic, keep_identical=not compares(config))
        write_counts(place, counts, begun)
        fit_rewards(run, [stage, number + 1], models_before(run, stage, number), models, pairs)
    if number == config.align_rounds - 1:
        evaluate_rewards(run, models, policy)
    return models


def fit_rewards(
    run: Run, at: list[int], starts: Sequence[Path | str], models: Sequence[Path], pairs: Sequence[PromptGroup]
) -> None:
    """Train each reward model from its start; ``at`` as for :func:`reward_plan`.

    The seed of each gives it heads and an order of the pairs of its own.
    """
    for number, (start, model) in enumerate(zip(starts, models, strict=True)):
        config = dataclasses.replace(run.config, seed=run.config.seed + 1000 * number)
        plan = reward_plan(config, at, len(pairs))
        fit(run._replace(config=config), model.parent, start, pairs, loss_of(config), plan)


def reward_names(config: Config) -> list[str]:
    """Return the names of the reward models' phases within a stage or round."""
    return ["reward", *(f"reward-{number:02d}" for number in range(1, config.reward_models))]


def reward_models(config: Config, place: Path) -> list[Path]:
    """Return the reward models in the folder of a stage or round."""
    return [place / name / "model" for name in reward_names(config)]


def models_before(run: Run, stage: int, number: int) -> list[Path]:
    """Return the reward models that a round continues."""
    if number:
        place = round_folder(stage, number - 1)
    else:
        place = round_folder(stage - 1, run.config.align_rounds - 1) if stage else stage_name(0)
    return reward_models(run.config, run.output / place)


def learns_in(config: Config, stage: int) -> bool:
    """Return whether a reward model is trained at the start of a stage.

    That is so in every stage where it learns from the policy's answers. It is so in the first stage alone where it
    does not, or where it learns further in each round.
    """
    each_stage = config.reward_data == "policy_demo" and config.reward_every == "stage"
    return each_stage or (config.reward_data != "none" and stage == 0)


def compares(config: Config) -> bool:
    """Return whether the reward's loss is of the difference of a pair, so that two identical answers teach nothing."""
    return config.reward_loss in ("bradley_terry", "gaussian") or config.reward_data == "preference"


def check_leaks(run: Run, folder: Path, pairs: Sequence[PromptGroup]) -> None:
    """Write ``leaks.json``, and print which trivial features tell the experts' answers apart."""
    if dist.is_main() and not intact(folder / "leaks.json"):
        leaks = find_leaks(pairs, run.encoder, run.config.max_new_tokens)
        keep_json(folder / "leaks.json", leaks)
        log_leaks(leaks, folder.parent.name)
    dist.barrier()


def reward_pairs(run: Run, stage: int, policy: Path | str) -> Sequence[PromptGroup]:
    """Make the prompt groups (prompt, (better, worse)) that ``reward_data`` names.

    At the first stage, ``policy`` is the policy after SFT.
    """
    config, folder = run.config, run.output / stage_name(stage)
    begun = begin(folder / "samples", folder / "better")
    examples: Sequence[Example] = stage_examples(run.train, config, stage)
    if config.reward_data == "preference":
        examples, answers = with_rejected(examples)
    else:
        source = run.initial if config.reward_data.startswith("init") else answering(run, stage, policy)
        answers = answers_to(source, stage_request(run, stage))
    if config.reward_data == "init_sft":
        better = answers_to(policy, better_request(run, stage))
        examples = Mapped(lambda x, ids: x._replace(answer_ids=ids), examples, better)
    pairs, counts = make_pairs(run, stage, examples, answers, keep_identical=not compares(config))
    write_counts(folder, counts, begun)
    return pairs


def reward_asks(run: Run, stage: int) -> list[Request]:
    """List what the rewards of a stage ask of the policy that it starts from: answers to learn from, and held-out ones.

    Rewards that are learned and judged ask nothing.
    """
    config = run.config
    if not learns_in(config, stage):
        return []
    models, asks = reward_models(config, run.output / stage_name(stage)), []
    if not all(finished(model.parent) for model in models):
        if config.reward_data in ("policy_demo", "sft_demo"):
            asks.append(stage_request(run, stage))
        if config.reward_data == "init_sft":
            asks.append(better_request(run, stage))
    if not dist.on_main(intact, models[0].parent / "eval.json"):
        asks.append(held_out_request(run, models))
    return asks


def better_request(run: Run, stage: int) -> Request:
    """Return the request for the better answers of ``init_sft``, which are drawn apart from the others."""
    folder = run.output / stage_name(stage) / "better"
    return Request(run, stage_examples(run.train, run.config, stage), 1, folder, sampling(run.config, stage, 2))


def held_out_request(run: Run, models: Sequence[Path]) -> Request:
    """Return the request for the held-out answers that reward models are judged by."""
    return Request(run, run.held_out, 1, models[0].parent / "drawn", DRAWN)


def loss_of(config: Config) -> functools.partial:
    """Bind the reward loss to the keys of the run."""
    return functools.partial(
        reward_loss,
        kind=config.reward_loss,
        level=config.reward_level,
        alpha=config.divergence_alpha,
        regularization=config.reward_regularization,
    )


def reward_plan(config: Config, at: list[int], count: int) -> Plan:
    """Plan the steps of a reward model over ``count`` pairs, ``at`` a stage, or at a stage and a round from 1."""
    stage = at[0]
    return plan_phase(
        config,
        count,
        stage=stage,
        epochs=config.reward_epochs,
        steps=config.reward_steps,
        learning_rate=config.reward_learning_rate or config.at("learning_rate", stage),
        optim=config.reward_optim or config.optim,
        seed=[3, *at],
        reward=recipe(config),
    )


def reward_phases(config: Config, rows: int) -> Iterator[Phase]:
    """List the phases of method ``reward`` on ``rows`` demonstrations: SFT if asked for, then the reward model."""
    yield from sft_phases(config, rows)
    yield from reward_phases_of(config, 0, stage_size(config, rows, 0))


def reward_phases_of(config: Config, stage: int, size: int) -> Iterator[Phase]:
    """List the phases that train a stage's reward models on ``size`` pairs."""
    plan, place = functools.partial(reward_plan, config, [stage], size), stage_name(stage)
    for number, name in enumerate(reward_names(config)):
        yield Phase(f"{place}/{name}", plan, answers=2, sampled=0 if number else size, files=(f"{place}/pairs.json",))


def round_reward_phases(config: Config, stage: int, number: int, prompts: int) -> Iterator[Phase]:
    """List the phases that train the reward models further in a round, whose answers the round's own phase counts.

    Each of the ``prompts`` gives as many pairs as it has answers.
    """
    plan = functools.partial(reward_plan, config, [stage, number + 1], prompts * config.num_generations)
    place = round_folder(stage, number)
    for name in reward_names(config):
        yield Phase(f"{place}/{name}", plan, answers=2, sampled=0, files=(f"{place}/pairs.json",))


def evaluate_rewards(run: Run, models: Sequence[Path], policy: Path | str) -> dict[str, Any]:
    """Evaluate reward models, as one ensemble, on the held-out demonstrations.

    The folder of the first one keeps the metrics, in ``eval.json``.

    The held-out rows may be a preference set that no training row comes from (``eval_dataset_name``).

    - ``reward_accuracy``: how often the demonstration has a higher reward than a fresh sample of ``policy`` that
      differs from it;
    - ``preference_accuracy``: how often the demonstration has a higher reward than the rejected answer, where there
      are rejected answers.
    """
    folder = models[0].parent
    path = folder / "eval.json"
    if dist.on_main(intact, path):
        return read_json(path)
    begun = begin(folder / "drawn")
    drawn = answers_to(policy, held_out_request(run, models))
    metrics: dict[str, Any] = {"phase": phase_of(run, folder)}
    rejected_ids = [example.rejected_ids for example in run.held_out]
    for name, part, others in (("reward", "drawn", drawn), ("preference", "rejected", rejected_ids)):
        both = zip(run.held_out, others, strict=True)
        pairs = [PromptGroup(x.prompt_ids, (x.answer_ids, ids)) for x, ids in both if ids and ids != x.answer_ids]
        if pairs:
            heads = learned_reward(run, models, pairs, folder / part / "reward.safetensors")
            rewards = combine([summed(heads)], run.config).view(-1, 2)
            metrics[f"{name}_accuracy"] = (rewards[:, 0] > rewards[:, 1]).double().mean().item()
            metrics[f"{name}_margin"] = (rewards[:, 0] - rewards[:, 1]).mean().item()
            metrics[f"{name}_pairs"] = len(pairs)
    if dist.is_main():
        run.metrics_log.write_held_out(metrics, kind="eval_reward")
        keep_json(path, metrics | {"seconds": time.perf_counter() - begun})
    dist.barrier()
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in metrics.items() if "accuracy" in name)
    log(f"{metrics['phase']}: held-out {shown}")
    return metrics
