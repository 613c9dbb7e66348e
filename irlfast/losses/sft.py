"""Maximum likelihood of the demonstrations."""

import torch
from torch import Tensor

from irlfast import ops
from irlfast.data.packing import Batch
from irlfast.losses.inputs import Metrics, Normalisers, arguments
from irlfast.ops import Head


def sft_loss(
    hidden: Tensor, head: Head, batch: Batch, normalisers: Normalisers, *, remaining: bool = False
) -> tuple[Tensor, Metrics]:
    """Compute the mean of −log π(y_t) over the step's answer tokens: the forward KL to the expert.

    ``remaining`` makes it the forward KL of states and actions (Inverse-RLignment, arXiv 2405.15624): token k of T,
    counted from 0, has the weight (T − k)/T, because all later states are reached through it.
    """
    result = ops.log_ratio(hidden, **arguments(head, batch))
    logps, lengths = result.policy_logps, batch.cu_seqlens.diff()
    loss = -logps.sum() / normalisers.tokens
    if remaining:
        size = len(batch.targets)
        ends, whole = (x.repeat_interleave(lengths, output_size=size) for x in (batch.cu_seqlens[1:], lengths))
        left = ends - torch.arange(size, dtype=torch.int64, device=hidden.device)
        loss = -(result.token_logps * left / whole).sum() / normalisers.tokens
    metrics = {
        "count": lengths.new_full((), lengths.numel()),
        "loss": loss.detach() * normalisers.pairs,
        "logps/chosen": logps.detach().sum(),
        "length/chosen": lengths.sum(),
    }
    return loss, metrics
