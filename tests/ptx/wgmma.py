"""Products by a warpgroup (``wgmma``) of operands that lie in shared memory, or of A in registers.

They are asynchronous. Until ``wgmma.wait_group``, their accumulators may not be read and the shared memory that they
read may not change. Before them, writes to shared memory need ``fence.proxy.async``, and to registers ``wgmma.fence``.
"""

import re
from typing import NamedTuple

import numpy as np

from tests.ptx.lanes import Active, Batch
from tests.ptx.memory import THREAD, unordered, who
from tests.ptx.modifiers import Modifiers
from tests.ptx.operands import Operation, Reader, reader
from tests.ptx.parser import SHARED_BASE, Array, Immediate, Instruction, RefusedPTX, Register, Vector
from tests.ptx.tensor_cores import NUMBERS, accumulators, matrix_a

GROUP = 128  # threads of a warpgroup
SPAN = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row, by the descriptor's mode of swizzling
SWIZZLE = {0: 0, 1: 7, 2: 3, 3: 1}  # the bits of the row that are added to the number of a 16-byte unit, without carry
SIZES = {"bf16": 2, "f16": 2, "tf32": 4}


class Product(NamedTuple):
    """A wgmma on its way."""

    slots: list[int]  # of its accumulators
    places: Array  # records of shared memory
    granule: int  # the size of the records when the product began


def element_offsets(descriptor: int, rows: int, depth: int, itemsize: int, rows_adjacent: bool) -> Array:
    """Where in shared memory [rows, depth] the elements lie, in bytes.

    ``rows`` counts along M or N. They are adjacent in memory if the operand is "transposed", else those along K are.
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    mode = descriptor >> 62 & 3
    if descriptor >> 49 & 7:
        raise RefusedPTX("wgmma: a descriptor with a base offset is not interpreted")
    row, column = np.arange(rows)[:, None], np.arange(depth)[None, :]
    inner, outer = (row, column) if rows_adjacent else (column, row)  # adjacent in memory, and across
    width = SPAN[mode] // itemsize
    if mode and not rows_adjacent and depth > width:
        raise RefusedPTX("wgmma: an operand wider than its swizzle is not interpreted")
    next_inner, next_outer = (stride, leading) if rows_adjacent and mode == 0 else (leading, stride)
    at = start + inner % width * itemsize + outer % 8 * SPAN[mode]
    at = at + inner // width * next_inner + outer // 8 * next_outer
    return at ^ ((at >> 7 & SWIZZLE[mode]) << 4)


def wgmma(instruction: Instruction, modifiers: Modifiers) -> Operation:
    what = modifiers.need("fence", "commit_group", "wait_group", "mma_async")
    modifiers.need("sync")
    modifiers.need("aligned")
    if what == "mma_async":
        return multiply(instruction, modifiers)
    if what == "fence":
        return lambda batch, active: fence(batch)
    if what == "commit_group":
        return lambda batch, active: commit(batch, active)
    [kept] = instruction.operands
    assert isinstance(kept, Immediate)
    return lambda batch, active: wait(batch, active, kept.bits)


def groups_of(batch: Batch, active: Active) -> list[int]:
    """The warpgroups that take part."""
    return np.flatnonzero(active.mask.reshape(-1, GROUP).any(axis=1)).tolist()


def fence(batch: Batch) -> None:
    batch.fenced = True
    batch.touched_since_fence.clear()


def commit(batch: Batch, active: Active) -> None:
    for group in groups_of(batch, active):
        batch.products[group].append([])


def wait(batch: Batch, active: Active, kept: int) -> None:
    """End all but the last ``kept`` groups of products of each warpgroup. Those that no group has go on."""
    for group in groups_of(batch, active):
        queue = batch.products[group]
        while len(queue) - 1 > kept:
            end(batch, group, queue.pop(0))


def end(batch: Batch, group: int, products: list[Product]) -> None:
    for product in products:
        parts = product.granule // batch.shared.granule  # records may have been cut into smaller ones
        places = (product.places[:, None] * parts + np.arange(parts)).ravel()
        batch.shared.tensor_reads[places] -= 1
    lanes = np.zeros(batch.shape, bool)
    lanes.reshape(-1, GROUP)[group] = True
    going_on = {slot for others in batch.products[group] for other in others for slot in other.slots}
    for slot in {slot for product in products for slot in product.slots} - going_on:
        batch.in_flight[slot] = batch.in_flight[slot] & ~lanes
        if not batch.in_flight[slot].any():
            del batch.in_flight[slot]


class Form(NamedTuple):
    """An instruction ``wgmma.mma_async``, decoded."""

    instruction: Instruction
    kind: str
    columns: int
    depth: int
    results: list[Register]
    registers: list[Register]  # the results, and A if it is in registers
    a: list[Reader]  # four registers, or the descriptor
    b: Reader
    accumulates: Reader
    transposed: tuple[bool, bool]


def multiply(instruction: Instruction, modifiers: Modifiers) -> Operation:
    kind = modifiers.type(*SIZES)
    modifiers.need(kind)
    modifiers.need("f32")
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", modifiers.left[0] if modifiers.left else "")
    if shape is None or int(shape[2]) * SIZES[kind] != 32:
        raise modifiers.refused("the shape is not interpreted")
    modifiers.need(shape[0])
    result, a, b, scale, *immediates = instruction.operands
    from_registers = isinstance(a, Vector)
    numbers = [operand.bits if isinstance(operand, Immediate) else None for operand in immediates]
    if numbers[:2] != [1, 1]:
        raise modifiers.refused("a scale other than 1 is not interpreted")
    flags = [bool(number) for number in numbers[2:]] or [False, False]
    form = Form(
        instruction,
        kind,
        int(shape[1]),
        int(shape[2]),
        list(result.parts),
        [*result.parts, *(a.parts if from_registers else ())],
        [reader(instruction, part, "b32") for part in a.parts] if from_registers else [reader(instruction, a, "u64")],
        reader(instruction, b, "u64"),
        reader(instruction, scale, "pred"),
        (False, flags[0]) if from_registers else (flags[0], flags[1]),
    )
    if len(form.results) != form.columns // 2:
        raise modifiers.refused(f"found {len(form.results)} accumulators")
    return lambda batch, active: run(form, batch, active)


def run(form: Form, batch: Batch, active: Active) -> None:
    instruction = form.instruction
    groups = groups_of(batch, active)
    if not active.mask.reshape(-1, GROUP)[groups].all():
        batch.findings.add("lanes of a warpgroup are missing", instruction, "a part of it executes the product")
    check_fence(form, batch)
    # Products may follow each other into the same accumulators, without a fence or a wait.
    state = batch.in_flight, batch.touched_since_fence
    batch.in_flight, batch.touched_since_fence = {}, set()
    sources = [np.broadcast_to(read(batch, active), batch.shape).reshape(-1, GROUP) for read in form.a]
    b = np.broadcast_to(form.b(batch, active), batch.shape).reshape(-1, GROUP)
    product = np.zeros((batch.count * batch.threads // 32, 16, form.columns))
    places: dict[int, Array] = {}
    for group in groups:
        right, used = operand(form, batch, group, int(b[group, 0]), form.columns, form.transposed[1])
        if len(sources) == 4:
            left = matrix_a([source[group].reshape(4, 32) for source in sources], form.kind).reshape(64, -1)
        else:
            left, more = operand(form, batch, group, int(sources[0][group, 0]), 64, form.transposed[0])
            used = np.concatenate([used, more])
        product[4 * group : 4 * group + 4] = (left.astype(np.float64) @ right.astype(np.float64).T).reshape(4, 16, -1)
        places[group] = used
    accumulates = form.accumulates(batch, active)
    for number, total in enumerate(accumulators(product)):
        register = form.results[number]
        total = total.reshape(batch.shape)
        if accumulates.any():
            total = total + np.where(accumulates, batch.read(register, instruction, active).view(np.float32), 0)
        batch.write(register, total.astype(np.float32), active)
    batch.in_flight, batch.touched_since_fence = state
    note(form, batch, active, places)
    batch.counts.multiply_adds += len(groups) * 64 * form.columns * form.depth


def check_fence(form: Form, batch: Batch) -> None:
    """Accumulators, and A in registers, may not be touched between the fence and the product."""
    late = [register.name for register in form.registers if register.slot in batch.touched_since_fence]
    if late or not batch.fenced:
        details = f"{late[0]} was touched after it" if batch.fenced else "found none before"
        batch.findings.add("a product without wgmma.fence", form.instruction, details)


def note(form: Form, batch: Batch, active: Active, places: dict[int, Array]) -> None:
    slots = [register.slot for register in form.results]
    for slot in slots:
        batch.in_flight[slot] = batch.in_flight.get(slot, np.zeros(batch.shape, bool)) | active.mask
    for group, used in places.items():
        used = np.unique(used)
        batch.shared.tensor_reads[used] += 1
        batch.products[group][-1].append(Product(slots, used, batch.shared.granule))


def operand(
    form: Form, batch: Batch, group: int, descriptor: int, rows: int, rows_adjacent: bool
) -> tuple[Array, Array]:
    """An operand [rows, depth] in shared memory, and the records of its memory."""
    itemsize, region = SIZES[form.kind], batch.shared
    offsets = element_offsets(descriptor, rows, form.depth, itemsize, rows_adjacent) - SHARED_BASE
    if offsets.min() < 0 or offsets.max() + itemsize > batch.shared_bytes:
        details = f"warpgroup {group}, bytes {offsets.min()} to {offsets.max() + itemsize} of {batch.shared_bytes}"
        batch.findings.add("shared memory out of bounds", form.instruction, details)
        offsets = np.clip(offsets, 0, batch.shared_bytes - itemsize)
    block = group * GROUP // batch.threads
    offsets = offsets + block * region.per_block
    places = np.unique(offsets // region.granule)
    check_operand(form, batch, group, places)
    bits = region.data.view(f"uint{8 * itemsize}")[offsets // itemsize].astype(np.uint32)
    return NUMBERS[form.kind](bits)[..., 0], places


def check_operand(form: Form, batch: Batch, group: int, places: Array) -> None:
    """Every warp of the group may read all of an operand, so that another warp's writes need a barrier."""
    region, findings = batch.shared, batch.findings
    first = batch.stamps.ravel()[group * GROUP]
    stamps = first + (np.arange(4) << THREAD + 5)
    where = f"warpgroup {group} of the blocks that run together, block {int(first) >> 39}"
    if (~region.defined[places]).any():
        findings.add("memory is read that nobody wrote", form.instruction, where)
    if region.filling[places].any():
        findings.add("memory is touched while cp.async fills it", form.instruction, where)
    if region.unfenced[places].any():
        findings.add("a product without fence.proxy.async after the writes", form.instruction, where)
    writers = region.writer[places]
    bad = np.zeros(len(places), bool)
    for stamp in stamps:
        bad |= unordered(writers, np.full_like(writers, stamp))
    if bad.any():
        other = who(writers[np.flatnonzero(bad)[0]])
        findings.add("race, read after write", form.instruction, f"{where}, with {other}")
    region.lowest_reader[places], region.highest_reader[places] = stamps[0], stamps[-1]
    region.read_at[places] = form.instruction.index
