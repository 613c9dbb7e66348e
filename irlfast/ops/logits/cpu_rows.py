"""Log-probabilities from rows of logits on a CPU, and their gradients.

``irlfast._cpu``, where installation built it, takes fp32 and bf16 and makes no tensor of logits. PyTorch takes the
other dtypes, a few rows at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from irlfast import native
from irlfast.ops.common.types import IGNORE
from irlfast.ops.logits.plain import final_logits

CHUNK_BYTES = 2**22  # the most memory for logits in fp32 at once


def token_logps(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    ref_logits: Tensor | None,  # [N, V]
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities ``[N]``, 0 where skipped; log-sum-exps ``[N]``, or none by PyTorch; the reference's ``[N]``."""
    logps, lse = score(logits, targets, scale, softcap)
    return logps, lse, None if ref_logits is None else score(ref_logits, targets, scale, softcap)[0].to(logps.dtype)


def write_gradient(
    grad: Tensor,  # [N, V], written; may be logits
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    lse: Tensor,  # [N] fp32, or [0] by PyTorch
    upstream: Tensor,  # [N] fp32 (fp64)
    scale: float,
    softcap: float | None,
) -> None:
    """``upstream · ∂ log-probability / ∂ logits``, rows of zeros where the target is skipped or ``upstream`` is 0."""
    if lse.numel():
        native_write_gradient(grad, logits, targets, lse, upstream, scale, softcap)
    else:
        write_gradient_by_chunks(grad, logits, targets, upstream, scale, softcap)


def is_native(logits: Tensor) -> bool:
    """Return whether ``irlfast._cpu`` takes these logits."""
    return native.cpu is not None and logits.dtype in (torch.float32, torch.bfloat16)


def score(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[N]``, and log-sum-exps ``[N]``, or none by PyTorch."""
    if is_native(logits):
        return native_token_logps(logits, targets, scale, softcap)
    logps = token_logps_by_chunks(logits, targets, scale, softcap)
    return logps, logps.new_empty(0)


# ---------------------------------------------------------------- by irlfast._cpu


def native_token_logps(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    targets = targets.long().contiguous()
    logps, lse = (torch.empty(len(targets), dtype=torch.float32, device=logits.device) for _ in range(2))
    scoring = native.scoring(logits, targets, scale, softcap)
    native.cpu.token_logps(native.rows(logits), scoring, logps.data_ptr(), lse.data_ptr(), torch.get_num_threads())
    return logps, lse


def native_write_gradient(
    grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, upstream: Tensor, scale: float, softcap: float | None
) -> None:
    targets, upstream = targets.long().contiguous(), upstream.contiguous()
    native.cpu.write_gradient(
        native.rows(grad),
        native.rows(logits),
        native.scoring(logits, targets, scale, softcap),
        lse.data_ptr(),
        upstream.data_ptr(),
        torch.get_num_threads(),
    )


# ---------------------------------------------------------------- by PyTorch


def chunks(rows: Tensor, logits: Tensor) -> Sequence[Tensor]:
    return torch.split(rows, max(1, CHUNK_BYTES // (4 * logits.shape[1])))


def token_logps_by_chunks(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    logps = logits.new_zeros(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    for rows in chunks((targets != IGNORE).nonzero().flatten(), logits):
        z = final_logits(logits[rows], scale, softcap)
        logps[rows] = z.log_softmax(-1).gather(1, targets[rows, None].long()).squeeze(1).to(logps.dtype)
    return logps


def write_gradient_by_chunks(
    grad: Tensor, logits: Tensor, targets: Tensor, upstream: Tensor, scale: float, softcap: float | None
) -> None:
    wanted = (targets != IGNORE) & (upstream != 0)
    grad.index_fill_(0, (~wanted).nonzero().flatten(), 0)  # a product with 0 would keep the NaN of a skipped row
    for rows in chunks(wanted.nonzero().flatten(), logits):
        z = final_logits(logits[rows], scale, softcap)
        slope = z.softmax(-1).neg_()
        slope[torch.arange(len(rows), dtype=torch.int64, device=rows.device), targets[rows].long()] += 1
        if softcap is not None:
            slope *= 1 - (z / softcap) ** 2
        grad[rows] = slope.mul_(scale * upstream[rows, None]).to(grad.dtype)
