"""Products of small matrices by a warp (``mma``), and the loads and stores of their fragments.

Lane 4g + q of a warp holds elements of row g of the operands' 8 × 8 parts, and of columns 2q and 2q + 1. Products and
their sums are computed in fp64 and rounded once: more exact than a tensor core.
"""

from collections.abc import Callable

import numpy as np

from tests.ptx.conversions import from_bf16
from tests.ptx.lanes import Active, Batch
from tests.ptx.modifiers import Modifiers
from tests.ptx.operands import Operation, address_reader, reader, writer
from tests.ptx.parser import Array, Instruction, Vector
from tests.ptx.warps import warps_of

FULL_WARP = "lanes of a warp are missing"


def halves(register: Array) -> Array:
    """The two 16-bit numbers of each register, [..., 2]."""
    return np.ascontiguousarray(register, np.uint32)[..., None].view(np.uint16)


def truncated_tf32(register: Array) -> Array:
    """Tensor cores read the upper 19 bits of fp32."""
    return (register & np.uint32(0xFFFFE000)).view(np.float32)[..., None]


# The numbers that a 32-bit register holds, [..., 1 or 2].
NUMBERS: dict[str, Callable[[Array], Array]] = {
    "bf16": lambda register: from_bf16(halves(register)),
    "f16": lambda register: halves(register).view(np.float16).astype(np.float32),
    "tf32": truncated_tf32,
}


def matrix_a(registers: list[Array], kind: str) -> Array:
    """Operand A [warps, 16, 8 × numbers per register] from 4 registers [warps, 32]."""
    numbers = np.stack([NUMBERS[kind](register) for register in registers], axis=2)
    warps, width = len(numbers), numbers.shape[-1]
    # [warp, g, q, half of the columns, half of the rows, number]
    return numbers.reshape(warps, 8, 4, 2, 2, width).transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 8 * width)


def matrix_b(registers: list[Array], kind: str) -> Array:
    """Operand B, transposed: [warps, 8, 8 × numbers per register] from 2 registers [warps, 32]."""
    numbers = np.stack([NUMBERS[kind](register) for register in registers], axis=2)
    warps, width = len(numbers), numbers.shape[-1]
    return numbers.reshape(warps, 8, 4, 2, width).transpose(0, 1, 3, 2, 4).reshape(warps, 8, 8 * width)


def accumulators(product: Array) -> Array:
    """The registers [n / 2, warps × 32] of the warps' results [warps, 16, n]."""
    warps, _, columns = product.shape
    parts = product.reshape(warps, 2, 8, columns // 8, 4, 2)  # [warp, half of the rows, g, part, q, number]
    return parts.transpose(3, 1, 5, 0, 2, 4).reshape(columns // 2, warps * 32)


def check_whole_warps(batch: Batch, active: Active, instruction: Instruction) -> None:
    if not active.whole_warps():
        batch.findings.add(FULL_WARP, instruction, "part of a warp executes it")


MMA_SHAPES = {("m16n8k16", "bf16"): 16, ("m16n8k16", "f16"): 16, ("m16n8k8", "tf32"): 8}  # and their depth


def mma(instruction: Instruction, modifiers: Modifiers) -> Operation:
    modifiers.type("f32")
    kind = modifiers.type("bf16", "f16", "tf32")
    for name in ("sync", "aligned", "row", "col", "f32", kind):
        modifiers.need(name)
    shape = modifiers.need(*(shape for shape, of in MMA_SHAPES if of == kind))
    depth = MMA_SHAPES[shape, kind]
    results, a, b, c = (operand.parts for operand in instruction.operands if isinstance(operand, Vector))
    read_a, read_b = ([reader(instruction, one, "b32") for one in operand] for operand in (a, b))
    read_c, writers = (
        [reader(instruction, one, "f32") for one in c],
        [writer(instruction, one, "f32") for one in results],
    )

    def multiply(batch: Batch, active: Active) -> None:
        check_whole_warps(batch, active, instruction)
        left = matrix_a([warps_of(read(batch, active), batch) for read in read_a], kind)
        right = matrix_b([warps_of(read(batch, active), batch) for read in read_b], kind)
        products = accumulators(left.astype(np.float64) @ right.astype(np.float64).transpose(0, 2, 1))
        for product, read, write in zip(products, read_c, writers, strict=True):
            total = product.reshape(batch.shape) + read(batch, active)
            write(batch, total.astype(np.float32), active)
        batch.counts.multiply_adds += active.count // 32 * 16 * 8 * depth

    return multiply


# ---------------------------------------------------------------- fragments in shared memory


def count_of(modifiers: Modifiers) -> tuple[int, bool]:
    """How many 8 × 8 matrices, and whether they are transposed."""
    modifiers.type("b16")
    for name in ("sync", "aligned", "m8n8"):
        modifiers.need(name)
    if modifiers.take("shared", "shared::cta") is None:
        raise modifiers.refused("a generic address is not interpreted")
    return int(modifiers.need("x1", "x2", "x4")[1:]), bool(modifiers.take("trans"))


def of_rows(active: Active, count: int) -> Active:
    """The lanes that give the addresses of rows: 8 for each matrix."""
    rows = active.mask.reshape(-1, 32).copy()
    rows[:, 8 * count :] = False
    return Active(rows.reshape(active.mask.shape))


def ldmatrix(instruction: Instruction, modifiers: Modifiers) -> Operation:
    count, transposed = count_of(modifiers)
    result, address = instruction.operands
    writers = [writer(instruction, one, "b32") for one in (result.parts if isinstance(result, Vector) else (result,))]
    read_address = address_reader(instruction, address, "u32")

    def load(batch: Batch, active: Active) -> None:
        check_whole_warps(batch, active, instruction)
        rows = active if count == 4 else of_rows(active, count)
        values = batch.load_shared(instruction, read_address(batch, rows), 16, 2, rows)  # [rows, 8]
        whole = np.zeros((*batch.shape, 8), np.uint16).reshape(-1, 8)
        whole[rows.indices] = values
        matrices = whole.reshape(-1, 4, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        for number, write in enumerate(writers):
            pairs = np.ascontiguousarray(matrices[:, number]).view(np.uint32)  # [warps, g, q]
            write(batch, pairs.reshape(batch.shape), active)

    return load


def stmatrix(instruction: Instruction, modifiers: Modifiers) -> Operation:
    count, transposed = count_of(modifiers)
    address, source = instruction.operands
    readers = [reader(instruction, one, "b32") for one in (source.parts if isinstance(source, Vector) else (source,))]
    read_address = address_reader(instruction, address, "u32")

    def store(batch: Batch, active: Active) -> None:
        check_whole_warps(batch, active, instruction)
        rows = active if count == 4 else of_rows(active, count)
        matrices = np.zeros((batch.count * batch.threads // 32, 4, 8, 8), np.uint16)
        for number, read in enumerate(readers):
            pairs = halves(warps_of(read(batch, active), batch)).reshape(-1, 8, 8)
            matrices[:, number] = pairs.transpose(0, 2, 1) if transposed else pairs
        values = matrices.reshape(-1, 8)
        batch.store_shared(instruction, read_address(batch, rows), values if rows.full else values[rows.indices], rows)

    return store
