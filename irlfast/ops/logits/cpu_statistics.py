"""Log-probability, entropy and log-sum-exp of rows of logits on a CPU by PyTorch, and their gradient."""

import torch
from torch import Tensor

from irlfast.ops.common.types import IGNORE
from irlfast.ops.logits.cpu_rows import chunks
from irlfast.ops.logits.plain import final_logits


def token_statistics(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and log-sum-exps, each ``[N]``, 0 where skipped."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logps, entropies, lses = (logits.new_zeros(targets.shape, dtype=dtype) for _ in range(3))
    for rows in chunks((targets != IGNORE).nonzero().flatten(), logits):
        z = final_logits(logits[rows], scale, softcap)
        lses[rows] = lse = z.logsumexp(1)
        log_p = z.sub_(lse[:, None])
        logps[rows] = log_p.gather(1, targets[rows, None].long()).squeeze(1)
        entropies[rows] = -(log_p.exp().mul_(log_p)).sum(1)
    return logps, entropies, lses


def write_gradient(
    grad: Tensor,  # [N, V], written; may be logits
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    lses: Tensor,  # [N]
    by_logp: Tensor,  # [N]
    by_all: Tensor,  # [N]
    by_entropy: Tensor,  # [N]
    scale: float,
    softcap: float | None,
) -> None:
    """Write the derivative by the logits: ``by_logp`` at the target, and p · (by_all − by_entropy · log p) at all.

    Rows are 0 where the target is skipped or all three factors are 0.
    """
    wanted = (targets != IGNORE) & ((by_logp != 0) | (by_all != 0) | (by_entropy != 0))
    grad.index_fill_(0, (~wanted).nonzero().flatten(), 0)  # a product with 0 would keep the NaN of a skipped row
    for rows in chunks(wanted.nonzero().flatten(), logits):
        z = final_logits(logits[rows], scale, softcap)
        log_p = z - lses[rows, None]
        slope = log_p.exp().mul_(by_all[rows, None] - by_entropy[rows, None] * log_p)
        slope[torch.arange(len(rows), dtype=torch.int64, device=rows.device), targets[rows].long()] += by_logp[rows]
        if softcap is not None:
            slope *= 1 - (z / softcap) ** 2
        grad[rows] = slope.mul_(scale).to(grad.dtype)
