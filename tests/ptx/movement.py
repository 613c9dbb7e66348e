"""Loads, stores and moves."""

import numpy as np

from tests.ptx.lanes import Active, Batch
from tests.ptx.modifiers import Modifiers
from tests.ptx.operands import Operation, Reader, address_reader, reader, writer
from tests.ptx.parser import SIZES, TYPES, Address, Array, Immediate, Instruction, Operand, Vector

NUMBERS = tuple(kind for kind in TYPES if kind[:3] not in ("pre", "tf3", "f16", "bf1"))
# They change where a GPU caches, or promise what is checked here anyway.
HINTS = ("ca", "cg", "cs", "lu", "cv", "nc", "wb", "wt", "L1::evict_first", "L1::evict_last", "L1::no_allocate")


def space(modifiers: Modifiers, *allowed: str) -> str:
    name = modifiers.take(*allowed, *(f"{one}::cta" for one in allowed))
    if name is None:
        raise modifiers.refused(f"found no space of memory, expected one of {', '.join(allowed)}")
    while modifiers.take(*HINTS):
        pass
    return name.removesuffix("::cta")


def parts(operand: Operand, modifiers: Modifiers) -> tuple[Operand, ...]:
    """The registers of a vector, or the one register."""
    width = modifiers.take("v2", "v4")
    registers = operand.parts if isinstance(operand, Vector) else (operand,)
    if len(registers) != int((width or "v1")[1:]):
        raise modifiers.refused(f"found {len(registers)} registers")
    return registers


def ld(instruction: Instruction, modifiers: Modifiers) -> Operation:
    kind = modifiers.type(*NUMBERS)
    where = space(modifiers, "global", "shared", "param")
    results = parts(instruction.operands[0], modifiers)
    writers, item, dtype = [writer(instruction, one, kind) for one in results], SIZES[kind], TYPES[kind]
    if where == "param":
        return load_parameter(instruction, writers, item, dtype)
    address = address_reader(instruction, instruction.operands[1], "u64" if where == "global" else "u32")
    size = item * len(results)

    def load(batch: Batch, active: Active) -> None:
        source = batch.load_global if where == "global" else batch.load_shared
        values = source(instruction, address(batch, active), size, item, active)
        for number, write in enumerate(writers):
            write(batch, batch.spread(values[:, number], active).view(dtype), active)

    return load


def load_parameter(instruction: Instruction, writers: list, item: int, dtype: np.dtype) -> Operation:
    operand = instruction.operands[1]
    assert isinstance(operand, Address)
    base: Reader = reader(instruction, operand.base, "u64")
    size = item * len(writers)

    def load(batch: Batch, active: Active) -> None:
        at = base(batch, active).astype(np.int64) + operand.offset
        inside = np.clip(at, 0, len(batch.parameters) - size)
        if (outside := (at != inside) & active.mask).any():
            lanes = f"{np.count_nonzero(outside)} lanes"
            batch.findings.add("parameters out of bounds", instruction, lanes)
        raw = np.ascontiguousarray(batch.parameters[inside[..., None] + np.arange(size)]).view(dtype)
        for number, write in enumerate(writers):
            write(batch, raw[..., number], active)

    return load


def st(instruction: Instruction, modifiers: Modifiers) -> Operation:
    kind = modifiers.type(*NUMBERS)
    where = space(modifiers, "global", "shared")
    sources = parts(instruction.operands[1], modifiers)
    readers, bits = [reader(instruction, one, kind) for one in sources], np.dtype(f"uint{8 * SIZES[kind]}")
    address = address_reader(instruction, instruction.operands[0], "u64" if where == "global" else "u32")

    def store(batch: Batch, active: Active) -> None:
        target = batch.store_global if where == "global" else batch.store_shared
        values = np.stack([batch.flat(read(batch, active), active).view(bits) for read in readers], axis=1)
        target(instruction, address(batch, active), values, active)

    return store


def mov(instruction: Instruction, modifiers: Modifiers) -> Operation:
    kind = modifiers.type(*NUMBERS, "pred")
    result, source = instruction.operands
    if isinstance(source, Vector):
        return pack(instruction, source, kind)
    if isinstance(result, Vector):
        return unpack(instruction, result, kind)
    read, write = reader(instruction, source, kind), writer(instruction, result, kind)
    return lambda batch, active: write(batch, read(batch, active), active)


def pack(instruction: Instruction, source: Vector, kind: str) -> Operation:
    """Registers side by side in a larger one, the first in the lowest bits."""
    bits = 8 * SIZES[kind] // len(source.parts)
    readers = [reader(instruction, part, f"b{bits}") for part in source.parts]
    write, whole = writer(instruction, instruction.operands[0], kind), np.dtype(f"uint{8 * SIZES[kind]}")

    def combine(batch: Batch, active: Active) -> None:
        value: Array = readers[0](batch, active).astype(whole)
        for number, read in enumerate(readers[1:], 1):
            value = value | read(batch, active).astype(whole) << whole.type(number * bits)
        write(batch, value, active)

    return combine


def unpack(instruction: Instruction, result: Vector, kind: str) -> Operation:
    bits = 8 * SIZES[kind] // len(result.parts)
    writers = [writer(instruction, part, f"b{bits}") for part in result.parts]
    read, part_type = reader(instruction, instruction.operands[1], f"b{8 * SIZES[kind]}"), np.dtype(f"uint{bits}")

    def split(batch: Batch, active: Active) -> None:
        value = read(batch, active)
        for number, write in enumerate(writers):
            write(batch, (value >> value.dtype.type(number * bits)).astype(part_type), active)

    return split


def cvta(instruction: Instruction, modifiers: Modifiers) -> Operation:
    """A generic address of global memory is the address itself."""
    modifiers.need("to")
    modifiers.need("global")
    modifiers.type("u64")
    read, write = (
        reader(instruction, instruction.operands[1], "u64"),
        writer(instruction, instruction.operands[0], "u64"),
    )
    if isinstance(instruction.operands[1], Immediate):
        raise modifiers.refused("the address of a variable is not interpreted")
    return lambda batch, active: write(batch, read(batch, active), active)
