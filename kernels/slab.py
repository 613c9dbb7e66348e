"""The middle step of the pair slab: rows of logits become log-probabilities and their derivatives by the logits.

Bound by memory: a row is read twice (the second time from the L2 cache, where the rows in flight fit) and its
derivatives are written once, over it, in the precision of the products that take them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from irlfast.kernels.softmax import base_of, rebased, softcap


@triton.jit
def logit(z, bias, at, inside, scale, CAP: tl.constexpr):
    """Final logits at ``at``, −inf where not ``inside`` the row; ``bias`` may be None."""
    value = tl.load(z + at, mask=inside, other=0.0)
    if bias is not None:
        value += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, softcap(value * scale, CAP), float("-inf"))


@triton.jit
def softmax_kernel(
    z, targets, bias, logps, slope, V, stride_z, stride_slope, scale, CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride_z
    slope += row * stride_slope
    offsets = tl.arange(0, BLOCK)

    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + offsets
        value = logit(z, bias, at, at < V, scale, CAP)
        peak = tl.maximum(peaks, value)
        base = base_of(peak)
        sums = rebased(sums, peaks, base) + tl.exp(value - base)
        peaks = peak
    peak = tl.max(peaks, axis=0)
    norm = tl.sum(rebased(sums, peaks, peak), axis=0)

    # A target outside the row is never read: its log-probability is NaN.
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    picked = tl.where(inside, logit(z, bias, target, inside, scale, CAP), float("nan"))
    tl.store(logps + row, picked - peak - tl.log(norm))
    for start in range(0, V, BLOCK):
        at = start + offsets
        value = logit(z, bias, at, at < V, scale, CAP)
        exp = tl.exp(value - peak)
        derivative = tl.where(at == target, norm - exp, -exp) / norm
        if CAP is not None:
            derivative *= 1 - (value / CAP) * (value / CAP)
        tl.debug_barrier()  # all of the block is read before any of it is overwritten by narrower numbers
        tl.store(slope + at, derivative, mask=at < V)


def softmax(
    z: Tensor,  # [n, V] fp32, overwritten
    targets: Tensor,  # [n] int64
    bias: Tensor | None,  # [V]
    dtype: torch.dtype,  # of the result: fp32, or one of half the size
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[n]`` of the targets under ``softcap(scale · (z + bias))``, and in the memory of z their
    derivatives ``[n, V]`` by ``scale · (z + bias)``."""
    n, vocabulary = z.shape
    logps = torch.empty(n, dtype=torch.float32, device=z.device)
    slope = z.view(dtype)[:, :vocabulary]
    block = min(triton.next_power_of_2(vocabulary), 4096)
    strides = z.stride(0), slope.stride(0)
    options = {"CAP": softcap, "BLOCK": block, "num_warps": max(1, block // 512)}
    if n:
        softmax_kernel[(n,)](z, targets, bias, logps, slope, vocabulary, *strides, scale, **options)
    return logps, slope
