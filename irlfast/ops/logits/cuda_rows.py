"""Log-probabilities from rows of logits by ``csrc/cuda``, their gradients, and their sums per sequence.

The functions take and return the same as those of ``kernels/logits.py``.
"""

import torch
from torch import Tensor

from irlfast import native
from irlfast.native import name, rows, scoring, stream


def token_logps(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    ref_logits: Tensor | None,  # [N, V]
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    targets = targets.long().contiguous()
    logps, lse = (torch.empty(len(targets), dtype=torch.float32, device=logits.device) for _ in range(2))
    ref_logps = None if ref_logits is None else torch.empty_like(logps)
    native.cuda.token_logps(
        rows(logits),
        (0, "float32", 0) if ref_logits is None else rows(ref_logits),
        scoring(logits, targets, scale, softcap),
        logps.data_ptr(),
        lse.data_ptr(),
        0 if ref_logps is None else ref_logps.data_ptr(),
        stream(logits.device),
    )
    return logps, lse, ref_logps


def write_gradient(
    grad: Tensor,  # [N, V], written; may be logits
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    lse: Tensor,  # [N]
    upstream: Tensor,  # [N] fp32
    scale: float,
    softcap: float | None,
) -> None:
    targets, upstream = targets.long().contiguous(), upstream.contiguous()
    native.cuda.write_gradient(
        rows(grad),
        rows(logits),
        scoring(logits, targets, scale, softcap),
        lse.data_ptr(),
        upstream.data_ptr(),
        stream(logits.device),
    )


def sequence_sums(
    logps: Tensor,  # [N] fp32
    targets: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S + 1]
    ref_logps: Tensor | None,  # [N] or [S]; a size that is both is per token
) -> Tensor:
    logps, targets = logps.contiguous(), targets.long().contiguous()
    cu_seqlens = cu_seqlens.clamp(0, logps.numel()).contiguous()
    if ref_logps is not None:
        ref_logps = (ref_logps if ref_logps.dtype == torch.float64 else ref_logps.float()).contiguous()
    sequences = cu_seqlens.numel() - 1
    sums = torch.empty(3, sequences, dtype=torch.float32, device=logps.device)
    native.cuda.sequence_sums(
        *(logps.data_ptr(), targets.data_ptr(), cu_seqlens.data_ptr(), sequences),
        *((0, "float32") if ref_logps is None else (ref_logps.data_ptr(), name(ref_logps.dtype))),
        ref_logps is not None and ref_logps.numel() == logps.numel(),
        sums.data_ptr(),
        stream(logps.device),
    )
    return sums
