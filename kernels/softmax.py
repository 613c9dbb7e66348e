"""Functions that the softmaxes of the kernels share."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softcap(z, CAP: tl.constexpr):
    """``CAP · tanh(z / CAP)``, or z where CAP is None."""
    return z if CAP is None else CAP * (2 * tl.sigmoid(2 * z / CAP) - 1)


@triton.jit
def base_of(peak):
    """The number to subtract from logits whose maximum is ``peak``: 0 for −inf, because −inf − −inf would be NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def with_block(peaks, sums, value, factor):
    """Update maxima, and sums of exponentials relative to them, by another block of logits [rounds, lanes].

    ``factor`` is log2 e times the scale that is still to be applied to the logits: exponentials become powers of two,
    which round subnormal results to 0.
    """
    peak = tl.maximum(peaks, tl.max(value, axis=0))
    base = base_of(peak)
    return peak, sums * tl.exp2((peaks - base) * factor) + tl.sum(tl.exp2((value - base[None, :]) * factor), axis=0)


@triton.jit
def rebased(total, peak, base):
    """A sum of exponentials relative to ``peak``, made relative to ``base``."""
    return total * tl.exp(peak - base)


@triton.jit
def index_in(index, size):
    """The index in 32 bits; −1, where it is outside of 0 to ``size``: a target outside the vocabulary, for instance."""
    return tl.where((index >= 0) & (index < size), index, -1).to(tl.int32)
