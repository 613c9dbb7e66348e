"""Copies that go on while the kernel does (``cp.async``), fences, and atomic additions."""

import numpy as np

from tests.ptx.lanes import Active, Batch, Copy
from tests.ptx.memory import BLOCK, THREAD, Access
from tests.ptx.modifiers import Modifiers
from tests.ptx.movement import parts, space
from tests.ptx.operands import Operation, address_reader, reader, writer
from tests.ptx.parser import SIZES, TYPES, Array, Immediate, Instruction, Operand


def cp(instruction: Instruction, modifiers: Modifiers) -> Operation:
    modifiers.need("async")
    what = modifiers.take("commit_group", "wait_group", "wait_all")
    if what == "commit_group":
        return commit
    if what == "wait_all":
        return lambda batch, active: wait(batch, active, None)
    if what == "wait_group":
        [kept] = instruction.operands
        assert isinstance(kept, Immediate)
        return lambda batch, active: wait(batch, active, kept.bits)
    modifiers.need("ca", "cg")
    modifiers.need("shared", "shared::cta")
    modifiers.need("global")
    return copy(instruction, modifiers)


def copy(instruction: Instruction, modifiers: Modifiers) -> Operation:
    target, source, count, *filled = instruction.operands
    if not isinstance(count, Immediate) or count.bits not in (4, 8, 16):
        raise modifiers.refused("the size is not interpreted")
    size = count.bits
    read_target, read_source = address_reader(instruction, target, "u32"), address_reader(instruction, source, "u64")
    read_filled = reader(instruction, filled[0] if filled else Immediate(size), "u32")

    def start(batch: Batch, active: Active) -> None:
        wanted = read_filled(batch, active)
        if ((wanted != 0) & (wanted != size) & active.mask).any():
            raise modifiers.refused("a copy of a part of its size is not interpreted")
        values = np.zeros((active.count, size // 4), np.uint32)
        loading = active.where(wanted != 0)
        if loading.count:
            loaded = batch.load_global(instruction, read_source(batch, loading), size, 4, loading)
            values[np.searchsorted(active.indices, loading.indices)] = loaded
        access, inside = batch.shared_access(instruction, read_target(batch, active), size, active)
        batch.shared.begin_filling(access)
        lanes = active.indices[inside]
        group = batch.copy_group.ravel()[lanes]
        batch.copies.append(Copy(instruction, lanes, access.offsets, values[inside], group))

    return start


def commit(batch: Batch, active: Active) -> None:
    batch.copy_group = batch.copy_group + active.mask


def wait(batch: Batch, active: Active, kept: int | None) -> None:
    """End all copies of each lane but those of its last ``kept`` groups; with None, also those that no group has."""
    limit = np.iinfo(np.int64).max if kept is None else batch.copy_group.ravel() - kept
    limit = np.broadcast_to(limit, batch.copy_group.size)
    waiting, mask = [], active.mask.reshape(-1)
    for one in batch.copies:
        done = mask[one.lanes] & (one.group < limit[one.lanes])
        if done.any():
            finish(batch, part_of(one, done))
        if not done.all():
            waiting.append(part_of(one, ~done))
    batch.copies = waiting


def part_of(one: Copy, lanes: Array) -> Copy:
    if lanes.all():
        return one
    return Copy(one.instruction, one.lanes[lanes], one.offsets[lanes], one.values[lanes], one.group[lanes])


def finish(batch: Batch, one: Copy) -> None:
    stamps = batch.stamps.ravel()[one.lanes]
    access = Access(one.instruction, one.offsets, stamps, one.values.shape[1] * one.values.itemsize)
    batch.shared.end_filling(access, one.values)


def fence(instruction: Instruction, modifiers: Modifiers) -> Operation:
    """``fence.proxy.async``: products of warpgroups see what the lanes have written to shared memory."""
    modifiers.need("proxy")
    modifiers.need("async")
    modifiers.take("shared::cta")

    def execute(batch: Batch, active: Active) -> None:
        region = batch.shared
        places = np.flatnonzero(region.unfenced)
        stamps = region.writer[places]
        first = int(batch.stamps[0, 0]) >> BLOCK
        lanes = ((stamps >> BLOCK) - first) * batch.threads + (stamps >> THREAD & 1023)
        region.unfenced[places[active.mask.reshape(-1)[lanes]]] = False

    return execute


# ---------------------------------------------------------------- atomic additions


def red(instruction: Instruction, modifiers: Modifiers) -> Operation:
    return addition(instruction, modifiers, *instruction.operands, None)


def atom(instruction: Instruction, modifiers: Modifiers) -> Operation:
    result, target, source = instruction.operands
    return addition(instruction, modifiers, target, source, result)


def addition(
    instruction: Instruction, modifiers: Modifiers, target: Operand, source: Operand, result: Operand
) -> Operation:
    """Lanes add one after the other, in their order, and get what was there before. A GPU has no fixed order."""
    kind = modifiers.type("f32", "f64", "u32", "s32", "u64")
    space(modifiers, "global")
    modifiers.need("add")
    modifiers.take("relaxed", "release", "acq_rel")
    modifiers.take("gpu", "cta", "sys")
    registers = parts(source, modifiers)
    readers = [reader(instruction, one, kind) for one in registers]
    address, size = address_reader(instruction, target, "u64"), SIZES[kind] * len(registers)
    if result is not None and len(registers) > 1:
        raise modifiers.refused("a vector with a result is not interpreted")
    write = writer(instruction, result, kind)

    def add(batch: Batch, active: Active) -> None:
        values = np.stack([batch.flat(read(batch, active), active) for read in readers], axis=1)
        access = batch.access(instruction, address(batch, active), size, active, atomic=True)
        batch.counts.atomics += active.count
        before = np.zeros(active.mask.shape, TYPES[kind])
        for region, lanes, part in batch.memory.split(access):
            region.write(part, np.zeros(len(part.offsets), bool))
            rows, at = region.units(part, SIZES[kind])
            if result is not None:
                before.reshape(-1)[active.indices[lanes]] = values_before(rows.view(TYPES[kind]), at, values[lanes])
            np.add.at(rows.view(TYPES[kind]), at, values[lanes])
        write(batch, before, active)

    return add


def values_before(rows: Array, at: Array, values: Array) -> Array:
    """Return the value in memory before each lane of an atomic addition: earlier lanes may have added to its place."""
    if len(np.unique(at)) == len(at):
        return rows[at, 0]
    rows, before = rows.copy(), np.empty(len(at), rows.dtype)
    for lane, (row, value) in enumerate(zip(at, values[:, 0], strict=True)):
        before[lane] = rows[row, 0]
        rows[row, 0] += value
    return before
