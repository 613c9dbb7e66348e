"""Log-probabilities of targets from logits that exist, their sums per sequence, and the gradient over the logits.

The kernels are bound by memory: the forward reads every row once, the backward reads and writes it once. A program's
vectors have 16 bytes where V and the row strides are multiples of 16 elements, and fewer elsewhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from irlfast.kernels.softmax import LOG2_E, index_in, with_block

IGNORE = tl.constexpr(-100)  # a target that is skipped
VECTORS = 2048  # bytes: 16 for each of the 128 threads that score a row
BLOCK = 4096  # elements that a program of the backward writes


@triton.jit
def exp(x):
    """``tl.exp`` without exact subnormal results: so few instructions per element that memory stays the bound."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def tanh(u):
    """Within 4e-7 relative. 1 − 2/(1 + e) cancels near 0: an odd polynomial (a least-squares fit) replaces it there."""
    w = u * u
    near = u + u * w * (((0.01642126 * w - 0.05266348) * w + 0.13320599) * w - 0.33332941)
    return tl.where(w < 0.3, near, 1 - 2 / (1 + exp(2 * u)))


@triton.jit
def final_logits(z, at, inside, scale, cap):
    """``softcap(scale · z)`` in fp32; any finite number outside the row."""
    value = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    return value * scale if cap is None else cap * tanh(value * (scale / cap))


@triton.jit
def score_row(z, target, logp, lse, V, scale, cap, FOLDED: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr):
    """Where possible, the scale is FOLDED into the factor that turns exponentials into powers of two."""
    own, unit = (1.0, scale) if FOLDED else (scale, 1.0)
    factor = unit * LOG2_E
    peaks = tl.full([LANES], float("-inf"), tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    offsets = tl.arange(0, ROUNDS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, V, ROUNDS * LANES):
        at = start + offsets
        value = tl.where(at < V, final_logits(z, at, at < V, own, cap), float("-inf"))
        peaks, sums = with_block(peaks, sums, value, factor)
    peak = tl.max(peaks, axis=0)
    log_norm = tl.log(tl.sum(sums * tl.exp2((peaks - peak) * factor), axis=0))

    # A target outside the row is never read: its log-probability is NaN.
    inside = (target >= 0) & (target < V)
    picked = tl.where(inside, final_logits(z, target, inside, own, cap), float("nan"))
    tl.store(logp, (picked - peak) * unit - log_norm)
    if lse is not None:
        tl.store(lse, peak * unit + log_norm)


@triton.jit(do_not_specialize_on_alignment=["targets"])
def token_logps_kernel(
    logits,
    ref_logits,
    targets,
    logps,
    ref_logps,
    lse,
    V,
    stride,
    ref_stride,
    scale,
    cap,
    FOLDED: tl.constexpr,
    ROUNDS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Programs (row, 0) score the policy's rows, programs (row, 1) the reference's."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if tl.program_id(1) == 0:
        if target == IGNORE:
            tl.store(logps + row, 0.0)
            tl.store(lse + row, 0.0)
        else:
            score_row(logits + row * stride, target, logps + row, lse + row, V, scale, cap, FOLDED, ROUNDS, LANES)
    elif ref_logits is not None:
        if target == IGNORE:
            tl.store(ref_logps + row, 0.0)
        else:
            score_row(
                ref_logits + row * ref_stride, target, ref_logps + row, None, V, scale, cap, FOLDED, ROUNDS, LANES
            )


def token_logps(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    ref_logits: Tensor | None,  # [N, V]
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities ``[N]`` fp32, 0 where skipped; log-sum-exps ``[N]``; the reference's log-probabilities."""
    n, vocabulary = logits.shape
    logps, lse = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(2))
    ref_logps = None if ref_logits is None else torch.empty_like(logps)
    token_logps_kernel[(n, 1 if ref_logits is None else 2)](
        logits,
        ref_logits,
        targets.contiguous(),
        logps,
        ref_logps,
        lse,
        vocabulary,
        logits.stride(0),
        0 if ref_logits is None else ref_logits.stride(0),
        scale,
        softcap,
        FOLDED=softcap is None and scale > 0,
        **sizes_of_rows(logits),
    )
    return logps, lse, ref_logps


def sizes_of_rows(logits: Tensor) -> dict[str, int]:
    """The sizes with which a program reads a row."""
    width = triton.next_power_of_2(logits.shape[1])
    lanes = min(width, VECTORS // logits.itemsize)
    rounds = min(width // lanes, 4)  # vectors that each thread loads at once
    return {"ROUNDS": rounds, "LANES": lanes, "num_warps": max(1, lanes * logits.itemsize // 512)}


@triton.jit(do_not_specialize_on_alignment=["targets", "lse", "upstream"])
def gradient_kernel(logits, targets, lse, upstream, grad, V, stride, grad_stride, scale, cap, BLOCK: tl.constexpr):
    """One program per block of a row; ``grad`` may be ``logits``."""
    blocks = tl.cdiv(V, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    target, g = tl.load(targets + row), tl.load(upstream + row)
    if (target == IGNORE) | (g == 0):  # a product with 0 would keep the NaN of a skipped row
        tl.store(grad + row * grad_stride + at, tl.zeros([BLOCK], tl.float32), mask=at < V)
    else:
        value = final_logits(logits + row * stride, at, at < V, scale, cap)
        slope = tl.where(at == index_in(target, V), 1.0, 0.0) - exp(value - tl.load(lse + row))
        if cap is not None:
            slope *= 1 - (value * (1 / cap)) * (value * (1 / cap))
        tl.store(grad + row * grad_stride + at, g * scale * slope, mask=at < V)


def write_gradient(
    grad: Tensor,  # [N, V], written; may be logits
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    lse: Tensor,  # [N]
    upstream: Tensor,  # [N] fp32
    scale: float,
    softcap: float | None,
) -> None:
    """``upstream · ∂ log-probability / ∂ logits``, rows of zeros where the target is skipped or ``upstream`` is 0."""
    n, vocabulary = logits.shape
    block = min(triton.next_power_of_2(vocabulary), BLOCK)
    gradient_kernel[(n * triton.cdiv(vocabulary, block),)](
        logits,
        targets.contiguous(),
        lse,
        upstream.contiguous(),
        grad,
        vocabulary,
        logits.stride(0),
        grad.stride(0),
        scale,
        softcap,
        BLOCK=block,
        num_warps=max(1, block // 1024),
    )


@triton.jit(
    do_not_specialize=["S", "N"],
    do_not_specialize_on_alignment=["logps", "targets", "cu_seqlens", "ref_logps"],
)
def sequence_sums_kernel(
    logps, targets, cu_seqlens, ref_logps, sums, S, N, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per sequence. Sums in fp64 lose no digit of their fp32 terms, and neither does their difference."""
    sequence = tl.program_id(0)
    first = tl.maximum(tl.load(cu_seqlens + sequence), 0)
    last = tl.minimum(tl.load(cu_seqlens + sequence + 1), N)
    policy = tl.zeros([BLOCK], tl.float64)
    reference = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        policy += tl.load(logps + token, mask=token < last, other=0.0).to(tl.float64)
        if PER_TOKEN:
            scored = tl.load(targets + token, mask=token < last, other=IGNORE) != IGNORE
            reference += tl.load(ref_logps + token, mask=scored, other=0.0).to(tl.float64)
    policy_sum, ref_sum = tl.sum(policy, axis=0), tl.sum(reference, axis=0)
    if ref_logps is not None and not PER_TOKEN:
        ref_sum = tl.load(ref_logps + sequence).to(tl.float64)
    tl.store(sums + sequence, policy_sum - ref_sum)
    tl.store(sums + S + sequence, policy_sum)
    tl.store(sums + 2 * S + sequence, ref_sum)


def sequence_sums(
    logps: Tensor,  # [N] fp32
    targets: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S + 1]
    ref_logps: Tensor | None,  # [N] or [S]; a size that is both is per token
) -> Tensor:
    """Log-ratio, policy's and reference's log-probability of every sequence: ``[3, S]`` fp32, in a fixed order.

    Offsets beyond the tokens are taken for their end: no token that does not exist is read.
    """
    sequences = cu_seqlens.numel() - 1
    sums = torch.empty(3, sequences, dtype=torch.float32, device=logps.device)
    sequence_sums_kernel[(sequences,)](
        logps.contiguous(),
        targets.contiguous(),
        cu_seqlens.contiguous(),
        None if ref_logps is None else ref_logps.contiguous(),
        sums,
        sequences,
        logps.numel(),
        PER_TOKEN=ref_logps is not None and ref_logps.numel() == logps.numel(),
        BLOCK=1024,
        num_warps=4,
    )
    return sums
