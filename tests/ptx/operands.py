"""Operands as functions: readers return numbers of a type from registers or immediates, writers store them."""

from collections.abc import Callable

import numpy as np

from tests.ptx.lanes import Active, Batch
from tests.ptx.parser import SIZES, TYPES, Address, Array, Immediate, Instruction, Operand, RefusedPTX, Register

Operation = Callable[[Batch, Active], None]
Reader = Callable[[Batch, Active], Array]
Writer = Callable[[Batch, Array, Active], None]


def refused(instruction: Instruction, reason: str) -> RefusedPTX:
    return RefusedPTX(f"{instruction.name}: {reason} ({instruction.text}, {instruction.line})")


def reader(instruction: Instruction, operand: Operand, kind: str) -> Reader:
    """A function that returns an operand as numbers of a type."""
    dtype, size = TYPES[kind], SIZES[kind]
    if isinstance(operand, Immediate):
        bits = operand.bits & ((1 << 8 * size) - 1)
        raw = np.array([[bits != 0]]) if kind == "pred" else np.frombuffer(bits.to_bytes(size, "little"), dtype)
        constant = raw.reshape(1, 1)
        return lambda batch, active: constant
    if not isinstance(operand, Register):
        raise refused(instruction, f"operand {operand} is not interpreted")
    register: Register = operand
    if (register.type == "pred") != (kind == "pred"):
        raise refused(instruction, f"register {register.name} is of type {register.type}, expected {kind}")
    if register.negated:
        return lambda batch, active: ~batch.read(register, instruction, active)
    if SIZES[register.type] == size:

        def read(batch: Batch, active: Active) -> Array:
            value = batch.read(register, instruction, active)
            return value if value.dtype is dtype else value.view(dtype)

        return read
    own, needed = np.dtype(f"uint{8 * SIZES[register.type]}"), np.dtype(f"uint{8 * size}")
    return lambda batch, active: batch.read(register, instruction, active).view(own).astype(needed).view(dtype)


def address_reader(instruction: Instruction, operand: Operand, kind: str) -> Callable[[Batch, Active], Array]:
    """A function that returns the addresses of the active lanes [k]; ``kind`` is their type."""
    if not isinstance(operand, Address):
        raise refused(instruction, "expected an address")
    base, offset = reader(instruction, operand.base, kind), operand.offset
    return lambda batch, active: batch.flat(base(batch, active).astype(np.int64) + offset, active)


def writer(instruction: Instruction, operand: Operand, kind: str) -> Writer:
    """A function that stores numbers of a type in a register. Narrower ones are extended, by their sign if signed."""
    if operand is None:
        return lambda batch, value, active: None
    if not isinstance(operand, Register):
        raise refused(instruction, f"result {operand} is not interpreted")
    register: Register = operand
    if (register.type == "pred") != (kind == "pred") or SIZES[register.type] < SIZES[kind]:
        raise refused(instruction, f"register {register.name} is of type {register.type}, expected {kind}")
    if SIZES[register.type] == SIZES[kind]:
        return lambda batch, value, active: batch.write(register, value, active)
    extended = np.dtype(f"{'int' if kind[0] == 's' else 'uint'}{8 * SIZES[register.type]}")
    own = np.dtype(f"{'int' if kind[0] == 's' else 'uint'}{8 * SIZES[kind]}")
    return lambda batch, value, active: batch.write(register, value.view(own).astype(extended), active)
