"""Instructions in which the lanes of a warp take part together: shuffles, reductions, the barrier of a warp."""

import numpy as np

from tests.ptx.lanes import Active, Batch
from tests.ptx.memory import who
from tests.ptx.modifiers import Modifiers
from tests.ptx.operands import Operation, reader, writer
from tests.ptx.parser import Array, Instruction, Vector

REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
LANE = np.arange(32)


def warps_of(value: Array, batch: Batch) -> Array:
    """A value as [warps, 32]."""
    return np.broadcast_to(value, batch.shape).reshape(-1, 32)


def check_members(batch: Batch, active: Active, members: Array, instruction: Instruction) -> None:
    """All lanes that ``members`` names must execute the instruction, and no others."""
    named = (warps_of(members, batch) >> LANE.astype(np.uint32) & np.uint32(1)).astype(bool)
    lanes = active.mask.reshape(-1, 32)
    bad = np.flatnonzero((named != lanes) & lanes.any(axis=1)[:, None])
    if len(bad):
        what = "is named but does not execute it" if named.ravel()[bad[0]] else "executes it without being named"
        batch.findings.add("lanes of a warp are missing", instruction, f"{who(batch.stamps.ravel()[bad[0]])} {what}")


def source_lanes(mode: str, by: Array, clamp: Array) -> tuple[Array, Array]:
    """The lane that each lane [warps, 32] reads, and whether that one is in its segment; else it reads itself."""
    by, clamp = by.astype(np.int64), clamp.astype(np.int64)
    segment, limit = (clamp >> 8) & 31, clamp & 31
    lowest, highest = LANE & segment, (LANE & segment) | (limit & ~segment)
    distance = by & 31
    if mode == "up":
        lane = LANE - distance
        inside = lane >= highest  # for `up` the limit is the lowest lane
    elif mode == "down":
        lane = LANE + distance
        inside = lane <= highest
    elif mode == "bfly":
        lane = LANE ^ distance
        inside = lane <= highest
    else:
        lane = lowest | (distance & ~segment)
        inside = lane <= highest
    return np.where(inside, lane, LANE), inside


def shfl(instruction: Instruction, modifiers: Modifiers) -> Operation:
    modifiers.type("b32")
    modifiers.need("sync")
    mode = modifiers.need("up", "down", "bfly", "idx")
    result, source, by, clamp, members = instruction.operands
    pair = result.parts if isinstance(result, Vector) else (result, None)
    write, write_inside = writer(instruction, pair[0], "b32"), writer(instruction, pair[1], "pred")
    read, read_by, read_clamp, read_members = (reader(instruction, one, "u32") for one in (source, by, clamp, members))

    def shuffle(batch: Batch, active: Active) -> None:
        check_members(batch, active, read_members(batch, active), instruction)
        lane, inside = source_lanes(
            mode, warps_of(read_by(batch, active), batch), warps_of(read_clamp(batch, active), batch)
        )
        present = np.take_along_axis(active.mask.reshape(-1, 32), lane, axis=1)
        if (absent := active.mask.reshape(-1, 32) & ~present).any():
            details = who(batch.stamps.ravel()[np.flatnonzero(absent)[0]])
            batch.findings.add("a shuffle reads a lane that does not take part", instruction, details)
        value = np.take_along_axis(warps_of(read(batch, active), batch), lane, axis=1)
        write(batch, value.reshape(batch.shape), active)
        write_inside(batch, np.broadcast_to(inside, lane.shape).reshape(batch.shape), active)

    return shuffle


def redux(instruction: Instruction, modifiers: Modifiers) -> Operation:
    kind = modifiers.type("u32", "s32", "b32")
    modifiers.need("sync")
    reduction = REDUCTIONS[modifiers.need(*REDUCTIONS)]
    result, source, members = instruction.operands
    read, write = reader(instruction, source, kind), writer(instruction, result, kind)
    read_members = reader(instruction, members, "u32")  # Triton has them in a register

    def reduce(batch: Batch, active: Active) -> None:
        named = read_members(batch, active)
        if ((named != 0xFFFFFFFF) & active.mask).any():
            raise modifiers.refused("a part of a warp is not interpreted")
        check_members(batch, active, named, instruction)
        values = warps_of(read(batch, active), batch)
        write(batch, np.repeat(reduction.reduce(values, axis=1, dtype=values.dtype), 32).reshape(batch.shape), active)

    return reduce


def bar(instruction: Instruction, modifiers: Modifiers) -> Operation:
    """``bar.warp.sync``. Barriers of a block end a step (machine.py)."""
    modifiers.need("warp")
    modifiers.need("sync")
    read_members = reader(instruction, instruction.operands[0], "u32")

    def wait(batch: Batch, active: Active) -> None:
        check_members(batch, active, read_members(batch, active), instruction)
        batch.pass_warp_barrier(active, instruction)

    return wait
