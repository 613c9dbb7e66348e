"""The divergence of rows of logits of a policy and a reference, and its derivatives, written over the policy's logits.

``irlfast/ops/divergence/cpu_rows.py`` has the formulas. The kernel is bound by memory: it reads both rows three times
(twice without derivatives), from the L2 cache where the rows in flight fit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from irlfast.kernels.slab import logit
from irlfast.kernels.softmax import LOG2_E, with_block

BLOCK = 2048  # logits of each that a program reads at a time


@triton.jit
def mixed(log_ratio, above, ratio, ref_share, MIXED: tl.constexpr):
    """log(m/q), log(m/r) and q/m, as in ``cpu_rows.py``."""
    if MIXED:
        s = tl.where(above, (1 - ref_share) + ref_share * ratio, ref_share + (1 - ref_share) * ratio)
        log_s = tl.log(s)
        log_m_q, log_m_r = log_s - tl.where(above, 0.0, log_ratio), log_s + tl.where(above, log_ratio, 0.0)
        q_over_m = tl.where(above, 1.0, ratio) / s
    else:
        log_m_q, log_m_r = -ref_share * log_ratio, (1 - ref_share) * log_ratio
        q_over_m = tl.full(log_ratio.shape, 1.0, tl.float32)
    return log_m_q, log_m_r, q_over_m


@triton.jit
def terms(value, ref_value, inside, apart, lse, ref_lse, ref_share, by_ref, by_policy, MIXED: tl.constexpr):
    """The terms of D and of Σ g, and q; 0 outside the row."""
    log_ratio = (value - ref_value) - apart
    above, ratio = log_ratio > 0, tl.exp(-tl.abs(log_ratio))
    larger = tl.where(inside, tl.exp(tl.where(above, value - lse, ref_value - ref_lse)), 0.0)
    q, p = tl.where(above, larger, larger * ratio), tl.where(above, larger * ratio, larger)
    surplus = tl.where(above, larger, -larger) * (1 - ratio)
    log_m_q, log_m_r, q_over_m = mixed(log_ratio, above, ratio, ref_share, MIXED)
    k = by_ref * (1 - ref_share) - by_policy * ref_share
    of_policy = by_policy * q * log_m_q
    return k * surplus - of_policy - by_ref * p * log_m_r, (1 - ref_share) * k * surplus * q_over_m - of_policy, q


@triton.jit
def divergence_kernel(
    z, r, bias, ref_bias, values, units, slope, V, stride_z, stride_r, scale, ref_scale, ref_share, by_ref, by_policy,
    CAP: tl.constexpr, REF_CAP: tl.constexpr, MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row. A row's derivatives are divided by a bound on them, its unit: none underflows in fp16."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride_z
    r += row * stride_r

    offsets = tl.arange(0, BLOCK)
    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    ref_peaks, ref_sums = peaks, sums
    for start in range(0, V, BLOCK):
        at = start + offsets
        inside = at < V
        value = tl.where(inside, logit(z, bias, at, inside, V, scale, CAP, False), float("-inf"))
        ref_value = tl.where(inside, logit(r, ref_bias, at, inside, V, ref_scale, REF_CAP, False), float("-inf"))
        peaks, sums = with_block(peaks, sums, value[None, :], LOG2_E)
        ref_peaks, ref_sums = with_block(ref_peaks, ref_sums, ref_value[None, :], LOG2_E)
    peak, ref_peak = tl.max(peaks, axis=0), tl.max(ref_peaks, axis=0)
    log_norm = tl.log(tl.sum(sums * tl.exp2((peaks - peak) * LOG2_E), axis=0))
    ref_log_norm = tl.log(tl.sum(ref_sums * tl.exp2((ref_peaks - ref_peak) * LOG2_E), axis=0))
    apart = (peak - ref_peak) + (log_norm - ref_log_norm)
    lse, ref_lse = peak + log_norm, ref_peak + ref_log_norm

    parts = tl.zeros([BLOCK], tl.float32)
    totals, largest, likeliest = parts, parts, parts
    for start in range(0, V, BLOCK):
        at = start + offsets
        inside = at < V
        value = logit(z, bias, at, inside, V, scale, CAP, False)
        ref_value = logit(r, ref_bias, at, inside, V, ref_scale, REF_CAP, False)
        term, g, q = terms(value, ref_value, inside, apart, lse, ref_lse, ref_share, by_ref, by_policy, MIXED)
        parts += term
        totals += g
        largest = tl.maximum(largest, tl.abs(g))
        likeliest = tl.maximum(likeliest, q)
    tl.store(values + row, tl.sum(parts, axis=0))

    if slope is not None:
        # Narrower numbers are twice as many in a row's memory.
        slope += row * stride_z * (32 // slope.dtype.element_ty.primitive_bitwidth)
        total = tl.sum(totals, axis=0)
        unit = tl.maximum(tl.max(largest, axis=0) + tl.abs(total) * tl.max(likeliest, axis=0), 1e-30)
        tl.store(units + row, unit)
        for start in range(0, V, BLOCK):
            at = start + offsets
            inside = at < V
            value = logit(z, bias, at, inside, V, scale, CAP, False)
            ref_value = logit(r, ref_bias, at, inside, V, ref_scale, REF_CAP, False)
            _, g, q = terms(value, ref_value, inside, apart, lse, ref_lse, ref_share, by_ref, by_policy, MIXED)
            derivative = (g - q * total) / unit
            if CAP is not None:
                derivative *= 1 - (value / CAP) * (value / CAP)
            tl.debug_barrier()  # the whole block is read before narrower numbers overwrite any of it
            tl.store(slope + at, derivative, mask=inside)


def divergence(
    z: Tensor,  # [n, V] fp32, the policy's products; overwritten
    bias: Tensor | None,  # [V]
    scale: float,
    softcap: float | None,
    r: Tensor,  # [n, V] fp32, the reference's products
    ref_bias: Tensor | None,  # [V]
    ref_scale: float,
    ref_softcap: float | None,
    mixture: tuple[float, float, float],
    dtype: torch.dtype | None,  # of the derivatives: fp32, or one of half the size; None where they are not wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences ``[n]``, and their derivatives by ``scale · (z + bias)``: units ``[n]`` times a slab ``[n, V]``.

    The slab lies in the memory of ``z``.
    """
    n, vocabulary = z.shape
    bias, ref_bias = (None if each is None else each.contiguous() for each in (bias, ref_bias))
    values, units = (torch.empty(n, dtype=torch.float32, device=z.device) for _ in range(2))
    slope = None if dtype is None else z.view(dtype)[:, :vocabulary]
    block = min(triton.next_power_of_2(vocabulary), BLOCK)
    if n:
        divergence_kernel[(n,)](
            *(z, r, bias, ref_bias, values, units, slope, vocabulary, z.stride(0), r.stride(0)),
            *(scale, ref_scale, *mixture),
            CAP=softcap,
            REF_CAP=ref_softcap,
            MIXED=0 < mixture[0] < 1,
            BLOCK=block,
            num_warps=max(1, block // 256),
            # A product and a sum in one rounding would make z − r of equal logits something else than 0.
            enable_fp_fusion=False,
        )
    return values, units, z if slope is None else slope
