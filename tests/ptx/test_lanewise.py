"""Each instruction that computes a lane from its own operands, against Python's integers and fractions, and PyTorch."""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.ptx.instructions import LANEWISE, OTHERS
from tests.ptx.parser import SIZES, TYPES, RefusedPTX
from tests.ptx.snippets import combinations, compute

NAN, INF = math.nan, math.inf


class Case(NamedTuple):
    code: str
    kinds: str  # of the operands and of the result
    expected: Callable[..., Any]  # of one lane, on Python's numbers
    tolerance: float = 0  # relative
    beyond: Callable[..., bool] = lambda *operands: False  # operands whose result is not defined


def wrapped(value: int, kind: str) -> int:
    bits = 8 * SIZES[kind]
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> bits - 1 else value


def single(value: float | Fraction) -> float:
    return float(np.float32(float(value)))


def tensor(function: Callable[..., torch.Tensor], dtype: torch.dtype = torch.float32) -> Callable[..., float]:
    return lambda *operands: function(*(torch.tensor(x, dtype=dtype) for x in operands)).item()


def flush(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def exact_fma(a: float, b: float, c: float) -> float:
    """Rounded once, by fractions, where all is finite and the result is not zero."""
    if not all(map(math.isfinite, (a, b, c))) or Fraction(a) * Fraction(b) + Fraction(c) == 0:
        return tensor(lambda x, y, z: x.double() * y.double() + z.double())(a, b, c)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return single(exact) if abs(exact) < 2**128 - 2**103 else math.copysign(INF, exact)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def smaller(a: float, b: float) -> float:
    """PTX: a NaN loses, and -0 is less than +0."""
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return min((a, b), key=lambda x: (x, math.copysign(1, x)))


def larger(a: float, b: float) -> float:
    return -smaller(-a, -b) if not (math.isnan(a) and math.isnan(b)) else NAN


def either_nan(a: float, b: float) -> bool:
    return math.isnan(a) or math.isnan(b)


def field(a: int, start: int, length: int, kind: str) -> int:
    """Bit by bit, as the manual defines `bfe`."""
    bits, start, length = 8 * SIZES[kind], start & 255, length & 255
    sign = a >> min(start + length - 1, bits - 1) & 1 if kind[0] == "s" and length else 0
    of = [a >> start + i & 1 if i < length and start + i < bits else sign for i in range(bits)]
    return wrapped(sum(bit << i for i, bit in enumerate(of)), kind)


def clamped(value: float, kind: str, rounding: Callable[[float], float], wide: bool) -> int:
    limits = np.iinfo(TYPES[kind])
    if math.isnan(value):
        return 0 if not wide else int(limits.min) if kind[0] == "s" else 1 << limits.bits - 1
    if math.isinf(value):
        return int(limits.max if value > 0 else limits.min)
    return int(min(max(rounding(value), limits.min), limits.max))


def divided_approximately(a: float, b: float) -> float:
    if 2**126 <= abs(b) < INF:
        return NAN if math.isinf(a) or math.isnan(a) else math.copysign(0.0, a) * math.copysign(1, b)
    return tensor(torch.div)(a, b)


INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
BITS = ("b16", "b32", "b64")
COMPARE = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}
NAMES_OF_UNSIGNED = {"lo": "__lt__", "ls": "__le__", "hi": "__gt__", "hs": "__ge__"}


def with_type(kind: str, function: Callable[..., int]) -> Callable[..., int]:
    return lambda *operands: wrapped(function(*operands), kind)


def integer_cases() -> list[Case]:
    cases = []
    for t in INTEGERS:
        two, bits = f"{t} {t} {t}", 8 * SIZES[t]
        cases += [
            Case(f"add.{t} %d, %a, %b", two, with_type(t, lambda a, b: a + b)),
            Case(f"sub.{t} %d, %a, %b", two, with_type(t, lambda a, b: a - b)),
            Case(f"mul.lo.{t} %d, %a, %b", two, with_type(t, lambda a, b: a * b)),
            Case(f"mul.hi.{t} %d, %a, %b", two, with_type(t, lambda a, b, bits=bits: a * b >> bits)),
            Case(f"mad.lo.{t} %d, %a, %b, %c", f"{t} {t} {t} {t}", with_type(t, lambda a, b, c: a * b + c)),
            Case(f"div.{t} %d, %a, %b", two, with_type(t, truncated), beyond=lambda a, b: b == 0),
            Case(
                f"rem.{t} %d, %a, %b", two, with_type(t, lambda a, b: a - b * truncated(a, b)),
                beyond=lambda a, b: b == 0,
            ),
            Case(f"min.{t} %d, %a, %b", two, min),
            Case(f"max.{t} %d, %a, %b", two, max),
            Case(f"shr.{t} %d, %a, %b", f"{t} u32 {t}", lambda a, b: a >> b),
        ]  # fmt: skip
        if bits < 64:
            wide = f"{t[0]}{2 * bits}"
            cases.append(Case(f"mul.wide.{t} %d, %a, %b", f"{t} {t} {wide}", lambda a, b: a * b))
            cases.append(
                Case(
                    f"mad.wide.{t} %d, %a, %b, %c", f"{t} {t} {wide} {wide}", with_type(wide, lambda a, b, c: a * b + c)
                )
            )
        if t[0] == "s":
            cases.append(Case(f"neg.{t} %d, %a", f"{t} {t}", with_type(t, lambda a: -a)))
            cases.append(Case(f"abs.{t} %d, %a", f"{t} {t}", with_type(t, abs)))
        if bits > 16:
            cases.append(Case(f"bfe.{t} %d, %a, %b, %c", f"{t} u32 u32 {t}", lambda a, b, c, t=t: field(a, b, c, t)))
        for name, method in {**COMPARE, **(NAMES_OF_UNSIGNED if t[0] == "u" else {})}.items():
            compare = lambda a, b, method=method: getattr(a, method)(b)  # noqa: E731
            cases.append(Case(f"setp.{name}.{t} %d, %a, %b", f"{t} {t} pred", compare))
    return cases


def bit_cases() -> list[Case]:
    cases = []
    for t in (*BITS, "pred"):
        unsigned = t.replace("b", "u") if t != "pred" else t
        mask = (1 << (8 * SIZES[t] if t != "pred" else 1)) - 1
        two = f"{unsigned} {unsigned} {unsigned}"
        cases += [
            Case(f"and.{t} %d, %a, %b", two, lambda a, b: a & b),
            Case(f"or.{t} %d, %a, %b", two, lambda a, b: a | b),
            Case(f"xor.{t} %d, %a, %b", two, lambda a, b: a ^ b),
            Case(f"not.{t} %d, %a", f"{unsigned} {unsigned}", lambda a, mask=mask: ~a & mask),
        ]
        if t != "pred":
            left = lambda a, b, mask=mask: (a << b if b < 64 else 0) & mask  # noqa: E731
            cases.append(Case(f"shl.{t} %d, %a, %b", f"{unsigned} u32 {unsigned}", left))
            cases.append(Case(f"shr.{t} %d, %a, %b", f"{unsigned} u32 {unsigned}", lambda a, b: a >> b))
            cases.append(Case(f"selp.{t} %d, %a, %b, %c", f"{unsigned} {unsigned} pred {unsigned}", choose))
            cases.append(Case(f"setp.eq.{t} %d, %a, %b", f"{unsigned} {unsigned} pred", lambda a, b: a == b))
    for name, combine in (("and", lambda x, p: x and p), ("or", lambda x, p: x or p), ("xor", lambda x, p: x != p)):
        for negated in (False, True):
            code = f"setp.lt.{name}.s32 %d, %a, %b, {'!' if negated else ''}%c"
            expected = lambda a, b, p, combine=combine, negated=negated: combine(a < b, bool(p) != negated)  # noqa: E731
            cases.append(Case(code, "s32 s32 pred pred", expected))
    return cases


def choose(a: Any, b: Any, p: int) -> Any:
    return a if p else b


def float_cases() -> list[Case]:
    cases = []
    for t, dtype in (("f32", torch.float32), ("f64", torch.float64), ("f16", torch.float16)):
        two = f"{t} {t} {t}"
        cases += [
            Case(f"add.{t} %d, %a, %b", two, tensor(torch.add, dtype)),
            Case(f"sub.rn.{t} %d, %a, %b", two, tensor(torch.sub, dtype)),
            Case(f"mul.{t} %d, %a, %b", two, tensor(torch.mul, dtype)),
            Case(f"min.{t} %d, %a, %b", two, smaller),
            Case(f"max.{t} %d, %a, %b", two, larger),
            Case(f"max.NaN.{t} %d, %a, %b", two, lambda a, b: NAN if either_nan(a, b) else larger(a, b)),
            Case(f"neg.{t} %d, %a", f"{t} {t}", lambda a: -a),
            Case(f"abs.{t} %d, %a", f"{t} {t}", abs),
            Case(f"selp.{t} %d, %a, %b, %c", f"{t} {t} pred {t}", choose),
            Case(f"setp.num.{t} %d, %a, %b", f"{t} {t} pred", lambda a, b: not either_nan(a, b)),
            Case(f"setp.nan.{t} %d, %a, %b", f"{t} {t} pred", either_nan),
        ]
        for name, method in COMPARE.items():
            ordered = lambda a, b, method=method: not either_nan(a, b) and getattr(a, method)(b)  # noqa: E731
            unordered = lambda a, b, method=method: either_nan(a, b) or getattr(a, method)(b)  # noqa: E731
            cases.append(Case(f"setp.{name}.{t} %d, %a, %b", f"{t} {t} pred", ordered))
            cases.append(Case(f"setp.{name}u.{t} %d, %a, %b", f"{t} {t} pred", unordered))
    two, one = "f32 f32 f32", "f32 f32"
    cases += [
        Case("add.ftz.f32 %d, %a, %b", two, lambda a, b: flush(tensor(torch.add)(flush(a), flush(b)))),
        Case("add.sat.f32 %d, %a, %b", two, lambda a, b: saturated(tensor(torch.add)(a, b))),
        Case("setp.eq.ftz.f32 %d, %a, %b", "f32 f32 pred", lambda a, b: flush(a) == flush(b)),
        Case("fma.rn.f32 %d, %a, %b, %c", "f32 f32 f32 f32", exact_fma),
        Case("div.rn.f32 %d, %a, %b", two, tensor(torch.div)),
        Case("div.rn.f64 %d, %a, %b", "f64 f64 f64", tensor(torch.div, torch.float64)),
        Case("div.full.f32 %d, %a, %b", two, tensor(torch.div)),
        Case("div.approx.f32 %d, %a, %b", two, divided_approximately),
        Case("ex2.approx.f32 %d, %a", one, tensor(torch.exp2), 1e-6),
        Case("ex2.approx.ftz.f32 %d, %a", one, lambda a: flush(tensor(torch.exp2)(flush(a))), 1e-6),
        Case("lg2.approx.f32 %d, %a", one, tensor(torch.log2), 1e-6),
        Case("tanh.approx.f32 %d, %a", one, tensor(torch.tanh), 1e-6),
        Case("sqrt.rn.f32 %d, %a", one, lambda a: single(root(a))),
        Case("sqrt.rn.f64 %d, %a", "f64 f64", root),
        Case("rsqrt.approx.f32 %d, %a", one, tensor(torch.rsqrt), 1e-6),
        Case("rcp.rn.f32 %d, %a", one, tensor(torch.reciprocal)),
    ]
    return cases


def root(x: float) -> float:
    return NAN if math.isnan(x) or x < 0 else math.sqrt(x)


def saturated(x: float) -> float:
    return 0.0 if math.isnan(x) else min(max(x, 0.0), 1.0)


def bits_of(x: float, dtype: torch.dtype, view: torch.dtype) -> int:
    return torch.tensor(x, dtype=torch.float32).to(dtype).view(view).item() & 0xFFFF


def tf32(a: float) -> float:
    """To 11 bits, ties away from zero."""
    if not math.isfinite(a) or a == 0:
        return a
    unit = Fraction(2) ** (max(math.frexp(a)[1], -125) - 11)
    steps = abs(Fraction(a)) / unit
    return math.copysign(float(math.floor(steps + Fraction(1, 2)) * unit), a)


def chosen_bytes(a: int, b: int, selector: int) -> int:
    result = 0
    for number in range(4):
        choice = selector >> 4 * number & 15
        byte = (b << 32 | a) >> 8 * (choice & 7) & 255
        result |= (byte if choice < 8 else 255 * (byte >> 7)) << 8 * number
    return result


def conversion_cases() -> list[Case]:
    cases, narrow = [], ("u8", "s8")
    for source in (*narrow, *INTEGERS):
        for kind in (*narrow, *INTEGERS):
            cases.append(Case(f"cvt.{kind}.{source} %d, %a", f"{source} {kind}", with_type(kind, lambda a: a)))
            limits = np.iinfo(TYPES[kind])
            clip = lambda a, limits=limits: min(max(a, int(limits.min)), int(limits.max))  # noqa: E731
            cases.append(Case(f"cvt.sat.{kind}.{source} %d, %a", f"{source} {kind}", clip))
        cases.append(Case(f"cvt.rn.f32.{source} %d, %a", f"{source} f32", lambda a: single(Fraction(a))))
        cases.append(Case(f"cvt.rn.f64.{source} %d, %a", f"{source} f64", float))
    roundings = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for source in ("f32", "f64"):
        for rounding, function in roundings.items():
            for kind in INTEGERS:
                wide = source == "f64" or SIZES[kind] == 8
                expected = lambda a, k=kind, f=function, w=wide: clamped(a, k, f, w)  # noqa: E731
                cases.append(Case(f"cvt.{rounding}.{kind}.{source} %d, %a", f"{source} {kind}", expected))
    whole = lambda a: math.copysign(float(round(a)), a) if math.isfinite(a) else a  # noqa: E731
    pair = lambda a, b, dtype: bits_of(a, dtype, torch.int16) << 16 | bits_of(b, dtype, torch.int16)  # noqa: E731
    nan = lambda *operands: any(map(math.isnan, operands))  # noqa: E731
    cases += [
        Case("cvt.rni.f32.f32 %d, %a", "f32 f32", whole),
        Case("cvt.rn.f32.f64 %d, %a", "f64 f32", lambda a: tensor(lambda x: x.float(), torch.float64)(a)),
        Case("cvt.f64.f32 %d, %a", "f32 f64", lambda a: a),
        Case("cvt.sat.f32.f32 %d, %a", "f32 f32", saturated),
        Case("cvt.f32.f16 %d, %a", "f16 f32", lambda a: a),
        Case("cvt.rn.f16.f32 %d, %a", "f32 f16", tensor(lambda x: x.half())),
        Case("cvt.rn.bf16.f32 %d, %a", "f32 u16", lambda a: bits_of(a, torch.bfloat16, torch.int16), beyond=nan),
        Case(
            "cvt.f32.bf16 %d, %a", "u16 f32",
            lambda a: torch.tensor(a, dtype=torch.uint16).view(torch.bfloat16).float().item(),
        ),
        Case("cvt.rn.bf16x2.f32 %d, %a, %b", "f32 f32 u32", lambda a, b: pair(a, b, torch.bfloat16), beyond=nan),
        Case("cvt.rn.f16x2.f32 %d, %a, %b", "f32 f32 u32", lambda a, b: pair(a, b, torch.float16), beyond=nan),
        Case("cvt.rna.tf32.f32 %d, %a", "f32 f32", tf32),
        Case("prmt.b32 %d, %a, %b, %c", "u32 u32 u32 u32", chosen_bytes),
    ]  # fmt: skip
    return cases


CASES = integer_cases() + bit_cases() + float_cases() + conversion_cases()


def name_of(case: Case) -> str:
    return case.code.split()[0]


@pytest.mark.parametrize("opcode", sorted(LANEWISE))
def test_results_are_those_of_the_manual_at_every_edge(opcode):
    cases = [case for case in CASES if name_of(case).split(".")[0] == opcode]
    assert cases, f"{opcode} has no case here"
    for case in cases:
        *kinds, result = case.kinds.split()
        operands = combinations(kinds)
        actual = compute(case.code, kinds, result, operands)
        for got, *values in zip(
            actual.tolist(),
            *(np.array(o, TYPES[k]).tolist() for o, k in zip(operands, kinds, strict=True)),
            strict=True,
        ):
            if not case.beyond(*values):
                check(case, values, got, case.expected(*values), result)


def check(case: Case, values: list, got: Any, expected: Any, kind: str) -> None:
    message = f"{case.code} of {values}: found {got}, expected {expected}"
    if kind[0] != "f":
        assert int(got) == int(expected), message
    elif math.isnan(expected):
        assert math.isnan(got), message
    elif case.tolerance and expected and math.isfinite(expected):
        assert abs(got - expected) <= case.tolerance * abs(expected), message
    else:
        assert got == expected and math.copysign(1, got) == math.copysign(1, expected), message


@pytest.mark.parametrize("opcode", sorted(OTHERS))
def test_every_other_instruction_occurs_in_a_test(opcode):
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    assert any(re.search(rf"\b{opcode}\.", text) for text in texts)


def test_immediate_operands_are_read_by_the_type_of_the_instruction():
    lanes = [[1, 2]]
    assert compute("add.s32 %d, %a, -3", ["s32"], "s32", lanes).tolist() == [-2, -1]
    assert compute("add.u64 %d, %a, 0x100000000", ["u64"], "u64", lanes).tolist() == [2**32 + 1, 2**32 + 2]
    assert compute("mul.f32 %d, %a, 0fC0000000", ["f32"], "f32", lanes).tolist() == [-2.0, -4.0]
    assert compute("mul.f64 %d, %a, 0d3FE0000000000000", ["f64"], "f64", lanes).tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("sin.approx.f32 %d, %a", "sin.approx.f32: the instruction is not interpreted"),
        ("add.rz.f32 %d, %a, %a", "add.rz.f32: modifier 'rz' is not interpreted"),
        ("add.ftz.f16 %d, %a, %a", "add.ftz.f16: modifier 'ftz' is not interpreted"),
        ("add.f16x2 %d, %a, %a", "add.f16x2: type 'f16x2' is not interpreted"),
        ("cvt.rz.f16.f32 %d, %a", "cvt.rz.f16.f32: modifier 'rz' is not interpreted"),
        ("ld.local.f32 %d, [%at0]", "ld.local.f32: found no space of memory"),
        ("mul.wide.u32 %d, %a, %a", r"register %d is of type b32, expected u64"),
        ("add.f32 %d, %a", "found 1 operands, expected 2"),
    ],
)
def test_what_is_not_interpreted_is_refused_by_name(code, named):
    with pytest.raises(RefusedPTX, match=re.escape(named)):
        compute(code, ["f32"], "f32", [[1.0]])
