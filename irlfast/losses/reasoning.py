"""Losses that teach a policy to think before it answers, where only the answer is demonstrated.

A thought z ~ π(z|x) is a latent variable, and y* the demonstration. Each value of ``thought_reward`` is an objective of
n thoughts per prompt. Its gradient has two parts: the policy gradient of log π(z_i|x), and that of log π(y*|x, z_i).
:data:`THOUGHT_REWARDS` gives the weights of both.

Dimensions: N tokens, P prompts, n thoughts per prompt, S = P·n.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from irlfast import ops
from irlfast.data.packing import Batch
from irlfast.losses.inputs import Metrics, Normalisers, arguments, per_sequence
from irlfast.ops import Head
from irlfast.ops.common.sequences import sequence_ids

Weights = tuple[Tensor, Tensor]  # [P, n] each: of the thoughts' and of the answers' log-probabilities


def logprob(logps: Tensor) -> Weights:
    """Return the weights for E_z[log π(y*|x,z)], from log π(y*|x,z) ``[P, n]``.

    This is the log-probability reward of arXiv 2602.03979, and the bound of JEPO with one sample (arXiv 2503.19618,
    eq. 3 and 5). It is at most log π(y*|x), by Jensen's inequality.
    """
    return leave_one_out(logps) / logps.shape[1], torch.full_like(logps, 1 / logps.shape[1])


def prob(logps: Tensor) -> Weights:
    """Return the weights for E_z[π(y*|x,z)]: VeriFree (arXiv 2505.21493, eq. 4 and 7).

    It is the probability that a sampled answer is exactly y*.
    """
    probabilities = logps.exp()
    return leave_one_out(probabilities) / logps.shape[1], probabilities / logps.shape[1]


def jensen(logps: Tensor) -> Weights:
    """Return the weights for E[log 1/n Σ_i π(y*|x,z_i)]: JEPO with n samples (arXiv 2503.19618, eq. 6 and 7).

    The bound of log π(y*|x) is tighter than that of :func:`logprob`. The baseline of a thought is the same bound from
    the other n − 1 thoughts.
    """
    n = logps.shape[1]
    itself = torch.eye(n, dtype=torch.bool, device=logps.device)
    others = logps[:, None, :].expand(-1, n, -1).masked_fill(itself, -math.inf).logsumexp(2) - math.log(n - 1)
    return logps.logsumexp(1, keepdim=True) - math.log(n) - others, logps.softmax(1)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Subtract from rewards ``[P, n]`` the mean of the prompt's other rewards (arXiv 2402.14740, eq. 8)."""
    n = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (n / (n - 1))


THOUGHT_REWARDS: dict[str, Callable[[Tensor], Weights]] = {"logprob": logprob, "prob": prob, "jensen": jensen}


def reasoning_loss(
    hidden: Tensor, head: Head, batch: Batch, normalisers: Normalisers, *, reward: str, thoughts: int
) -> tuple[Tensor, Metrics]:
    """Compute −Σ_i (a_i·log π(z_i|x) + w_i·log π(y*|x,z_i)), the mean over prompts, with weights of ``reward``.

    The batch has n = ``thoughts`` sequences per prompt, each a thought and y*; ``batch.thoughts`` has the lengths of
    the thoughts. The weights follow the policy's own log-probabilities of this step, so that at the policy that sampled
    the thoughts, the expected gradient is that of the objective.
    """
    result = ops.log_ratio(hidden, **arguments(head, batch))
    assert batch.thoughts is not None
    owner = sequence_ids(batch.cu_seqlens, len(batch.targets))
    place = torch.arange(len(owner), dtype=torch.int64, device=owner.device) - batch.cu_seqlens[owner]
    thought = result.token_logps * (place < batch.thoughts[owner])  # [N]
    thought_logps = per_sequence(thought, batch.cu_seqlens).view(-1, thoughts)  # [P, n]
    answer_logps = per_sequence(result.token_logps - thought, batch.cu_seqlens).view(-1, thoughts)
    known = answer_logps.detach()
    advantages, weights = THOUGHT_REWARDS[reward](known)
    loss = -(advantages * thought_logps + weights * answer_logps).sum() / normalisers.pairs
    lengths = batch.cu_seqlens.diff()
    metrics = {
        "count": lengths.new_full((), len(known)),
        "loss": loss.detach() * normalisers.pairs,
        "logps/chosen": known.mean(1).sum(),
        "logps/chosen_tighter": (known.logsumexp(1) - math.log(thoughts)).sum(),
        "logps/thought": thought_logps.detach().mean(1).sum(),
        "length/thought": batch.thoughts.sum() / thoughts,
        "length/chosen": (lengths - batch.thoughts).sum() / thoughts,
    }
    return loss, metrics
