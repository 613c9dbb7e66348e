"""Losses that raise a reward of the policy's own answers."""

import torch
from torch import Tensor

from irlfast import ops
from irlfast.data.packing import Batch
from irlfast.losses.inputs import Metrics, Normalisers, arguments, per_sequence
from irlfast.ops import Head


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
    """Loss of n ``answers`` to each prompt that the policy sampled, A their advantages (DESIGN §3, RFT); mean over all.

    - ``rloo``: −A·log π(y) (arXiv 2402.14740, eq. 7): the policy gradient, unbiased at the policy that sampled.
    - ``ppo``: −Σ_t min(r_t·A, clip(r_t, 1 ± ``clip_range``)·A), r_t = π(y_t)/π_old(y_t) (arXiv 1707.06347, eq. 7). It
      has the same gradient at the policy that sampled.
    - ``apa``: β/2·(ρ − A/β − their mean over the prompt's answers)², ρ = log π(y)/π_old(y) (arXiv 2306.02231, eq. 4;
      the mean stands for the log of the normaliser, which is not known): least at π ∝ π_old·exp(A/β).

    ``kl_in_loss`` adds β/2·(log π(y)/π_ref(y))², whose gradient at the policy that sampled is that of β·KL(π‖π_ref).
    """
    result = ops.log_ratio(hidden, **arguments(head, batch), ref_logps=batch.ref_logps)
    advantages, logps, lengths = batch.advantages, result.policy_logps, batch.cu_seqlens.diff()
    assert advantages is not None
    if align == "rloo":
        losses = -advantages * logps
    else:
        assert batch.old_logps is not None
        change = result.token_logps - batch.old_logps
        if align == "ppo":
            each = advantages.repeat_interleave(lengths, output_size=len(change))
            terms = clipped(change, each, clip_range)
            losses = per_sequence(terms, batch.cu_seqlens)
        else:
            gap = (per_sequence(change, batch.cu_seqlens) - advantages / beta).view(-1, answers)
            losses = beta / 2 * (gap - gap.mean(1, keepdim=True)).flatten() ** 2
    if kl_in_loss:
        losses = losses + beta / 2 * result.log_ratio**2
    loss = losses.sum() / (normalisers.pairs * answers)
    metrics = {
        "count": lengths.new_full((), len(lengths) // answers),
        "loss": loss.detach() * normalisers.pairs,
        "logps/synthetic": logps.detach().sum() / answers,
        "length/synthetic": lengths.sum() / answers,
    }
    if batch.ref_logps is not None:
        metrics["kl"] = result.log_ratio.detach().sum() / answers
    return loss, metrics


def clipped(change: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's loss ``[N]`` of every token."""
    ratio = change.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
