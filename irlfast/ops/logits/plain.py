"""Log-probabilities from logits in plain PyTorch, by several ``[N, V]`` tensors: the oracle of other backends."""

import torch
from torch import Tensor

from irlfast.ops.common.types import IGNORE


def token_logps(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Log-probabilities ``[N]`` of the targets, 0 where skipped."""
    scored = (targets != IGNORE).nonzero().flatten()
    logps = final_logits(logits[scored], scale, softcap).log_softmax(-1)
    picked = logps.gather(1, targets[scored, None].long()).squeeze(1)
    return picked.new_zeros(targets.shape).index_put((scored,), picked)


def token_statistics(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets, entropies and log-sum-exps, each ``[N]``, 0 where skipped."""
    scored = (targets != IGNORE).nonzero().flatten()
    z = final_logits(logits[scored], scale, softcap)
    logps = z.log_softmax(-1)
    picked = logps.gather(1, targets[scored, None].long()).squeeze(1)
    values = picked, -(logps.exp() * logps).sum(-1), z.logsumexp(-1)
    picked, entropies, lses = (x.new_zeros(targets.shape).index_put((scored,), x) for x in values)
    return picked, entropies, lses


def final_logits(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``softcap(scale · logits)`` in fp32 (fp64)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)
