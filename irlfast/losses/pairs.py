"""The loss of pairs (expert, synthetic), from a policy's log-ratios."""

from collections.abc import Sequence

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
    loss_type: str | Sequence[str],
    nll_weight: float,
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
) -> tuple[Tensor, Metrics]:
    """Compute the inner loss of IRFT (arXiv 2405.17888) on pairs (y, ỹ).

    ``loss_type`` names the loss of ρ(y) and ρ(ỹ) (:data:`irlfast.ops.pair_loss.losses.PAIR_LOSSES`), or several for a
    mixture; ``sigmoid`` is SPIN's (arXiv 2401.01335, eq. 4.7). ``nll_weight`` adds the mean of −log π(y_t) over the
    experts' tokens, with this weight. The other options are those of :func:`irlfast.ops.pair_loss`.
    """
    result = ops.pair_loss(
        hidden,
        **arguments(head, batch),
        ref_logps=batch.ref_logps,
        beta=beta,
        loss_type=loss_type,
        nll_weight=nll_weight,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        num_pairs=normalisers.pairs,
        num_tokens=normalisers.tokens,
    )
    rewards, logps, lengths = beta * result.log_ratio, result.policy_logps, batch.cu_seqlens.diff()
    chosen, rejected = rewards[0::2], rewards[1::2]
    pairs = chosen.numel()
    metrics = {
        "count": lengths.new_full((), pairs),
        "loss": result.loss.detach() * normalisers.pairs,
        "nll_loss": result.nll_loss.detach() * normalisers.pairs,
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
    return result.loss, metrics
