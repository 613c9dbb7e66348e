"""Losses of a batch: what a method optimises, on hidden states, through ``irlfast.ops``.

Each returns its share of a step's loss, and figures for the log: sums over segments, which the engine divides by their
``count``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from irlfast import ops
from irlfast.ops import Head
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


def sft_loss(hidden: Tensor, head: Head, batch: Batch, share: Share) -> tuple[Tensor, Figures]:
    """Mean over the step's answer tokens of −log π(y): forward KL to the expert."""
    logps = ops.log_ratio(hidden, **arguments(head, batch)).policy_logps
    loss = -logps.sum() / share.tokens
    lengths = batch.cu_seqlens.diff()
    figures = {
        "count": lengths.new_tensor(lengths.numel()),
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
        "count": lengths.new_tensor(pairs),
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
