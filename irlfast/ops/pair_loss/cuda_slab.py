"""The kernels of ``csrc/cuda``: log-probabilities from logits, their gradients and sums, and the pair slab's softmax.

The functions on logits are those of ``kernels/logits.py``, which says what they return.
"""

import torch
from torch import Tensor

from irlfast import native
from irlfast.native import name, rows, scoring
from irlfast.ops.common.types import HeadInputs, ScoredTokens
from irlfast.ops.pair_loss import triton_slab


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
        native.stream(logits.device),
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
        native.stream(logits.device),
    )


def sequence_sums(
    logps: Tensor,  # [N] fp32
    targets: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S + 1]
    ref_logps: Tensor | None,  # [N] or [S]; a size that is both is per token
) -> Tensor:
    logps, targets, cu_seqlens = logps.contiguous(), targets.long().contiguous(), cu_seqlens.contiguous()
    if ref_logps is not None:
        ref_logps = (ref_logps if ref_logps.dtype == torch.float64 else ref_logps.float()).contiguous()
    sequences = cu_seqlens.numel() - 1
    sums = torch.empty(3, sequences, dtype=torch.float32, device=logps.device)
    native.cuda.sequence_sums(
        *(logps.data_ptr(), targets.data_ptr(), cu_seqlens.data_ptr(), sequences),
        *((0, "float32") if ref_logps is None else (ref_logps.data_ptr(), name(ref_logps.dtype))),
        ref_logps is not None and ref_logps.numel() == logps.numel(),
        sums.data_ptr(),
        native.stream(logps.device),
    )
    return sums


def softmax(
    z: Tensor, targets: Tensor, side: HeadInputs, scored: ScoredTokens, slopes: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives are in the memory of ``z``, in the precision of the products that take them."""
    logps = torch.empty(len(z), dtype=torch.float32, device=z.device)
    bias = None if side.bias is None else side.bias.float().contiguous()
    native.cuda.softmax_slopes(
        rows(z),
        name(side.weight.dtype),
        0 if bias is None else bias.data_ptr(),
        scoring(z, targets, scored.logit_scale, scored.logit_softcap),
        logps.data_ptr(),
        slopes,
        native.stream(z.device),
    )
    return logps, torch.ones_like(logps), z.view(side.weight.dtype)[:, : z.shape[1]]


KERNELS = triton_slab.KERNELS._replace(softmax=softmax, fused=None, sparse=None)
