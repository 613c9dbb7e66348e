"""The middle step of the pair slab: rows of logits become log-probabilities and their derivatives by the logits.

Bound by memory: a row is read once, and where derivatives are wanted again (from the L2 cache, where the rows in flight
fit) and they are written over it, in the precision of the products that take them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from irlfast.kernels.softmax import LOG2_E, softcap, with_block

ROUNDS = 4  # vectors of 16 bytes that a thread has on their way at once
# Longer rows get the most threads that a program may have, and a multiprocessor has registers for one such program at a
# time, so that few rows are in flight; but not with a bias, for which so many threads do not have the registers.
LONG = 16384


@triton.jit
def logit(z, bias, at, inside, V, scale, CAP: tl.constexpr, FOLDED: tl.constexpr):
    """Final logits at ``at``, where FOLDED still to be multiplied by the scale; not ``inside`` nothing is read."""
    value = tl.load(z + at, mask=inside, other=0.0)
    if bias is not None:
        value += tl.load(bias + at, mask=inside & (at < V), other=0.0).to(tl.float32)
    return value if FOLDED else softcap(value * scale, CAP)


@triton.jit
def softmax_kernel(
    z, targets, bias, logps, slope, V, width, stride_z, stride_slope, scale,
    CAP: tl.constexpr, FOLDED: tl.constexpr, SLOPES: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program a row, whose first ``width`` elements are its own, those beyond V to be ignored.

    The scale is FOLDED, where it can be, into the factor that makes exponentials powers of two.
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
        target = tl.where(inside, target, -1).to(tl.int32)
        over = 1 / norm
        for start in range(0, V, ROUNDS * LANES):
            at = start + tl.arange(0, ROUNDS * LANES)
            value = logit(z, bias, at, at < width, V, scale, CAP, FOLDED)
            exp = tl.exp2((value - peak) * factor)
            derivative = tl.where(at == target, norm - exp, -exp) * over
            if CAP is not None:
                derivative *= 1 - (value / CAP) * (value / CAP)
            tl.debug_barrier()  # all of the block is read before any of it is overwritten by narrower numbers
            tl.store(slope + at, derivative, mask=at < width)


def softmax(
    z: Tensor,  # [n, V] fp32; with slopes overwritten, as is what lies between its rows up to a multiple of 16 elements
    targets: Tensor,  # [n] int64
    bias: Tensor | None,  # [V]
    dtype: torch.dtype,  # of the result: fp32, or one of half the size
    scale: float,
    softcap: float | None,
    slopes: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[n]`` of the targets under ``softcap(scale · (z + bias))``, and in the memory of z, with
    ``slopes``, their derivatives ``[n, V]`` by ``scale · (z + bias)``."""
    n, vocabulary = z.shape
    logps = torch.empty(n, dtype=torch.float32, device=z.device)
    slope = z.view(dtype)[:, :vocabulary]
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
