"""Maximum likelihood of the demonstrations."""

import torch
from torch import Tensor

from irlfast import ops
from irlfast.data.packing import Batch
from irlfast.losses.inputs import Figures, Share, arguments
from irlfast.ops import Head


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
