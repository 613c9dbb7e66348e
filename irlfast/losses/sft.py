"""Losses on the demonstrations' own tokens: one function per ``sft_loss_type``, all in ``SFT_LOSSES``.

Dimensions: N tokens that are learned, S demonstrations.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from irlfast import ops
from irlfast.data.packing import Batch
from irlfast.losses.inputs import Metrics, Normalisers, Teacher, arguments, arguments_of_both, per_sequence
from irlfast.losses.policy import clipped
from irlfast.ops import Head

MAX_IMPORTANCE_WEIGHT = 16.0  # of iw_sft, in its authors' code


class ExpertTokens(NamedTuple):
    """The demonstrations' tokens, with their log-probabilities, and the options of the losses."""

    logps: Tensor  # [N] log π(y_t), which carries the gradient
    ref_logps: Tensor | None  # [N] log π_ref(y_t)
    taught: Tensor | None  # [N], see SftLoss.teacher
    cu_seqlens: Tensor  # [S + 1]
    clip_range: float
    kl_weight: float


Values = dict[str, Tensor]  # [N] each, values of every token whose means are logged


def nll(x: ExpertTokens) -> tuple[Tensor, Values]:
    """Return −log π(y_t): the forward KL to the expert."""
    return -x.logps, {}


def dft(x: ExpertTokens) -> tuple[Tensor, Values]:
    """Return −sg(π(y_t))·log π(y_t), where sg stops the gradient (arXiv 2508.05629, eq. 9; TRL's ``dft``).

    The gradient is −∇π(y_t): the policy gradient with a reward of 1 for the expert's token.
    """
    weights = x.logps.detach().exp()
    return -weights * x.logps, {"weight": weights}


def psft(x: ExpertTokens) -> tuple[Tensor, Values]:
    """Return −min(r_t, 1 + ``clip_range``), r_t = π(y_t)/π_old(y_t) (arXiv 2508.17784).

    This is PPO's loss with the advantage 1. A token whose probability is more than 1 + ``clip_range`` times that under
    π_old, the policy of some steps before, has no gradient. At π_old the gradient is that of ``nll``.
    """
    assert x.taught is not None
    losses = clipped(x.logps - x.taught, torch.ones_like(x.logps), x.clip_range)
    return losses, {"clip_ratio": (x.logps - x.taught).detach().exp() > 1 + x.clip_range}


def asft(x: ExpertTokens) -> tuple[Tensor, Values]:
    """Return DFT's loss plus ``kl_weight``·KL(π ‖ π_ref) of the next token's distributions (arXiv 2509.23753)."""
    assert x.taught is not None
    losses, values = dft(x)
    return losses + x.kl_weight * x.taught, values | {"kl_per_token": x.taught}


def iw_sft(x: ExpertTokens) -> tuple[Tensor, Values]:
    """Return −w(y)·log π(y_t), w = sg(exp(mean_t(log π(y_t) − log π_ref(y_t)))), at most 16 (arXiv 2507.12856).

    The paper weighs a demonstration by q(y)/π_ref(y). As in its authors' code, q is the policy of this step, the ratio
    is its geometric mean over the tokens, and π_ref is the policy before training.
    """
    assert x.ref_logps is not None
    lengths = x.cu_seqlens.diff()
    means = per_sequence(x.logps.detach() - x.ref_logps, x.cu_seqlens) / lengths  # [S]
    weights = means.exp().clamp(max=MAX_IMPORTANCE_WEIGHT).repeat_interleave(lengths, output_size=len(x.logps))
    return -weights * x.logps, {"weight": weights}


def teacher_logps(hidden: Tensor, head: Head, batch: Batch, teacher: Teacher) -> Tensor:
    """Return the log-probabilities ``[N]`` of the tokens under the teacher."""
    return ops.log_ratio(teacher.hidden, **arguments(teacher.head, batch._replace(rows=teacher.rows))).token_logps


def kl_to_teacher(hidden: Tensor, head: Head, batch: Batch, teacher: Teacher) -> Tensor:
    """Return KL(π ‖ teacher) ``[N]`` of the next token's distributions, over the whole vocabulary."""
    return ops.token_divergence(hidden, **arguments_of_both(head, batch, teacher), kind="reverse_kl")


class SftLoss(NamedTuple):
    """A loss on the demonstrations' tokens, and what it needs beside the policy."""

    loss: Callable[[ExpertTokens], tuple[Tensor, Values]]  # a loss [N] per token, and values to log
    paper: str
    scores_reference: bool = False  # the policy before training scores the demonstrations once
    teacher: Callable[[Tensor, Head, Batch, Teacher], Tensor] | None = None  # [N], what the loss needs of a teacher


SFT_LOSSES: dict[str, SftLoss] = {
    "nll": SftLoss(nll, "maximum likelihood"),
    "dft": SftLoss(dft, "DFT, arXiv 2508.05629, eq. 9"),
    "psft": SftLoss(psft, "PSFT, arXiv 2508.17784", teacher=teacher_logps),
    "asft": SftLoss(asft, "ASFT, arXiv 2509.23753", teacher=kl_to_teacher),
    "iw_sft": SftLoss(iw_sft, "iw-SFT, arXiv 2507.12856", scores_reference=True),
}


def sft_loss(
    hidden: Tensor,
    head: Head,
    batch: Batch,
    normalisers: Normalisers,
    *,
    loss_type: str = "nll",
    remaining: bool = False,
    clip_range: float = 0.2,
    kl_weight: float = 0.1,
    teacher: Teacher | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute the mean of a loss over the step's answer tokens.

    ``remaining`` weighs token k of T, counted from 0, by (T − k)/T, because all later states are reached through it:
    with ``nll``, the forward KL of states and actions (Inverse-RLignment, arXiv 2405.15624). The ``teacher`` is π_old
    in ``psft``, and π_ref in ``asft``.
    """
    result, kind = ops.log_ratio(hidden, **arguments(head, batch)), SFT_LOSSES[loss_type]
    taught = kind.teacher(hidden, head, batch, teacher) if kind.teacher and teacher else None
    tokens = ExpertTokens(result.token_logps, batch.ref_logps, taught, batch.cu_seqlens, clip_range, kl_weight)
    losses, values = kind.loss(tokens)
    if remaining:
        losses = losses * remaining_shares(batch.cu_seqlens, len(losses))
    loss = losses.sum() / normalisers.tokens
    values |= {"loss": losses, "nll_loss": -result.token_logps}
    lengths = batch.cu_seqlens.diff()
    metrics = {name: value.detach().sum() * normalisers.pairs / normalisers.tokens for name, value in values.items()}
    metrics |= {
        "count": lengths.new_full((), lengths.numel()),
        "logps/chosen": result.policy_logps.detach().sum(),
        "length/chosen": lengths.sum(),
    }
    return loss, metrics


def remaining_shares(cu_seqlens: Tensor, size: int) -> Tensor:
    """Return (T − k)/T ``[N]`` of token k of each answer of T tokens, N = ``size``."""
    lengths = cu_seqlens.diff()
    ends, whole = (x.repeat_interleave(lengths, output_size=size) for x in (cu_seqlens[1:], lengths))
    return (ends - torch.arange(size, dtype=torch.int64, device=cu_seqlens.device)) / whole
