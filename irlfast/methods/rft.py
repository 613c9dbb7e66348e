"""A stage of RFT (arXiv 2405.17888, algorithm 1) or AfD (Inverse-RLignment): learn a reward, align the policy to it.

Adversarial AfD is RFT with the loss of a discriminator and the reward of a divergence. AfD that is not adversarial
learns its reward once, from pairs that do not depend on the policy (``reward_data``).
"""

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import remove
from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example, Mapped, joined
from irlfast.engine.fit import fit, phase_of
from irlfast.losses.policy import POLICY_LOSSES, align_loss
from irlfast.losses.sft import sft_loss
from irlfast.methods.credit import advantages_of, less_kl, less_penalties, totals
from irlfast.methods.reward import (
    learn_rewards,
    learn_rewards_in_round,
    learns_in,
    reward_asks,
    reward_models,
    reward_phases_of,
    round_reward_phases,
)
from irlfast.methods.sft import sft_phases
from irlfast.methods.stages import (
    Phase,
    answering,
    keep_facts,
    policy_plan,
    round_examples,
    round_folder,
    round_name,
    round_sampling,
    rounds_done,
    stage_name,
    stage_size,
    staleness,
)
from irlfast.runs.run import Run
from irlfast.sampling.generation import begin, groups_of, sampler_logps
from irlfast.sampling.mismatch import importance_weights, measure_mismatch
from irlfast.sampling.rewards import complete, token_rewards
from irlfast.sampling.scoring import Scores, log_ratios, score
from irlfast.sampling.shards import Request


def rft_stage(run: Run, stage: int, policy: Path | str, reference: Path | str) -> Path | str:
    """Learn a reward that tells the experts' answers from others, then raise it in rounds of fresh samples.

    With ``reward_every: round``, the reward also learns in each round, from the answers that it then judges.
    """
    config = run.config
    learned = learn_rewards(run, stage, policy) if config.reward_data != "none" else []
    done = rounds_done(run, stage)
    for number in range(config.align_rounds):
        folder = run.output / round_name(config, stage, number)
        if number >= done:
            examples = asked_in_round(run, stage, number)
            if config.reward_every == "round":
                learned = learn_rewards_in_round(run, stage, number, policy, examples)
            align(run, stage, number, policy, reference, learned, examples)
        if number and dist.is_main():
            remove(run.output / round_name(config, stage, number - 1) / "policy")
            for model in reward_models(config, run.output / round_folder(stage, number - 1)):
                remove(model)
        dist.barrier()
        policy = folder / "policy"
    return policy


def asked_in_round(run: Run, stage: int, number: int) -> Sequence[Example]:
    """Return the prompts that a round answers, with their demonstrations where there are some."""
    return joined([round_examples(each, run.config, stage, number) for each in (run.train, run.prompts)])


def rft_asks(run: Run, stage: int) -> list[Request]:
    """List what a stage asks of the policy that it starts from: answers for its rewards and for its first round."""
    config = run.config
    asks = reward_asks(run, stage) if config.reward_data != "none" else []
    if rounds_done(run, stage):
        return asks
    return [*asks, rollout_request(run, stage, 0, asked_in_round(run, stage, 0))]


def rollout_request(run: Run, stage: int, number: int, examples: Sequence[Example]) -> Request:
    """Return the request for a round's n answers to each prompt."""
    config, folder = run.config, run.output / round_name(run.config, stage, number) / "rollouts"
    return Request(run, examples, config.num_generations, folder, round_sampling(config, stage, number))


class Rollouts(NamedTuple):
    """The answers that the policy samples in one round: n to each of P prompts."""

    groups: Sequence[PromptGroup]
    rewards: Scores  # of each token of each answer, fp64; with reward_credit sequence, all at the last token
    old_logps: Scores  # each token's under the policy that the round starts from
    ref_logps: Scores  # the same under the reference
    sampler_logps: Scores  # the same as the sampler computed them; empty where nothing needs them


def align(
    run: Run,
    stage: int,
    number: int,
    policy: Path | str,
    reference: Path | str,
    learned: Sequence[Path],
    examples: Sequence[Example],
) -> None:
    """Do one round: sample n answers to each prompt, score them, and make the better answers likelier."""
    config, folder = run.config, run.output / round_name(run.config, stage, number)
    scales = run.output / stage_name(stage) / "reward_scales.json"
    source, request = policy if number else answering(run, stage, policy), rollout_request(run, stage, number, examples)
    rollouts = roll_out(run, source, policy, reference, learned, request, scales)
    rewards = less_penalties(rollouts.rewards, rollouts.groups, config, run.encoder.ends)
    plan = policy_plan(config, stage, len(rollouts.groups), number)
    if POLICY_LOSSES[config.align].loss is None:
        fit(run, folder, policy, best_answers(rollouts.groups, totals(rewards)), sft_loss, plan)
        return
    beta, kl_in = config.at("beta", stage), kl_place(config)
    if kl_in == "reward":
        rewards = less_kl(rewards, beta, rollouts.old_logps, rollouts.ref_logps)
    advantages = advantages_of(rewards, config)
    groups: Sequence[PromptGroup] = Mapped(
        lambda x, old, ref, a: x._replace(old_logps=old, ref_logps=ref if kl_in == "loss" else (), advantages=a),
        *(rollouts.groups, rollouts.old_logps, rollouts.ref_logps, advantages),
    )
    if config.vllm_importance_sampling_correction:
        groups = with_weights(groups, rollouts.sampler_logps, config)
    loss = functools.partial(
        align_loss,
        align=config.align,
        answers=config.num_generations,
        beta=beta,
        kl_in_loss=kl_in == "loss",
        clip_range=config.cliprange,
    )
    fit(run, folder, policy, groups, loss, plan)


def roll_out(
    run: Run,
    source: Path | str,
    policy: Path | str,
    reference: Path | str,
    learned: Sequence[Path],
    request: Request,
    scales: Path,
) -> Rollouts:
    """Sample n answers of ``source`` to each prompt; score them under the rewards, the policy and the reference."""
    config, n, folder = run.config, request.n, request.folder.parent
    begun = begin(request.folder)
    groups = groups_of(source, request)
    read = dist.is_main() or config.vllm_importance_sampling_correction
    flat = sampler_logps(request) if read else []
    sampled = time.perf_counter()
    rewards = token_rewards(run, learned, groups, folder, scales)
    kept = complete(totals(rewards))
    groups, rewards = Mapped(groups.__getitem__, kept), Mapped(rewards.__getitem__, kept)
    sampler = Mapped(lambda i: tuple(flat[n * i : n * (i + 1)]), kept) if flat else []
    ref: Scores = []
    if reference != policy:
        ref = score(run, reference, groups, folder / "reference.safetensors", in_4bit=config.load_in_4bit)
    old = score(run, policy, groups, folder / "old.safetensors", in_4bit=config.load_in_4bit)  # last: it trains next
    ref = ref or old
    seconds = {"sample_seconds": sampled - begun, "score_seconds": time.perf_counter() - sampled}

    def facts() -> dict[str, Any]:
        reward, kl = totals(rewards), ratios_of(old, ref)
        ended = [answer[-1] in run.encoder.ends for group in groups for answer in group.answers]
        metrics = {"reward": reward.mean().item(), "reward_std": reward.std(1).mean().item(), "kl": kl.mean().item()}
        metrics |= {"ended": sum(ended) / len(ended), "answers": len(ended)}
        answers = itertools.chain.from_iterable(old), itertools.chain.from_iterable(sampler)
        mismatch = measure_mismatch(*answers, phase_of(run, folder)) if sampler else {}
        return metrics | seconds | mismatch | staleness(run, source)

    keep_facts(run, folder / "round.json", facts)
    return Rollouts(groups, rewards, old, ref, sampler)


def ratios_of(policy: Scores, reference: Scores) -> Tensor:
    """Return the log-ratio ``[S]`` fp64 of each answer of all prompts."""
    ratios = (ratio for both in zip(policy, reference, strict=True) for ratio in log_ratios(*both).tolist())
    return torch.from_numpy(np.fromiter(ratios, np.float64))


def with_weights(groups: Sequence[PromptGroup], sampler: Scores, config: Config) -> Sequence[PromptGroup]:
    """Give each answer's tokens their importance weights π_old/π_sampler."""
    mode, clip_max = config.vllm_importance_sampling_mode, config.vllm_importance_sampling_clip_max
    weigh = functools.partial(importance_weights, mode=mode, clip_max=clip_max)
    return Mapped(lambda x, logps: x._replace(weights=tuple(map(weigh, x.old_logps, logps))), groups, sampler)


def kl_place(config: Config) -> str:
    """Return where the KL to the reference is subtracted: ``loss``, ``reward`` or ``none``."""
    return "reward" if POLICY_LOSSES[config.align].has_own_kl else config.kl_in


def best_answers(groups: Sequence[PromptGroup], reward: Tensor) -> Sequence[PromptGroup]:
    """Return each prompt with the answer that has the highest reward ``[P, n]``."""
    best = reward.argmax(1).numpy()
    return Mapped(lambda x, i: PromptGroup(x.prompt, (x.answers[i],), row=x.row), groups, best)


def rft_phases(config: Config, rows: int, prompts: int = 0) -> Iterator[Phase]:
    """List the phases of a run: SFT if asked for, then per stage a reward and its rounds.

    The reward learns from ``rows`` demonstrations, and the rounds also answer ``prompts`` that have none.
    """
    yield from sft_phases(config, rows)
    n = config.num_generations
    trained = 1 if POLICY_LOSSES[config.align].loss is None else n
    for stage in range(config.stages):
        size = stage_size(config, rows, stage)
        if learns_in(config, stage):
            yield from reward_phases_of(config, stage, size)
        for number in range(config.align_rounds):
            share = len(range(number, size, config.align_rounds))
            if config.reward_every == "round":
                yield from round_reward_phases(config, stage, number, share)
            share += len(range(number, stage_size(config, prompts, stage), config.align_rounds))
            name = round_name(config, stage, number)
            files = (f"{name}/eval.json",) if name == stage_name(stage) else ()
            plan = functools.partial(policy_plan, config, stage, share, number)
            yield Phase(name, plan, answers=trained, sampled=share * n, files=files)
