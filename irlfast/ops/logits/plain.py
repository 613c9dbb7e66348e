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


def final_logits(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``softcap(scale · logits)`` in fp32 (fp64)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)
