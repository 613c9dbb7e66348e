"""Losses that raise a reward of the policy's own answers: one function per ``align``, all in ``POLICY_LOSSES``.

Dimensions: N answer tokens, S answers, n answers per prompt, P prompts, so that S = P·n.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from irlfast import ops
from irlfast.data.packing import Batch
from irlfast.losses.inputs import Metrics, Normalisers, arguments, per_sequence
from irlfast.ops import Head


class SampledAnswers(NamedTuple):
    """Answers that the policy sampled, with the log-probability and the advantage of each token."""

    token_logps: Tensor  # [N] log π(y_t), which carries the gradient
    old_logps: Tensor  # [N] log π_old(y_t) of the policy that sampled the answers
    cu_seqlens: Tensor  # [S + 1]
    advantages: Tensor  # [N] A_t; the same for all tokens of an answer where its reward is not split among them
    n: int
    beta: float
    clip_range: float


def rloo(x: SampledAnswers) -> Tensor:
    """Return −Σ_t A_t·log π(y_t) (arXiv 2402.14740, eq. 7): the gradient is unbiased at the policy that sampled."""
    return per_sequence(-x.advantages * x.token_logps, x.cu_seqlens)


def ppo(x: SampledAnswers) -> Tensor:
    """Return −Σ_t min(r_t·A_t, clip(r_t, 1 ± ``clip_range``)·A_t), r_t = π(y_t)/π_old(y_t) (arXiv 1707.06347, eq. 7).

    At the policy that sampled, the gradient is that of :func:`rloo`.
    """
    return per_sequence(clipped(x.token_logps - x.old_logps, x.advantages, x.clip_range), x.cu_seqlens)


def grpo(x: SampledAnswers) -> Tensor:
    """Return :func:`ppo`'s loss per token of the answer (GRPO, arXiv 2402.03300, eq. 3, without its KL)."""
    return ppo(x) / x.cu_seqlens.diff()


def clipped(change: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Return PPO's loss ``[N]`` of each token, from log r_t and A_t."""
    ratio = change.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def apa(x: SampledAnswers) -> Tensor:
    """Return β/2·(ρ − A/β − mean over the prompt's answers)², ρ = log π(y)/π_old(y) (arXiv 2306.02231, eq. 4).

    The mean stands for the log of the normaliser, which is unknown. The loss is least at π ∝ π_old·exp(A/β).
    All tokens of an answer have its advantage A.
    """
    advantages = x.advantages[x.cu_seqlens[:-1]]  # [S]
    gap = (per_sequence(x.token_logps - x.old_logps, x.cu_seqlens) - advantages / x.beta).view(-1, x.n)  # [P, n]
    return x.beta / 2 * (gap - gap.mean(1, keepdim=True)).flatten() ** 2


def weighted_kl(result: ops.LogRatio, batch: Batch) -> Tensor:
    """Return ρ²/2 ``[S]`` of each answer, ρ = log π(y)/π_ref(y), with the gradient Σ_t w_t·ρ·∇log π(y_t)."""
    assert batch.weights is not None and batch.ref_logps is not None
    weighted = per_sequence(batch.weights * (result.token_logps - batch.ref_logps), batch.cu_seqlens)
    ratio = result.log_ratio.detach()
    return ratio**2 / 2 + ratio * (weighted - weighted.detach())


class PolicyLoss(NamedTuple):
    """A policy loss, and how a round of alignment prepares the answers for it."""

    loss: Callable[[SampledAnswers], Tensor] | None  # [S], a loss per answer; None: SFT on the best answer alone
    paper: str
    has_own_kl: bool = False  # the loss holds the policy to the one that sampled; the KL to π_ref is in the reward
    leave_one_out: bool = True  # the baseline of an answer is the mean of the other answers, not of all
    divides_by_std: bool = False  # advantages are divided by the standard deviation of the prompt's answers


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "rloo": PolicyLoss(rloo, "RLOO, arXiv 2402.14740, eq. 7 and 8"),
    "ppo": PolicyLoss(ppo, "PPO, arXiv 1707.06347, eq. 7, with RLOO's advantages"),
    "grpo": PolicyLoss(grpo, "GRPO, arXiv 2402.03300, eq. 3", leave_one_out=False, divides_by_std=True),
    "apa": PolicyLoss(apa, "APA, arXiv 2306.02231, eq. 4", has_own_kl=True, leave_one_out=False),
    "bon": PolicyLoss(None, "SFT on the best of n, Inverse-RLignment, arXiv 2405.15624"),
}


def align_loss(
    hidden: Tensor,
    head: Head,
    batch: Batch,
    normalisers: Normalisers,
    *,
    align: str,
    answers: int,
    beta: float,
    kl_in_loss: bool,
    clip_range: float,
) -> tuple[Tensor, Metrics]:
    """Compute the mean of a policy loss over n ``answers`` to each prompt, all sampled by the policy.

    ``kl_in_loss`` adds β/2·(log π(y)/π_ref(y))² per answer. At the policy that sampled, its gradient is that of
    β·KL(π‖π_ref).

    Where the batch has importance weights w, the gradient of log π(y_t) has the factor w_t in both parts.
    """
    result = ops.log_ratio(hidden, **arguments(head, batch), ref_logps=batch.ref_logps)
    loss_of = POLICY_LOSSES[align].loss
    assert loss_of and batch.advantages is not None and batch.old_logps is not None
    sampled = SampledAnswers(
        token_logps=result.token_logps,
        old_logps=batch.old_logps,
        cu_seqlens=batch.cu_seqlens,
        advantages=batch.advantages if batch.weights is None else batch.weights * batch.advantages,
        n=answers,
        beta=beta,
        clip_range=clip_range,
    )
    losses = loss_of(sampled)
    if kl_in_loss:
        losses = losses + beta * (result.log_ratio**2 / 2 if batch.weights is None else weighted_kl(result, batch))
    loss = losses.sum() / (normalisers.pairs * answers)
    lengths = batch.cu_seqlens.diff()
    metrics = {
        "count": lengths.new_full((), len(lengths) // answers),
        "loss": loss.detach() * normalisers.pairs,
        "logps/synthetic": result.policy_logps.detach().sum() / answers,
        "length/synthetic": lengths.sum() / answers,
    }
    if batch.ref_logps is not None:
        metrics["kl"] = result.log_ratio.detach().sum() / answers
    return loss, metrics
