"""Log-probability, entropy and log-sum-exp of each row of logits that exist, and their gradient over the logits.

The kernels are bound by memory: the forward reads every row once, the backward reads and writes it once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from irlfast.kernels.logits import BLOCK, IGNORE, exp, final_logits, sizes_of_rows
from irlfast.kernels.softmax import base_of, index_in


@triton.jit
def with_moments(peaks, sums, moments, value):
    """Update maxima, and sums of e = exp(z − maximum) and of (z − maximum) · e, by more logits [rounds, lanes]."""
    peak = tl.maximum(peaks, tl.max(value, axis=0))
    base = base_of(peak)
    rise = tl.where(peaks == float("-inf"), 0.0, peaks - base)
    below = value - base[None, :]
    e, kept = exp(below), exp(peaks - base)
    more = tl.sum(tl.where(e == 0, 0.0, below * e), axis=0)  # −inf · 0 would be NaN
    return peak, sums * kept + tl.sum(e, axis=0), (moments + sums * rise) * kept + more


@triton.jit(do_not_specialize_on_alignment=["targets"])
def statistics_kernel(
    logits, targets, logps, entropies, lses, V, stride, scale, cap, ROUNDS: tl.constexpr, LANES: tl.constexpr
):
    """One program per row. The entropy is log Σe − Σ(z − peak)·e / Σe."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target == IGNORE:
        tl.store(logps + row, 0.0)
        tl.store(entropies + row, 0.0)
        tl.store(lses + row, 0.0)
    else:
        z = logits + row * stride
        peaks = tl.full([LANES], float("-inf"), tl.float32)
        sums = tl.zeros([LANES], tl.float32)
        moments = tl.zeros([LANES], tl.float32)
        offsets = tl.arange(0, ROUNDS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        for start in range(0, V, ROUNDS * LANES):
            at = start + offsets
            value = tl.where(at < V, final_logits(z, at, at < V, scale, cap), float("-inf"))
            peaks, sums, moments = with_moments(peaks, sums, moments, value)
        peak = tl.max(peaks, axis=0)
        rise = tl.where(peaks == float("-inf"), 0.0, peaks - peak)
        kept = exp(peaks - peak)
        norm = tl.sum(sums * kept, axis=0)
        moment = tl.sum((moments + sums * rise) * kept, axis=0)
        log_norm = tl.log(norm)

        # A target outside the row is never read: its log-probability is NaN.
        inside = (target >= 0) & (target < V)
        picked = tl.where(inside, final_logits(z, target, inside, scale, cap), float("nan"))
        tl.store(logps + row, picked - peak - log_norm)
        tl.store(entropies + row, log_norm - moment / norm)
        tl.store(lses + row, peak + log_norm)


def token_statistics(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and log-sum-exps, each ``[N]`` fp32, 0 where skipped."""
    n, vocabulary = logits.shape
    logps, entropies, lses = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(3))
    if n:
        statistics_kernel[(n,)](
            *(logits, targets.contiguous(), logps, entropies, lses, vocabulary, logits.stride(0), scale, softcap),
            **sizes_of_rows(logits),
        )
    return logps, entropies, lses


@triton.jit(do_not_specialize_on_alignment=["targets", "lses", "by_logp", "by_all", "by_entropy"])
def statistics_gradient_kernel(
    logits, targets, lses, by_logp, by_all, by_entropy, grad, V, stride, grad_stride, scale, cap, BLOCK: tl.constexpr
):
    """One program per block of a row; ``grad`` may be ``logits``."""
    blocks = tl.cdiv(V, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    target, a = tl.load(targets + row), tl.load(by_logp + row)
    all_, e = tl.load(by_all + row), tl.load(by_entropy + row)
    if (target == IGNORE) | ((a == 0) & (all_ == 0) & (e == 0)):  # a product with 0 would keep the NaN of a skipped row
        tl.store(grad + row * grad_stride + at, tl.zeros([BLOCK], tl.float32), mask=at < V)
    else:
        value = final_logits(logits + row * stride, at, at < V, scale, cap)
        log_p = value - tl.load(lses + row)
        slope = tl.where(at == index_in(target, V), a, 0.0) + exp(log_p) * (all_ - e * log_p)
        if cap is not None:
            slope *= 1 - (value * (1 / cap)) * (value * (1 / cap))
        tl.store(grad + row * grad_stride + at, scale * slope, mask=at < V)


def write_gradient(
    grad: Tensor,  # [N, V], written; may be logits
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    lses: Tensor,  # [N]
    by_logp: Tensor,  # [N] fp32
    by_all: Tensor,  # [N] fp32
    by_entropy: Tensor,  # [N] fp32
    scale: float,
    softcap: float | None,
) -> None:
    """See ``write_gradient`` of ``irlfast/ops/logits/cpu_statistics.py``."""
    n, vocabulary = logits.shape
    block = min(triton.next_power_of_2(vocabulary), BLOCK)
    if n:
        statistics_gradient_kernel[(n * triton.cdiv(vocabulary, block),)](
            *(logits, targets.contiguous(), lses, by_logp.contiguous(), by_all.contiguous(), by_entropy.contiguous()),
            *(grad, vocabulary, logits.stride(0), grad.stride(0), scale, softcap),
            BLOCK=block,
            num_warps=max(1, block // 1024),
        )
