"""The loss of pairs (expert, synthetic), from a policy's log-ratios."""

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
    loss_type: str,
    nll_weight: float,
) -> tuple[Tensor, Metrics]:
    """Compute the inner loss of IRFT (arXiv 2405.17888) on pairs (y, ỹ).

    It is a loss of u = β·(ρ(y) − ρ(ỹ)), named by ``loss_type`` (:data:`irlfast.ops.pair_loss.losses.PAIR_LOSSES`); with
    ``sigmoid`` it is SPIN's (arXiv 2401.01335, eq. 4.7). ``nll_weight`` adds the mean of −log π(y_t) over the experts'
    tokens, with this weight.
    """
    result = ops.pair_loss(
        hidden,
        **arguments(head, batch),
        ref_logps=batch.ref_logps,
        beta=beta,
        loss_type=loss_type,
        nll_weight=nll_weight,
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
