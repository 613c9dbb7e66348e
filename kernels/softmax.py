"""What the softmaxes of the kernels share."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softcap(z, CAP: tl.constexpr):
    """``CAP · tanh(z / CAP)``, or z where there is no CAP."""
    return z if CAP is None else CAP * (2 * tl.sigmoid(2 * z / CAP) - 1)


@triton.jit
def base_of(peak):
    """What to subtract of logits whose maximum is ``peak``; of −inf alone nothing, as −inf − −inf would be NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def with_block(peaks, sums, value, factor):
    """Maxima of logits, and sums of exponentials over those, with another block of logits [rounds, lanes].

    ``factor`` is log2 e, times the scale that logits are still to be multiplied by, so that exponentials, here without
    care for subnormal results, are powers of two.
    """
    peak = tl.maximum(peaks, tl.max(value, axis=0))
    base = base_of(peak)
    return peak, sums * tl.exp2((peaks - base) * factor) + tl.sum(tl.exp2((value - base[None, :]) * factor), axis=0)


@triton.jit
def rebased(total, peak, base):
    """A sum of exponentials over ``peak`` as one over ``base``."""
    return total * tl.exp(peak - base)
