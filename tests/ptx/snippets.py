"""Small kernels written by hand, for the tests of the interpreter."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.ptx.machine import Allocation, Report, run
from tests.ptx.parser import SIZES, TYPES

HEADER = ".version 8.3\n.target sm_90a\n.address_size 64\n"
FLOATS = (0.0, -0.0, 1.0, -1.0, 1.5, -2.75, 1e-40, -1e-40, 2.0**-126, 3e38, -3e38, 2.0**126, np.inf, -np.inf, np.nan)
HALVES = (0.0, -0.0, 1.0, -1.5, 6e-8, 65504.0, -65504.0, np.inf, np.nan)
PREDICATES = (0, 1)


def edges(kind: str) -> tuple:
    """Values of a type at which instructions go wrong."""
    if kind == "pred":
        return PREDICATES
    if kind in ("f32", "f64"):
        return FLOATS
    if kind == "f16":
        return HALVES
    bits = 8 * SIZES[kind]
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind[0] == "s" else (0, 2**bits - 1)
    middle = {"s": (-1, -7, 1 - 2 ** (bits - 1))}.get(kind[0], (2 ** (bits - 1), 2 ** (bits - 1) - 1))
    return (0, 1, 5, 100, low, high, *middle)


def kernel(body: str, parameters: str = "", registers: str = "", shared: str = "", name: str = "snippet") -> str:
    """A module with one kernel. It has the registers %thread and %block, as b32."""
    return f"""{HEADER}
.visible .entry {name}({parameters})
{{
    .reg .b32 %thread, %block;
    {registers}
    {shared}
    .loc 1 1 0
    mov.u32 %thread, %tid.x;
    mov.u32 %block, %ctaid.x;
    {numbered(body)}
    ret;
}}
    .file 1 "/somewhere/snippet.cu"
"""


def numbered(body: str) -> str:
    """Each line of the body is a line of its own for findings, from 10 on."""
    lines = [line for line in body.strip().splitlines() if line.strip()]
    return "\n".join(f"    .loc 1 {number} 0\n    {line.strip()}" for number, line in enumerate(lines, 10))


class Array(NamedTuple):
    """An argument in global memory."""

    values: np.ndarray
    fresh: bool = False


def launch(
    body: str,
    arrays: Sequence[Array] = (),
    *,
    registers: str = "",
    shared: str = "",
    grid: int = 1,
    threads: int = 32,
    dynamic: int = 0,
) -> Report:
    """Run a body with the addresses of arrays in %p0, %p1, …. They are allocations named p0, p1, …."""
    names = [f"p{number}" for number in range(len(arrays))]
    pointers = "".join(f".reg .b64 %{name};\nld.param.b64 %{name}, [{name}];\n" for name in names)
    ptx = kernel(body, ", ".join(f".param .u64 {name}" for name in names), registers + pointers, shared)
    allocations = [
        Allocation(name, array.values.ctypes.data, array.values.nbytes, array.fresh)
        for name, array in zip(names, arrays, strict=True)
    ]
    addresses = [allocation.address for allocation in allocations]
    return run(ptx, "snippet", (grid, 1, 1), (threads, 1, 1), addresses, allocations, dynamic)


def store_type(kind: str) -> str:
    return {"pred": "u8"}.get(kind, f"b{8 * SIZES[kind]}")


def compute(code: str, kinds: Sequence[str], result: str, values: Sequence[Sequence]) -> np.ndarray:
    """Run one instruction on lanes: %a, %b, %c and so on hold ``values`` [operand][lane], %d takes the result.

    Registers have the declared type of their size, as in compiled code, except predicates.
    """
    lanes = len(values[0])
    padded = -(-lanes // 32) * 32
    inputs = [np.zeros(padded, TYPES[kind]) for kind in kinds]
    for array, operand in zip(inputs, values, strict=True):
        array[:lanes] = operand
    output = np.zeros(padded, TYPES[result])
    lines, registers = [], f".reg .b64 %at<{len(kinds) + 1}>; .reg .b16 %narrow;\n"
    for number, (name, kind) in enumerate(zip("abcefg", kinds, strict=False)):
        lines.append(f"mad.wide.u32 %at{number}, %lane, {SIZES[kind]}, %p{number};")
        registers += f".reg .{'pred' if kind == 'pred' else register_type(kind)} %{name};\n"
        if kind == "pred":
            lines += [f"ld.global.u8 %narrow, [%at{number}];", f"setp.ne.u16 %{name}, %narrow, 0;"]
        else:
            lines.append(f"ld.global.{store_type(kind)} %{name}, [%at{number}];")
    last = len(kinds)
    registers += f".reg .{'pred' if result == 'pred' else register_type(result)} %d;\n.reg .b32 %lane;\n"
    lines = ["mad.lo.u32 %lane, %block, 32, %thread;", *lines, f"{code};"]
    lines.append(f"mad.wide.u32 %at{last}, %lane, {SIZES[result]}, %p{last};")
    if result == "pred":
        lines += ["selp.b16 %narrow, 1, 0, %d;", f"st.global.u8 [%at{last}], %narrow;"]
    else:
        lines.append(f"st.global.{store_type(result)} [%at{last}], %d;")
    arrays = [Array(array) for array in (*inputs, output)]
    report = launch("\n".join(lines), arrays, registers=registers, grid=padded // 32)
    assert report.findings == []
    return output[:lanes]


def register_type(kind: str) -> str:
    """Registers have at least 16 bits."""
    return f"b{max(16, 8 * SIZES[kind])}"


def combinations(kinds: Sequence[str]) -> list[tuple]:
    """Every combination of the edge values of operands, as one tuple per operand."""
    return list(zip(*itertools.product(*map(edges, kinds)), strict=True))
