"""The instructions that are interpreted, by the first part of their names. All others are refused."""

from collections.abc import Callable

from tests.ptx.arithmetic import RULES, Rule
from tests.ptx.conversions import cvt, prmt
from tests.ptx.copies import atom, cp, fence, red
from tests.ptx.lanes import Active, Batch
from tests.ptx.modifiers import Modifiers
from tests.ptx.movement import cvta, ld, mov, st
from tests.ptx.operands import Operation, reader, writer
from tests.ptx.parser import Instruction
from tests.ptx.tensor_cores import ldmatrix, mma, stmatrix
from tests.ptx.warps import bar, redux, shfl
from tests.ptx.wgmma import wgmma

LANEWISE: dict[str, Callable[[Modifiers], Rule]] = {**RULES, "cvt": cvt, "prmt": prmt}

OTHERS: dict[str, Callable[[Instruction, Modifiers], Operation]] = {
    "ld": ld,
    "st": st,
    "mov": mov,
    "cvta": cvta,
    "shfl": shfl,
    "redux": redux,
    "bar": bar,
    "fence": fence,
    "cp": cp,
    "red": red,
    "atom": atom,
    "mma": mma,
    "ldmatrix": ldmatrix,
    "stmatrix": stmatrix,
    "wgmma": wgmma,
}


def decode(instruction: Instruction) -> Operation:
    """Return the operation that an instruction performs on a batch of blocks, without its guard."""
    modifiers = Modifiers(instruction)
    if instruction.opcode in LANEWISE:
        operation = lanewise(instruction, LANEWISE[instruction.opcode](modifiers), modifiers)
    elif instruction.opcode in OTHERS:
        operation = OTHERS[instruction.opcode](instruction, modifiers)
    else:
        raise modifiers.refused("the instruction is not interpreted")
    modifiers.end()
    return operation


def lanewise(instruction: Instruction, rule: Rule, modifiers: Modifiers) -> Operation:
    result, *sources = instruction.operands
    if len(sources) != len(rule.sources):
        raise modifiers.refused(f"found {len(sources)} operands, expected {len(rule.sources)}")
    function, write = rule.function, writer(instruction, result, rule.result)
    readers = [reader(instruction, source, kind) for source, kind in zip(sources, rule.sources, strict=True)]

    def execute(batch: Batch, active: Active) -> None:
        write(batch, function(*[read(batch, active) for read in readers]), active)

    return execute
