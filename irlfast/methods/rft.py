"""A stage of RFT (arXiv 2405.17888, algorithm 1) or AfD (Inverse-RLignment): learn a reward, align the policy to it.

Adversarial AfD is RFT with a discriminator's loss and a divergence's reward; AfD that is not iterative learns a reward
once, from pairs that do not depend on the policy (``reward_data``).
"""

import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import remove, write_json
from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example
from irlfast.engine.fit import fit
from irlfast.losses.policy import align_loss
from irlfast.losses.sft import sft_loss
from irlfast.methods.irft import irft_plan, sampling, stage_examples, stage_name
from irlfast.methods.reward import learn_reward
from irlfast.runs.run import Run
from irlfast.sampling.generation import sample_groups
from irlfast.sampling.rewards import complete, rewards_of
from irlfast.sampling.scoring import log_ratios, score


def rft_stage(run: Run, stage: int, policy: Path | str, reference: Path | str) -> Path | str:
    """Learn a reward that tells the experts' answers from others, then raise it in rounds of fresh samples."""
    config = run.config
    rewards: list[Path | str] = list(config.reward_model_name_or_path or [])
    if config.reward_data != "none":
        rewards.insert(0, learn_reward(run, stage, policy))
    examples = stage_examples(run.train, config, stage)
    rounds = np.array_split(np.arange(len(examples)), config.align_rounds)
    for number, part in enumerate(rounds):
        target = run.output / round_name(config, stage, number)
        if not (target / "DONE").exists():
            align(run, stage, number, policy, reference, rewards, [examples[i] for i in part], target)
        if number and dist.is_main():
            remove(run.output / round_name(config, stage, number - 1) / "policy")
        dist.barrier()
        policy = target / "policy"
    return policy


def round_name(config: Config, stage: int, number: int) -> str:
    """The phase of a round; a stage's last one is the stage's own."""
    last = number == config.align_rounds - 1
    return stage_name(stage) if last else f"{stage_name(stage)}/round-{number:02d}"


def align(
    run: Run,
    stage: int,
    number: int,
    policy: Path | str,
    reference: Path | str,
    rewards: Sequence[Path | str],
    examples: list[Example],
    folder: Path,
) -> None:
    """A round: n answers of the policy to each prompt, their rewards, and steps that make the better ones likelier."""
    config, n = run.config, run.config.num_generations
    drawn = sampling(config, stage)
    drawn = drawn._replace(seed=drawn.seed + 50_000 + 1000 * number)
    begun = time.perf_counter()
    groups = sample_groups(run, policy, examples, n, folder / "rollouts", drawn)
    sampled = time.perf_counter()
    found = rewards_of(run, rewards, groups, folder).view(-1, n)
    kept = complete(found)
    groups, found = [groups[i] for i in kept], found[kept]
    in_4bit = config.load_in_4bit
    old = score(run, policy, groups, folder / "old.safetensors", in_4bit=in_4bit)
    ref = (
        old if reference == policy else score(run, reference, groups, folder / "reference.safetensors", in_4bit=in_4bit)
    )
    values = found - penalties(groups, config, run.encoder.ends)
    kl = torch.stack([log_ratios(*both) for both in zip(old, ref, strict=True)])
    if dist.is_main() and not (folder / "round.json").exists():
        ended = [answer[-1] in run.encoder.ends for group in groups for answer in group.answers]
        metrics = {"reward": found.mean().item(), "reward_std": found.std(1).mean().item(), "kl": kl.mean().item()}
        metrics |= {"ended": sum(ended) / len(ended), "answers": len(ended)}
        seconds = {"sample_seconds": sampled - begun, "score_seconds": time.perf_counter() - sampled}
        write_json(folder / "round.json", metrics | seconds)
    plan = irft_plan(config, stage, len(groups))
    if config.align == "bon":
        best = values.argmax(1).tolist()
        chosen = [PromptGroup(x.prompt, (x.answers[i],)) for x, i in zip(groups, best, strict=True)]
        fit(run, folder, policy, chosen, sft_loss, plan)
        return
    beta = config.at("beta", stage)
    kl_in = "reward" if config.align == "apa" else config.kl_in  # APA's loss holds to the policy that sampled
    advantages = advantages_of(values - beta * kl if kl_in == "reward" else values, config)
    groups = [
        x._replace(old_logps=o, ref_logps=r if kl_in == "loss" else (), advantages=tuple(a))
        for x, o, r, a in zip(groups, old, ref, advantages.tolist(), strict=True)
    ]
    loss = functools.partial(
        align_loss, align=config.align, answers=n, beta=beta, kl_in_loss=kl_in == "loss", clip_range=config.cliprange
    )
    fit(run, folder, policy, groups, loss, plan)


def penalties(groups: Sequence[PromptGroup], config: Config, ends: Sequence[int]) -> Tensor:
    """What each answer ``[P, n]`` loses: for its length, and for having been cut before its end token."""
    lengths = torch.tensor([[len(answer) for answer in group.answers] for group in groups], dtype=torch.float64)
    unended = torch.tensor([[answer[-1] not in ends for answer in group.answers] for group in groups]).double()
    return config.length_penalty * lengths + config.missing_eos_penalty * unended


def advantages_of(values: Tensor, config: Config) -> Tensor:
    """Values ``[P, n]`` less those of the prompt's other answers, on average (leave-one-out: arXiv 2402.14740, eq. 8).

    For ``apa`` less the prompt's mean. ``whiten_rewards`` divides by the standard deviation over all.
    """
    centred = values - values.mean(1, keepdim=True)
    if config.align == "apa":
        return centred
    advantages = centred * (values.shape[1] / (values.shape[1] - 1))
    return advantages / (advantages.std() + 1e-8) if config.whiten_rewards else advantages
