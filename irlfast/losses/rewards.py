"""The losses of reward models, on pairs (expert, synthetic)."""

import torch
from torch import Tensor

from irlfast import ops
from irlfast.data.packing import Batch
from irlfast.losses.inputs import Metrics, Normalisers, per_sequence
from irlfast.ops import Head


def reward_loss(
    hidden: Tensor,
    head: Head,
    batch: Batch,
    normalisers: Normalisers,
    *,
    kind: str,
    level: str,
    alpha: float,
    regularization: float,
) -> tuple[Tensor, Metrics]:
    """Compute the loss of a reward model's M heads on pairs (expert, synthetic), averaged over heads.

    :func:`irlfast.ops.discriminator_loss` has the formula of every ``kind``. At ``level`` "token", a mean is over the
    tokens of a micro-batch.
    """
    pairs = (len(batch.cu_seqlens) - 1) // 2
    loss, logits, _ = ops.discriminator_loss(
        hidden,
        head.weight,
        batch.cu_seqlens,
        labels=torch.arange(2 * pairs, dtype=torch.int64, device=hidden.device) % 2 == 0,
        kind=kind,
        rows=batch.rows,
        bias=head.bias,
        pooling="token" if level == "token" else "last",
        alpha=alpha,
        regularization=regularization,
    )
    loss = loss * (pairs / normalisers.pairs)
    rewards = logits.detach().mean(1)
    if level == "token":
        rewards = per_sequence(rewards, batch.cu_seqlens)
    chosen, rejected = rewards[0::2], rewards[1::2]
    metrics = {
        "count": batch.cu_seqlens.new_full((), pairs),
        "loss": loss.detach() * normalisers.pairs,
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).sum(),
    }
    return loss, metrics
