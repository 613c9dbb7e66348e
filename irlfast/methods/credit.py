"""Credit: the advantage of each token of the policy's own answers, from the reward of each token.

Dimensions: P prompts, n answers per prompt, T tokens of the longest answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from irlfast.config import Config
from irlfast.data.packing import PromptGroup
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
    values = [tuple(r.sum(0, keepdim=True) if whole else r for r in answers) for answers in rewards]
    blocks = [values[start : start + BLOCK] for start in range(0, len(values), BLOCK)]
    advantages = [a for block in blocks for a in centred_returns(block, config.gamma, loss)]
    if config.whiten_rewards and loss.leave_one_out:
        scale = torch.cat(advantages).std() + 1e-8
        advantages = [a / scale for a in advantages]
    each = iter(advantages)
    return [tuple(next(each).float().expand(len(r)) for r in answers) for answers in rewards]


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

    return [tuple(map(lower, values, group.answers)) for values, group in zip(rewards, groups, strict=True)]


def less_kl(rewards: Scores, beta: float, policy: Scores, reference: Scores) -> Scores:
    """Subtract β·(log π(y_t) − log π_ref(y_t)) from each token's reward, in fp64."""
    return [
        tuple(r - beta * (new.double() - old.double()) for r, new, old in zip(*each, strict=True))
        for each in zip(rewards, policy, reference, strict=True)
    ]


def totals(rewards: Scores) -> Tensor:
    """Sum the rewards of each answer's tokens: ``[P, n]``."""
    return torch.stack([torch.stack([r.sum() for r in answers]) for answers in rewards])
