"""Conversions between types of numbers (``cvt``), and the 16-bit floats that NumPy lacks as their bits."""

from collections.abc import Callable

import numpy as np

from tests.ptx.arithmetic import FLOATS, Rule, flushed
from tests.ptx.modifiers import Modifiers
from tests.ptx.parser import TYPES, Array

INTEGERS = tuple(f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64))
ROUNDED = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
NAN_BF16, NAN_F16 = np.uint16(0x7FFF), np.uint16(0x7FFF)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """Round fp32 to nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), NAN_BF16, rounded.astype(np.uint16))


def to_f16(x: Array) -> Array:
    return np.where(np.isnan(x), NAN_F16, x.astype(np.float16).view(np.uint16))


def to_tf32(x: Array) -> Array:
    """Round fp32 to 10 bits of fraction, to nearest, ties away from zero."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def packed(narrow: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Two fp32 numbers in one register. The first operand takes the upper half."""
    return lambda high, low: narrow(low).astype(np.uint32) | narrow(high).astype(np.uint32) << np.uint32(16)


def to_integer(rounding: str, kind: str, source: str) -> Callable[[Array], Array]:
    """Rounded, and clamped to the range of the type. NaN becomes 0; with 64 bits on a side, the highest bit alone."""
    limits, dtype = np.iinfo(TYPES[kind]), TYPES[kind]
    wide = source == "f64" or limits.bits == 64
    nan = (limits.min or (limits.max >> 1) + 1) if wide else 0

    def convert(x: Array) -> Array:
        whole = ROUNDED[rounding](x.astype(np.float64))
        low, high = whole <= float(limits.min), whole >= float(limits.max)
        inside = np.where(low | high | np.isnan(whole), 0, whole).astype(dtype)
        result = np.where(low, dtype.type(limits.min), np.where(high, dtype.type(limits.max), inside))
        return np.where(np.isnan(whole), dtype.type(nan), result)

    return convert


def between_integers(kind: str, saturates: bool) -> Callable[[Array], Array]:
    dtype, limits = TYPES[kind], np.iinfo(TYPES[kind])
    if not saturates:
        return lambda x: x.astype(dtype)

    def clamped(x: Array) -> Array:
        own = np.iinfo(x.dtype)
        low, high = max(own.min, limits.min), min(own.max, limits.max)
        return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)

    return clamped


def between_floats(kind: str, rounding: str | None, saturates: bool) -> Callable[[Array], Array]:
    dtype = TYPES[kind]

    def convert(x: Array) -> Array:
        result = (ROUNDED[rounding](x) if rounding else x).astype(dtype)
        return np.where(np.isnan(result), 0, np.clip(result, 0, 1)).astype(dtype) if saturates else result

    return convert


def narrow_float(kind: str, modifiers: Modifiers) -> Rule:
    """Conversions from fp32 to bf16, tf32, or two 16-bit floats at once."""
    if kind == "tf32":
        modifiers.need("rna")
        return Rule(to_tf32, ("f32",), "b32")
    modifiers.need("rn")
    narrow = to_f16 if kind == "f16x2" else to_bf16
    if kind == "bf16":
        return Rule(narrow, ("f32",), "b16")
    return Rule(packed(narrow), ("f32", "f32"), "b32")


def cvt(modifiers: Modifiers) -> Rule:
    source = modifiers.type(*INTEGERS, *FLOATS, "bf16")
    kind = modifiers.type(*INTEGERS, *FLOATS, "bf16", "bf16x2", "f16x2", "tf32")
    saturates = bool(modifiers.take("sat"))
    if kind in ("bf16", "bf16x2", "f16x2", "tf32"):
        if source != "f32" or saturates:
            raise modifiers.refused(f"{kind} from {source} is not interpreted")
        return narrow_float(kind, modifiers)
    if source == "bf16":
        if kind not in ("f32", "f64"):
            raise modifiers.refused(f"{kind} from bf16 is not interpreted")
        return Rule(lambda x: from_bf16(x).astype(TYPES[kind]), ("b16",), kind)
    if source in FLOATS:
        flush = source == "f32" and modifiers.take("ftz")
        if kind in FLOATS:
            modifiers.take("rn")
            function = between_floats(kind, modifiers.take(*ROUNDED), saturates)
        else:
            function = to_integer(modifiers.need(*ROUNDED), kind, source)
        return Rule((lambda x: function(flushed(x))) if flush else function, (source,), kind)
    if kind in FLOATS:
        modifiers.need("rn")
        return Rule(lambda x: x.astype(TYPES[kind]), (source,), kind)
    return Rule(between_integers(kind, saturates), (source,), kind)


def chosen_bytes(a: Array, b: Array, selector: Array) -> Array:
    """Each byte of the result is one of the four of ``a`` (0 to 3) or of ``b`` (4 to 7), or with 8 added its sign."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    result = np.zeros(both.shape, np.uint32)
    for number in range(4):
        choice = selector >> np.uint32(4 * number) & np.uint32(15)
        byte = both >> (choice & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)
        sign = (byte >> np.uint64(7)) * np.uint64(255)
        result |= np.where(choice & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * number)
    return result


def prmt(modifiers: Modifiers) -> Rule:
    modifiers.type("b32")
    return Rule(chosen_bytes, ("b32", "b32", "b32"), "b32")
