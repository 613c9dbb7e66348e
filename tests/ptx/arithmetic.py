"""Instructions that compute each lane's result from that lane's operands alone, as functions of NumPy arrays.

A rule says what an instruction with its modifiers takes, returns and does. Results are those of the PTX manual, with
three exceptions: ``ex2``, ``lg2``, ``tanh``, ``rcp``, ``rsqrt`` and approximate divisions are more exact than a GPU's;
``fma`` rounds twice, from fp64 to fp32, which changes about one result in 2^29; and which NaN comes out is NumPy's.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.ptx.modifiers import Modifiers
from tests.ptx.parser import SIZES, TYPES, Array

INTEGERS = tuple(f"{kind}{bits}" for kind in "us" for bits in (16, 32, 64))
BITS = ("b16", "b32", "b64")
FLOATS = ("f16", "f32", "f64")
SMALLEST_NORMAL = np.float32(2.0**-126)


class Rule(NamedTuple):
    function: Callable[..., Array]
    sources: tuple[str, ...]  # their types
    result: str


def is_float(kind: str) -> bool:
    return kind in FLOATS


def flushed(x: Array) -> Array:
    """Subnormal numbers become zeros of the same sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def with_ftz(function: Callable[..., Array], modifiers: Modifiers, kind: str) -> Callable[..., Array]:
    if kind != "f32" or not modifiers.take("ftz"):
        return function
    return lambda *sources: flushed(function(*map(flushed, sources)))


def saturated(function: Callable[..., Array], modifiers: Modifiers) -> Callable[..., Array]:
    """Clamp results to 0 and 1; NaN becomes 0."""
    if not modifiers.take("sat"):
        return function

    def clamped(*sources: Array) -> Array:
        result = function(*sources)
        return np.where(np.isnan(result), 0, np.clip(result, 0, 1)).astype(result.dtype)

    return clamped


def of_floats(function: Callable[..., Array], modifiers: Modifiers, kind: str) -> Callable[..., Array]:
    modifiers.take("rn")
    return saturated(with_ftz(function, modifiers, kind), modifiers)


# ---------------------------------------------------------------- sums and products


def plain(function: Callable[..., Array], count: int) -> Callable[[Modifiers], Rule]:
    def rule(modifiers: Modifiers) -> Rule:
        kind = modifiers.type(*INTEGERS, *FLOATS)
        return Rule(of_floats(function, modifiers, kind) if is_float(kind) else function, (kind,) * count, kind)

    return rule


def high_product(a: Array, b: Array) -> Array:
    """The upper half of the product of integers."""
    bits = 8 * a.itemsize
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    x, y = a.view(np.uint64), b.view(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> shift, y & low, y >> shift
    middle = (x0 * y0 >> shift) + (x1 * y0 & low) + (x0 * y1 & low)
    high = x1 * y1 + (x1 * y0 >> shift) + (x0 * y1 >> shift) + (middle >> shift)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def wider(kind: str) -> str:
    return kind[0] + str(16 * SIZES[kind])


def product_of_integers(kind: str, part: str) -> Callable[[Array, Array], Array]:
    if part == "lo":
        return np.multiply
    if part == "hi":
        return high_product
    wide = TYPES[wider(kind)]
    return lambda a, b: np.multiply(a, b, dtype=wide)


def mul(modifiers: Modifiers) -> Rule:
    kind = modifiers.type(*INTEGERS, *FLOATS)
    if is_float(kind):
        return Rule(of_floats(np.multiply, modifiers, kind), (kind, kind), kind)
    part = modifiers.need("lo", "hi", "wide")
    return Rule(product_of_integers(kind, part), (kind, kind), wider(kind) if part == "wide" else kind)


def mad(modifiers: Modifiers) -> Rule:
    kind = modifiers.type(*INTEGERS)
    part = modifiers.need("lo", "hi", "wide")
    product, result = product_of_integers(kind, part), wider(kind) if part == "wide" else kind
    return Rule(lambda a, b, c: product(a, b) + c, (kind, kind, result), result)


def fused(a: Array, b: Array, c: Array) -> Array:
    """The product in fp64 is exact; only the sum is rounded, twice."""
    return np.add(np.multiply(a, b, dtype=np.float64), c, dtype=np.float64).astype(np.float32)


def fma(modifiers: Modifiers) -> Rule:
    kind = modifiers.type("f32")
    modifiers.need("rn")
    return Rule(of_floats(fused, modifiers, kind), (kind,) * 3, kind)


# ---------------------------------------------------------------- quotients


def quotient_of_integers(a: Array, b: Array) -> Array:
    """Rounded towards zero; all bits set where b is 0."""
    divisor = np.where(b == 0, 1, b).astype(b.dtype)
    result = a // divisor
    if a.dtype.kind == "i":
        result = result + ((result < 0) & (result * divisor != a))
    return np.where(b == 0, ~np.zeros_like(a), result).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b).astype(b.dtype))).astype(a.dtype)


def approximate_quotient(a: Array, b: Array) -> Array:
    """A finite dividend by a divisor in [2^126, 2^128) gives 0, as on a GPU, and an infinite one NaN."""
    large = (np.abs(b) >= np.float32(2.0**126)) & np.isfinite(b)
    return np.where(large, np.where(np.isfinite(a), np.copysign(0, a) * np.sign(b), np.nan), a / b).astype(np.float32)


def div(modifiers: Modifiers) -> Rule:
    kind = modifiers.type(*INTEGERS, "f32", "f64")
    if not is_float(kind):
        return Rule(quotient_of_integers, (kind, kind), kind)
    way = modifiers.need("rn", "full", "approx")
    function = approximate_quotient if way == "approx" else np.divide
    return Rule(with_ftz(function, modifiers, kind), (kind, kind), kind)


def rem(modifiers: Modifiers) -> Rule:
    kind = modifiers.type(*INTEGERS)
    return Rule(remainder, (kind, kind), kind)


# ---------------------------------------------------------------- extremes, signs


def float_extreme(name: str, propagates: bool) -> Callable[[Array, Array], Array]:
    """A NaN operand loses, unless it propagates. +0 is greater than -0."""
    pick = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[name][propagates]

    def extreme(a: Array, b: Array) -> Array:
        result = pick(a, b)
        if result.all():
            return result
        negative = (np.logical_or if name == "min" else np.logical_and)(np.signbit(a), np.signbit(b))
        return np.where((a == 0) & (b == 0), np.where(negative, -0.0, 0.0), result).astype(a.dtype)

    return extreme


def extreme(name: str) -> Callable[[Modifiers], Rule]:
    def rule(modifiers: Modifiers) -> Rule:
        kind = modifiers.type(*INTEGERS, *FLOATS)
        if not is_float(kind):
            return Rule({"min": np.minimum, "max": np.maximum}[name], (kind, kind), kind)
        function = float_extreme(name, bool(modifiers.take("NaN")))
        return Rule(with_ftz(function, modifiers, kind), (kind, kind), kind)

    return rule


def signed(function: Callable[[Array], Array]) -> Callable[[Modifiers], Rule]:
    def rule(modifiers: Modifiers) -> Rule:
        kind = modifiers.type("s16", "s32", "s64", *FLOATS)
        return Rule(with_ftz(function, modifiers, kind), (kind,), kind)

    return rule


# ---------------------------------------------------------------- roots, powers


def unary(function: Callable[[Array], Array], *ways: str) -> Callable[[Modifiers], Rule]:
    """Functions of fp32, computed in fp64 and rounded, and of fp64 where they have rounding ``rn``."""

    def rule(modifiers: Modifiers) -> Rule:
        kind = modifiers.type("f32", "f64")
        way = modifiers.need(*ways)
        if kind == "f64":
            if way != "rn":
                raise modifiers.refused("type 'f64' is not interpreted")
            return Rule(function, (kind,), kind)
        rounded = lambda x: function(x.astype(np.float64)).astype(np.float32)  # noqa: E731
        return Rule(with_ftz(rounded, modifiers, kind), (kind,), kind)

    return rule


# ---------------------------------------------------------------- bits


def bitwise(function: Callable[..., Array], count: int) -> Callable[[Modifiers], Rule]:
    def rule(modifiers: Modifiers) -> Rule:
        kind = modifiers.type(*BITS, "pred")
        return Rule(function, (kind,) * count, kind)

    return rule


def shifted_left(a: Array, by: Array) -> Array:
    width = 8 * a.itemsize
    return np.where(by >= width, 0, a << np.minimum(by, width - 1).astype(a.dtype)).astype(a.dtype)


def shifted_right(a: Array, by: Array) -> Array:
    """Signed integers are filled with their sign, however far they are shifted."""
    width = 8 * a.itemsize
    shifted = a >> np.minimum(by, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by >= width, 0, shifted).astype(a.dtype)


def shl(modifiers: Modifiers) -> Rule:
    kind = modifiers.type(*BITS)
    return Rule(shifted_left, (kind, "u32"), kind)


def shr(modifiers: Modifiers) -> Rule:
    kind = modifiers.type(*BITS, *INTEGERS)
    return Rule(shifted_right, (kind, "u32"), kind)


def ones(count: Array, dtype: np.dtype) -> Array:
    """The lowest ``count`` bits set."""
    width = 8 * dtype.itemsize
    one = dtype.type(1)
    return np.where(count >= width, ~dtype.type(0), (one << np.minimum(count, width - 1).astype(dtype)) - one)


def bit_field(a: Array, start: Array, length: Array) -> Array:
    """Bits ``start`` to ``start + length`` of a.

    A field of a signed number, and its part beyond the end of a, are filled with the last bit that both have.
    """
    width = 8 * a.itemsize
    start, length = start.astype(np.int64) & 0xFF, length.astype(np.int64) & 0xFF
    bits = a.view(f"uint{width}")
    valid = ones(np.clip(width - start, 0, length), bits.dtype)
    field = shifted_right(bits, start) & valid
    if a.dtype.kind == "i":
        last = np.clip(start + length - 1, 0, width - 1).astype(bits.dtype)
        negative = (bits >> last & bits.dtype.type(1)).astype(bool) & (length > 0)
        field = np.where(negative, field | ~valid, field)
    return field.view(a.dtype)


def bfe(modifiers: Modifiers) -> Rule:
    kind = modifiers.type("u32", "u64", "s32", "s64")
    return Rule(bit_field, (kind, "u32", "u32"), kind)


# ---------------------------------------------------------------- comparisons, choices

COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}  # other names for unsigned
UNORDERED = {f"{name}u": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}  # true if an operand is NaN
COMBINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def either_is_nan(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def comparison(name: str, kind: str) -> Callable[[Array, Array], Array]:
    if not is_float(kind):
        return {**COMPARISONS, **UNSIGNED}[name]
    if name == "nan":
        return either_is_nan
    if name == "num":
        return lambda a, b: ~either_is_nan(a, b)
    if name in UNORDERED:
        compare = COMPARISONS[UNORDERED[name]]
        return lambda a, b: compare(a, b) | either_is_nan(a, b)
    if name == "ne":
        return lambda a, b: (a != b) & ~either_is_nan(a, b)
    return COMPARISONS[name]


def setp(modifiers: Modifiers) -> Rule:
    kind = modifiers.type(*BITS, *INTEGERS, *FLOATS)
    if is_float(kind):
        name = modifiers.need(*COMPARISONS, *UNORDERED, "num", "nan")
    else:
        name = modifiers.need(*COMPARISONS, *(UNSIGNED if kind[0] == "u" else ()))
    compare = with_flushed_sources(comparison(name, kind), modifiers, kind)
    if combine := COMBINED.get(modifiers.take(*COMBINED) or ""):
        return Rule(lambda a, b, p: combine(compare(a, b), p), (kind, kind, "pred"), "pred")
    return Rule(compare, (kind, kind), "pred")


def with_flushed_sources(function: Callable[..., Array], modifiers: Modifiers, kind: str) -> Callable[..., Array]:
    flush = kind == "f32" and modifiers.take("ftz")
    return (lambda a, b: function(flushed(a), flushed(b))) if flush else function


def selp(modifiers: Modifiers) -> Rule:
    kind = modifiers.type(*BITS, *INTEGERS, *FLOATS)
    return Rule(lambda a, b, p: np.where(p, a, b), (kind, kind, "pred"), kind)


RULES: dict[str, Callable[[Modifiers], Rule]] = {
    "add": plain(np.add, 2),
    "sub": plain(np.subtract, 2),
    "mul": mul,
    "mad": mad,
    "fma": fma,
    "div": div,
    "rem": rem,
    "min": extreme("min"),
    "max": extreme("max"),
    "neg": signed(np.negative),
    "abs": signed(np.abs),
    "ex2": unary(np.exp2, "approx"),
    "lg2": unary(np.log2, "approx"),
    "tanh": unary(np.tanh, "approx"),
    "sqrt": unary(np.sqrt, "rn", "approx"),
    "rsqrt": unary(lambda x: 1 / np.sqrt(x), "approx"),
    "rcp": unary(np.reciprocal, "rn", "approx"),
    "and": bitwise(np.bitwise_and, 2),
    "or": bitwise(np.bitwise_or, 2),
    "xor": bitwise(np.bitwise_xor, 2),
    "not": bitwise(np.invert, 1),
    "shl": shl,
    "shr": shr,
    "bfe": bfe,
    "setp": setp,
    "selp": selp,
}
