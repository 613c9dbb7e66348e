"""Credit: the advantage of each token of the policy's own answers, from the reward of each token.

Dimensions: P prompts, n answers per prompt, T tokens of the longest answer.
"""

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Mapped, cut
from irlfast.losses.policy import POLICY_LOSSES, PolicyLoss
from irlfast.sampling.scoring import Scores

BLOCK = 1024  # prompts whose answers are padded to the longest of them at a time


def advantages_of(rewards: Scores, config: Config) -> Scores:
    """Return the advantage of each token, fp32, from the reward of each token of n answers to each prompt.

    With ``reward_credit: sequence``, every token of an answer has the advantage of the answer's summed reward. With
    ``token``, token t has the advantage of its reward-to-go Σ_{u ≥ t} γ^(u − t)·r_u: the rewards before it, which it
    cannot change, are left out.

    The baseline is the mean of the prompt's other answers at the same position (arXiv 2402.14740, eq. 8), or of all
    answers for a loss without ``leave_one_out``. GRPO divides by the standard deviation of the prompt's answers (arXiv
    2402.03300, section 4.1.2), ``whiten_rewards`` by that over all prompts.
    """
    loss, whole = POLICY_LOSSES[config.align], config.reward_credit == "sequence"
    lengths, blocks = array("i"), []
    for start in range(0, len(rewards), BLOCK):
        block = [*rewards[start : start + BLOCK]]
        lengths.extend(len(r) for answers in block for r in answers)
        values = [tuple(r.sum(0, keepdim=True) for r in answers) for answers in block] if whole else block
        blocks.append(torch.cat(centred_returns(values, config.gamma, loss)))
    advantages = torch.cat(blocks)
    if config.whiten_rewards and loss.leave_one_out:
        advantages = advantages / (advantages.std() + 1e-8)
    flat, each = advantages.float(), np.array(lengths)
    if whole:
        flat = flat.repeat_interleave(torch.from_numpy(each))
    return Mapped(tuple, cut(cut(flat, each), np.full(len(rewards), len(rewards[0]))))


def centred_returns(rewards: Scores, gamma: float, loss: PolicyLoss) -> list[Tensor]:
    """Return the rewards-to-go of each answer's tokens, less the mean of the prompt's answers at the same position.

    ``loss`` says whether an answer's own value counts in the mean, and whether the standard deviation divides.

    An answer that has ended keeps the return of its last token: where the whole reward is there and ``gamma`` is 1,
    all tokens of an answer have the same advantage, that of the answer.
    """
    n, flat = len(rewards[0]), [r for answers in rewards for r in answers]
    returns = pad_sequence(flat, batch_first=True)  # [P·n, T]
    for t in reversed(range(returns.shape[1] - 1)):
        returns[:, t] += gamma * returns[:, t + 1]
    lengths = torch.tensor([len(r) for r in flat])
    position = torch.minimum(torch.arange(returns.shape[1]), lengths[:, None] - 1)
    values = returns.gather(1, position).view(len(rewards), n, -1)
    centred = values - values.mean(1, keepdim=True)
    if loss.divides_by_std:
        centred = centred / (values.std(1, keepdim=True) + 1e-4)  # the constant is TRL's
    if loss.leave_one_out:
        centred = centred * (n / (n - 1))
    return [a[:length] for a, length in zip(centred.flatten(0, 1), lengths.tolist(), strict=True)]


def less_penalties(rewards: Scores, groups: Sequence[PromptGroup], config: Config, ends: Sequence[int]) -> Scores:
    """Subtract ``length_penalty`` from each token's reward, and ``missing_eos_penalty`` at an end that was cut off."""

    def lower(reward: Tensor, answer: Sequence[int]) -> Tensor:
        lowered = reward - config.length_penalty
        lowered[-1] -= config.missing_eos_penalty * (answer[-1] not in ends)
        return lowered

    return Mapped(lambda values, group: tuple(map(lower, values, group.answers)), rewards, groups)


def less_kl(rewards: Scores, beta: float, policy: Scores, reference: Scores) -> Scores:
    """Subtract β·(log π(y_t) − log π_ref(y_t)) from each token's reward, in fp64."""

    def lower(*each: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(r - beta * (new.double() - old.double()) for r, new, old in zip(*each, strict=True))

    return Mapped(lower, rewards, policy, reference)


def totals(rewards: Scores) -> Tensor:
    """Sum the rewards of each answer's tokens: ``[P, n]`` fp64."""
    sums = np.fromiter((r.sum().item() for answers in rewards for r in answers), np.float64)
    return torch.from_numpy(sums).view(len(rewards), -1)
