"""The loss of pairs (expert, synthetic), from a policy's log-ratios."""

from typing import Any

import torch
from torch import Tensor

from irlfast import ops
from irlfast.data.packing import Batch
from irlfast.losses.inputs import Metrics, Normalisers, arguments
from irlfast.ops import Head


def irft_loss(
    hidden: Tensor,
    head: Head,
    batch: Batch,
    normalisers: Normalisers,
    *,
    beta: float,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Compute the inner loss of IRFT (arXiv 2405.17888) on pairs (y, ỹ).

    The options are those of :func:`irlfast.ops.pair_loss`: ``loss_type`` names the loss of ρ(y) and ρ(ỹ)
    (:data:`irlfast.ops.pair_loss.losses.PAIR_LOSSES`), or several for a mixture; ``sigmoid`` is SPIN's (arXiv
    2401.01335, eq. 4.7). ``nll_weight`` adds the mean of −log π(y_t) over the experts' tokens, with this weight.
    """
    result = ops.pair_loss(
        hidden,
        **arguments(head, batch),
        ref_logps=batch.ref_logps,
        beta=beta,
        num_pairs=normalisers.pairs,
        num_tokens=normalisers.tokens,
        **options,
    )
    return result.loss, pair_metrics(result, batch, normalisers, beta, answers=2) | {
        "logps/reference": result.ref_logps[0::2].sum()
    }


def t_spin_loss(
    hidden: Tensor,
    head: Head,
    batch: Batch,
    normalisers: Normalisers,
    *,
    beta: float,
    historical_weight: float,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Compute the loss of T-SPIN (arXiv 2601.08198, eq. 7) on triplets (y, ỹ, ỹ₀), without a reference.

    With ℓ(x) = −log σ(x), the paper's choice and the default ``loss_type``, the loss of a triplet is
    ℓ(β·(log π(y) − log π(ỹ))) + w·ℓ(β·(log π(ỹ) − log π(ỹ₀))), where w is ``historical_weight`` (the paper's β; its α
    is our β). With w = 0 the prompt groups are pairs (y, ỹ). The options are those of :func:`irlfast.ops.pair_loss`.
    """
    answers = 3 if historical_weight else 2
    experts = torch.arange(0, len(batch.cu_seqlens) - 1, answers, dtype=torch.int64, device=hidden.device)
    pairs = torch.stack([experts, experts + 1], 1)  # the current advantage, of y over ỹ
    weights = torch.ones(len(pairs), dtype=torch.float64, device=hidden.device)
    if historical_weight:
        pairs = torch.cat([pairs, pairs + 1])  # the historical advantage, of ỹ over ỹ₀
        weights = torch.cat([weights, historical_weight * weights])
    result = ops.pair_loss(
        hidden,
        **arguments(head, batch),
        pairs=pairs,
        pair_weights=weights,
        beta=beta,
        num_pairs=normalisers.pairs,
        **options,
    )
    metrics = pair_metrics(result, batch, normalisers, beta, answers)
    if historical_weight:
        metrics["logps/first"] = result.policy_logps[2::3].sum()
    return result.loss, metrics


def pair_metrics(result: ops.PairLoss, batch: Batch, normalisers: Normalisers, beta: float, answers: int) -> Metrics:
    """Return TRL's metrics of the first two of each prompt's ``answers``: the expert's, and the synthetic one."""
    rewards, logps, lengths = beta * result.log_ratio, result.policy_logps, batch.cu_seqlens.diff()
    chosen, rejected = rewards[0::answers], rewards[1::answers]
    return {
        "count": lengths.new_full((), chosen.numel()),
        "loss": result.loss.detach() * normalisers.pairs,
        "nll_loss": -logps[0::answers].sum() / normalisers.tokens * normalisers.pairs,
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).sum(),
        "logps/chosen": logps[0::answers].sum(),
        "logps/rejected": logps[1::answers].sum(),
        "length/chosen": lengths[0::answers].sum(),
        "length/rejected": lengths[1::answers].sum(),
    }
