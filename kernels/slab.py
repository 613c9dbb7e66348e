"""The middle step of the pair slab: rows of logits become log-probabilities and their derivatives by the logits.

The kernel is bound by memory. It reads a row once. Where derivatives are wanted, it reads the row again (from the L2
cache, if the rows in flight fit) and overwrites it, in the precision of the products that take the derivatives.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from irlfast.kernels.softmax import LOG2_E, index_in, softcap, with_block

ROUNDS = 4  # vectors of 16 bytes that each thread loads at once
# A longer row gets the most threads that a program may have. A multiprocessor has registers for one such program at a
# time, so few rows are in flight. With a bias, so many threads would not have enough registers.
LONG = 16384


@triton.jit
def logit(z, bias, at, inside, V, scale, CAP: tl.constexpr, FOLDED: tl.constexpr):
    """Final logits at ``at``; where FOLDED, the scale is still to be applied. Only ``inside`` is read."""
    value = tl.load(z + at, mask=inside, other=0.0)
    if bias is not None:
        value += tl.load(bias + at, mask=inside & (at < V), other=0.0).to(tl.float32)
    return value if FOLDED else softcap(value * scale, CAP)


@triton.jit(do_not_specialize_on_alignment=["targets"])
def softmax_kernel(
    z, targets, bias, logps, slope, V, width, stride_z, stride_slope, scale,
    CAP: tl.constexpr, FOLDED: tl.constexpr, SLOPES: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program per row. It may touch the first ``width`` elements of the row, and ignores those beyond V.

    Where possible, the scale is FOLDED into the factor that turns exponentials into powers of two.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * stride_z
    slope += row * stride_slope
    unit = scale if FOLDED else 1.0
    factor = unit * LOG2_E

    offsets = tl.arange(0, ROUNDS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    peaks = tl.full([LANES], float("-inf"), tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    for start in range(0, V, ROUNDS * LANES):
        at = start + offsets
        value = tl.where(at < V, logit(z, bias, at, at < width, V, scale, CAP, FOLDED), float("-inf"))
        peaks, sums = with_block(peaks, sums, value, factor)
    peak = tl.max(peaks, axis=0)
    norm = tl.sum(sums * tl.exp2((peaks - peak) * factor), axis=0)

    # A target outside the row is never read: its log-probability is NaN.
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    picked = tl.where(inside, logit(z, bias, target, inside, V, scale, CAP, FOLDED), float("nan"))
    tl.store(logps + row, (picked - peak) * unit - tl.log(norm))
    if SLOPES:
        column = index_in(target, V)
        over = 1 / norm
        for start in range(0, V, ROUNDS * LANES):
            at = start + tl.arange(0, ROUNDS * LANES)
            value = logit(z, bias, at, at < width, V, scale, CAP, FOLDED)
            exp = tl.exp2((value - peak) * factor)
            derivative = tl.where(at == column, norm - exp, -exp) * over
            if CAP is not None:
                derivative *= 1 - (value / CAP) * (value / CAP)
            tl.debug_barrier()  # the whole block is read before narrower numbers overwrite any of it
            tl.store(slope + at, derivative, mask=at < width)


def softmax(
    z: Tensor,  # [n, V] fp32; with slopes overwritten, and padding between rows up to a multiple of 16 elements too
    targets: Tensor,  # [n] int64
    bias: Tensor | None,  # [V]
    dtype: torch.dtype,  # of the result: fp32, or one of half the size
    scale: float,
    softcap: float | None,
    slopes: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[n]`` of the targets under ``softcap(scale · (z + bias))``.

    With ``slopes``, also their derivatives ``[n, V]`` by ``scale · (z + bias)``, in the memory of z.
    """
    n, vocabulary = z.shape
    logps = torch.empty(n, dtype=torch.float32, device=z.device)
    slope = z.view(dtype)[:, :vocabulary]
    bias = None if bias is None else bias.contiguous()
    padded = triton.cdiv(vocabulary, 16) * 16
    most = triton.next_power_of_2(vocabulary)
    lanes = min(most, 4096 if vocabulary > LONG and bias is None else 2048)
    if n:
        softmax_kernel[(n,)](
            *(z, targets, bias, logps, slope, vocabulary, padded if padded <= z.stride(0) else vocabulary),
            *(z.stride(0), slope.stride(0), scale),
            CAP=softcap,
            FOLDED=softcap is None and scale > 0,
            SLOPES=slopes,
            ROUNDS=min(most // lanes, ROUNDS),
            LANES=lanes,
            num_warps=max(1, lanes // 128),
        )
    return logps, slope
