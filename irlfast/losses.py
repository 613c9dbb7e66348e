"""Losses of a batch: what a method optimises, on hidden states, through ``irlfast.ops``.

Each returns its share of a step's loss, and figures for the log: sums over segments, which the engine divides by their
``count``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast import ops
from irlfast.ops import Head
from irlfast.ops.problem import sequence_of
from irlfast.pack import Batch


class Share(NamedTuple):
    """What a micro-batch's sums are divided by: a step's segments and expert tokens, over its processes."""

    pairs: float
    tokens: float


Figures = dict[str, Tensor]
Loss = Callable[[Tensor, Head, Batch, Share], tuple[Tensor, Figures]]


def arguments(head: Head, batch: Batch) -> dict[str, Any]:
    return {
        "weight": head.weight,
        "bias": head.bias,
        "logit_scale": head.logit_scale,
        "logit_softcap": head.logit_softcap,
        "targets": batch.targets,
        "cu_seqlens": batch.cu_seqlens,
        "rows": batch.rows,
    }


def sft_loss(
    hidden: Tensor, head: Head, batch: Batch, share: Share, *, remaining: bool = False
) -> tuple[Tensor, Figures]:
    """Mean over the step's answer tokens of −log π(y): forward KL to the expert.

    With ``remaining``, that of states and actions (Inverse-RLignment): token k of T, from 0, weighs (T − k)/T, for all
    states after it are reached through it.
    """
    result = ops.log_ratio(hidden, **arguments(head, batch))
    logps, lengths = result.policy_logps, batch.cu_seqlens.diff()
    loss = -logps.sum() / share.tokens
    if remaining:
        size = len(batch.targets)
        ends, whole = (x.repeat_interleave(lengths, output_size=size) for x in (batch.cu_seqlens[1:], lengths))
        left = ends - torch.arange(size, device=hidden.device)
        loss = -(result.token_logps * left / whole).sum() / share.tokens
    figures = {
        "count": lengths.new_full((), lengths.numel()),
        "loss": loss.detach() * share.pairs,
        "logps/chosen": logps.detach().sum(),
        "length/chosen": lengths.sum(),
    }
    return loss, figures


def irft_loss(
    hidden: Tensor, head: Head, batch: Batch, share: Share, *, beta: float, loss_type: str, nll_weight: float
) -> tuple[Tensor, Figures]:
    """IRFT's inner loss (arXiv 2405.17888; SPIN, arXiv 2401.01335, eq. 4.7, with ``sigmoid``) on pairs (y, ỹ)."""
    result = ops.pair_loss(
        hidden,
        **arguments(head, batch),
        ref_logps=batch.ref_logps,
        beta=beta,
        loss_type=loss_type,
        nll_weight=nll_weight,
        num_pairs=share.pairs,
        num_tokens=share.tokens,
    )
    rewards, logps, lengths = beta * result.log_ratio, result.policy_logps, batch.cu_seqlens.diff()
    chosen, rejected = rewards[0::2], rewards[1::2]
    pairs = chosen.numel()
    figures = {
        "count": lengths.new_full((), pairs),
        "loss": result.loss.detach() * share.pairs,
        "nll_loss": result.nll_loss.detach() * share.pairs,
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).sum(),
        "logps/chosen": logps[0::2].sum(),
        "logps/rejected": logps[1::2].sum(),
        "logps/reference": result.ref_logps[0::2].sum(),
        "length/chosen": lengths[0::2].sum(),
        "length/rejected": lengths[1::2].sum(),
    }
    return result.loss, figures


def reward_loss(
    hidden: Tensor,
    head: Head,
    batch: Batch,
    share: Share,
    *,
    kind: str,
    level: str,
    alpha: float,
    regularization: float,
) -> tuple[Tensor, Figures]:
    """Loss of a reward model's M heads on pairs (expert, synthetic), the mean over heads (DESIGN §3, RFT and AfD).

    ``kind``: ``linear`` is −(r(y) − r(ỹ)) + λ·(r(y)² + r(ỹ)²), λ the ``regularization``; the others are those of
    :func:`irlfast.ops.discriminator_loss`. At ``level`` "token" a mean is over the tokens of a micro-batch.
    """
    options: dict[str, Any] = {
        "rows": batch.rows,
        "bias": head.bias,
        "pooling": "token" if level == "token" else "last",
    }
    pairs = (len(batch.cu_seqlens) - 1) // 2
    if kind == "linear":
        logits = ops.reward_head(hidden, head.weight, batch.cu_seqlens, **options)
        expert, synthetic = logits[0::2], logits[1::2]
        terms = synthetic - expert + regularization * (expert**2 + synthetic**2)
        loss = terms.sum() / max(terms.numel(), 1)
    else:
        labels = torch.arange(2 * pairs, device=hidden.device) % 2 == 0
        loss, logits, _ = ops.discriminator_loss(
            hidden,
            head.weight,
            batch.cu_seqlens,
            labels,
            kind=kind,
            alpha=alpha,
            **options,
        )
    loss = loss * (pairs / share.pairs)
    rewards = logits.detach().mean(1)
    if level == "token":
        rewards = per_sequence(rewards, batch.cu_seqlens)
    chosen, rejected = rewards[0::2], rewards[1::2]
    figures = {
        "count": batch.cu_seqlens.new_full((), pairs),
        "loss": loss.detach() * share.pairs,
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).sum(),
    }
    return loss, figures


def align_loss(
    hidden: Tensor,
    head: Head,
    batch: Batch,
    share: Share,
    *,
    align: str,
    answers: int,
    beta: float,
    kl_in_loss: bool,
    clip_range: float,
) -> tuple[Tensor, Figures]:
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
    loss = losses.sum() / (share.pairs * answers)
    figures = {
        "count": lengths.new_full((), len(lengths) // answers),
        "loss": loss.detach() * share.pairs,
        "logps/synthetic": logps.detach().sum() / answers,
        "length/synthetic": lengths.sum() / answers,
    }
    if batch.ref_logps is not None:
        figures["kl"] = result.log_ratio.detach().sum() / answers
    return loss, figures


def clipped(change: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's loss ``[N]`` of every token."""
    ratio = change.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def per_sequence(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums ``[S]`` of values ``[N]``."""
    return values.new_zeros(len(cu_seqlens) - 1).index_add(0, sequence_of(cu_seqlens, len(values)), values)
