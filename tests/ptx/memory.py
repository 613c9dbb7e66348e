"""Global and shared memory: bytes, exact bounds, and who touched them last, from which races follow.

Two accesses to the same bytes, at least one of them a write, are ordered only

- within a block by a barrier, or between lanes of one warp also by ``bar.warp.sync``;
- in one thread by the program.

Accesses of two blocks are never ordered. All others are races, also when the value that is stored is there already,
but for one exception: threads of a block may store the same value by the same instruction. Triton's compiler lets them
do so where a tensor is smaller than the block.
Atomic additions race only with accesses that are not atomic. A stamp says which thread accessed memory, and when:

    block << 39 | barriers that the block has passed << 23 | thread << 13 | its ``bar.warp.sync`` since the last barrier
"""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from tests.ptx.counts import Traffic
from tests.ptx.findings import Findings
from tests.ptx.parser import Array, Instruction

THREAD, BARRIER, BLOCK = 13, 23, 39  # the lowest bit of each field of a stamp
LANES, WARP = 1 << THREAD, 1 << THREAD + 5
NOBODY, SEVERAL = -1, -2
POISON = np.frombuffer(bytes.fromhex("addec57f"), np.uint8)  # of memory that nobody wrote: a NaN in fp32 and in bf16


class Allocation(NamedTuple):
    """The bytes of global memory that a kernel may touch. ``fresh`` ones must be written before they are read."""

    name: str
    address: int
    size: int
    fresh: bool = False


class Access(NamedTuple):
    """One access by several lanes at once: each touches ``size`` bytes at its own offset."""

    instruction: Instruction
    offsets: Array  # [k] in bytes
    stamps: Array  # [k], ascending
    size: int
    atomic: bool = False


class Touch(NamedTuple):
    """An access by records: the ``places`` that it touches, and the stamps of those who touch them."""

    instruction: Instruction
    places: Array  # [k × records per access]
    stamps: Array


class Region:
    """Bytes with a record for each granule, the smallest access so far: accesses are aligned to their own size."""

    def __init__(
        self,
        name: str,
        data: Array,  # [bytes]
        findings: Findings,
        instructions: list[Instruction],  # of the kernel, to name those of earlier accesses
        lead: int,  # bytes from a multiple of 16 to the first one
        fresh: bool,
        per_block: int | None = None,  # bytes that each block has, in shared memory
    ) -> None:
        self.name, self.data, self.findings, self.instructions = name, data, findings, instructions
        self.lead, self.per_block, self.shared = lead, per_block, per_block is not None
        self.granule = 16
        count = -(-(len(data) + self.lead) // 16)
        self.writer = np.full(count, NOBODY, np.int64)
        self.lowest_reader = np.full(count, NOBODY, np.int64)  # of those since the reading block's last barrier
        self.highest_reader = np.full(count, NOBODY, np.int64)
        self.written_at = np.zeros(count, np.int32)  # indices of instructions
        self.read_at = np.zeros(count, np.int32)
        self.block = np.full(count, NOBODY, np.int64)  # the only one that touched it
        self.atomic = np.zeros(count, bool)  # whether the last write was
        self.defined = np.full(count, not fresh)
        self.filling = np.zeros(count, bool)  # a cp.async is on its way
        self.unfenced = np.zeros(count, bool)  # written since the last fence for the asynchronous proxy
        self.tensor_reads = np.zeros(count, np.int16)  # wgmma on their way
        self.records = [name for name, value in vars(self).items() if isinstance(value, np.ndarray) and name != "data"]
        self.checks_definition = fresh
        self.warps_wait = False  # whether any warp has passed a barrier of its own
        self.traffic = Traffic()

    def refine(self, size: int) -> None:
        for name in self.records:
            setattr(self, name, np.repeat(getattr(self, name), self.granule // size))
        self.granule = size

    def touch(self, access: Access) -> Touch:
        if access.size < self.granule:
            self.refine(access.size)
        first, count = (access.offsets + self.lead) // self.granule, access.size // self.granule
        if count == 1:
            return Touch(access.instruction, first, access.stamps)
        places = (first[:, None] + np.arange(count)).ravel()
        return Touch(access.instruction, places, np.repeat(access.stamps, count))

    def units(self, access: Access, itemsize: int) -> tuple[Array, Array]:
        """The data as rows of the size of an access [n, size / itemsize], and the row of each lane."""
        start = -self.lead % access.size  # the first address that is a multiple of the size
        end = start + (len(self.data) - start) // access.size * access.size
        rows = self.data[start:end].view(f"uint{8 * itemsize}").reshape(-1, access.size // itemsize)
        return rows, (access.offsets - start) // access.size

    # ------------------------------------------------------------ accesses

    def load(self, access: Access, itemsize: int) -> Array:
        """Each lane's bytes, [k, size / itemsize] unsigned."""
        self.read(access)
        rows, at = self.units(access, itemsize)
        return rows[at]

    def store(self, access: Access, values: Array) -> None:
        """Write each lane's values, [k, size / itemsize] unsigned."""
        rows, at = self.units(access, values.itemsize)
        self.write(access, (rows[at] == values).all(axis=1))
        rows[at] = values
        lost = (rows[at] != values).any(axis=1)
        if lost.any():
            touch = self.touch(access)
            lost = np.repeat(lost, len(touch.places) // len(lost))
            self.check(lost, "threads store different values at once", touch)

    def read(self, access: Access) -> None:
        touch = self.touch(access)
        instruction, places, stamps = touch
        self.traffic.loaded += access.size * len(access.offsets)
        writer = self.writer[places]
        self.check(unordered(writer, stamps), "race, read after write", touch, writer, self.written_at)
        if self.checks_definition:
            self.check(~self.defined[places], "memory is read that nobody wrote", touch)
        if self.shared:
            self.check_filling(touch)
        elif self.touched_by_several(touch):
            foreign = (writer != NOBODY) & (self.block[places] == SEVERAL)
            self.check(foreign, "race between blocks, read and write", touch, writer, self.written_at)
        lowest, highest = self.lowest_reader[places], self.highest_reader[places]
        superseded = ordered_by_warp(lowest, highest, stamps) if self.warps_wait else False
        lowest = np.where(superseded | earlier(lowest, stamps), stamps, np.minimum(lowest, stamps))
        highest = np.where(superseded | earlier(highest, stamps), stamps, np.maximum(highest, stamps))
        # Stamps ascend. Where several lanes have a place, the one that is assigned last stays.
        self.lowest_reader[places[::-1]] = lowest[::-1]
        self.highest_reader[places] = highest
        self.read_at[places] = instruction.index

    def write(self, access: Access, unchanged: Array) -> None:
        """Record a write. ``unchanged`` [k]: whether a lane stores the value that is there already."""
        touch = self.touch(access)
        instruction, places, stamps = touch
        self.traffic.stored += access.size * len(access.offsets)
        writer = self.writer[places]
        bad = unordered(writer, stamps)
        if bad.any():
            again = self.written_at[places] == instruction.index
            allowed = again & np.repeat(unchanged, len(places) // len(unchanged))
            bad &= ~(self.atomic[places] if access.atomic else allowed)
            self.check(bad, "race, write after write", touch, writer, self.written_at)
        for reader in (self.lowest_reader[places], self.highest_reader[places]):
            self.check(unordered(reader, stamps), "race, write after read", touch, reader, self.read_at)
        if access.atomic and self.checks_definition:
            self.check(~self.defined[places], "memory is read that nobody wrote", touch)
        self.writer[places] = stamps
        if self.shared:
            self.check_filling(touch)
            self.check_tensor_reads(touch)
            self.unfenced[places] = True
        elif self.touched_by_several(touch):
            self.check_blocks(touch, writer, access.atomic)
        self.written_at[places] = instruction.index
        self.atomic[places] = access.atomic
        self.defined[places] = True

    def begin_filling(self, access: Access) -> None:
        """A ``cp.async`` starts to write."""
        touch = self.touch(access)
        self.check(self.filling[touch.places], "two cp.async fill the same memory", touch)
        self.check_tensor_reads(touch)
        for others, at in (
            (self.writer[touch.places], self.written_at),
            (self.lowest_reader[touch.places], self.read_at),
            (self.highest_reader[touch.places], self.read_at),
        ):
            self.check(unordered(others, touch.stamps), "race, cp.async over memory in use", touch, others, at)
        self.filling[touch.places] = True

    def end_filling(self, access: Access, values: Array) -> None:
        """The bytes that a ``cp.async`` has copied are there for the lane that waited; for others, after a barrier."""
        self.filling[self.touch(access).places] = False
        self.store(access, values)

    def final_traffic(self) -> Traffic:
        """The traffic, with the bytes that were touched at least once."""
        loaded, stored = (np.count_nonzero(x != NOBODY) * self.granule for x in (self.lowest_reader, self.writer))
        return replace(self.traffic, distinct_loaded=int(loaded), distinct_stored=int(stored))

    # ------------------------------------------------------------ checks

    def check_filling(self, touch: Touch) -> None:
        self.check(self.filling[touch.places], "memory is touched while cp.async fills it", touch)

    def check_tensor_reads(self, touch: Touch) -> None:
        self.check(self.tensor_reads[touch.places] > 0, "memory changes while a wgmma reads it", touch)

    def check_blocks(self, touch: Touch, writer: Array, atomic: bool) -> None:
        """Check a write to places that several blocks touch; ``writer``: who wrote them before."""
        places = touch.places
        bad, read = self.block[places] == SEVERAL, self.lowest_reader[places] != NOBODY
        if atomic:
            bad &= read | ((writer != NOBODY) & ~self.atomic[places])
        # Where nobody came before, the other block is among those that execute this instruction now.
        before = np.where(read, self.lowest_reader[places], writer)
        other = np.where(before == NOBODY, self.writer[places], before)
        self.check(bad, "race between blocks, two write or one reads", touch, other)

    def touched_by_several(self, touch: Touch) -> bool:
        """Note the block that touches each place. Return whether any place has been touched by several blocks."""
        own, known = touch.stamps >> BLOCK, self.block[touch.places]
        now = np.where((known == NOBODY) | (known == own), own, SEVERAL)
        self.block[touch.places] = now
        differs = self.block[touch.places] != now  # several blocks at once
        if differs.any():
            self.block[touch.places[differs]] = SEVERAL
            return True
        return bool((now == SEVERAL).any())

    def check(
        self, bad: Array, mistake: str, touch: Touch, others: Array | None = None, others_at: Array | None = None
    ) -> None:
        """Report the first bad place, with the one who touched it before and, by ``others_at``, the line."""
        if not bad.any():
            return
        first = int(np.flatnonzero(bad)[0])
        place = touch.places[first]
        offset = (int(place) * self.granule - self.lead) % (self.per_block or len(self.data))
        details = f"{who(touch.stamps[first])}, byte {offset} of {self.name}"
        if others is not None and others[first] != NOBODY:
            details += f", with {who(others[first])}"
            if others_at is not None:
                details += f" at {self.instructions[others_at[place]].line}"
        self.findings.add(mistake, touch.instruction, details)


def who(stamp: int) -> str:
    block, thread = int(stamp) >> BLOCK, (int(stamp) >> THREAD) & 1023
    return f"thread {thread} (warp {thread // 32}) of block {block}"


def unordered(earlier_stamps: Array, stamps: Array) -> Array:
    """Whether no barrier lies between two accesses of a block by two warps, or by two lanes of a warp."""
    apart = earlier_stamps ^ stamps  # negative where nobody came before
    suspects = (apart >= LANES) & (apart < 1 << BARRIER)
    if suspects.any():
        suspects &= (apart >= WARP) | ((apart & (LANES - 1)) == 0)
    return suspects


def earlier(readers: Array, stamps: Array) -> Array:
    """Whether a reader was another block, or came before the block's last barrier, or never."""
    return (readers ^ stamps).view(np.uint64) >= np.uint64(1 << BARRIER)


def ordered_by_warp(lowest: Array, highest: Array, stamps: Array) -> Array:
    """Whether all readers are of the same warp as a new one, before its last ``bar.warp.sync``."""
    low, high = lowest ^ stamps, highest ^ stamps
    same_warp = (low >= 0) & (low < WARP) & (high >= 0) & (high < WARP)
    return same_warp & ((low & (LANES - 1)) != 0) & ((high & (LANES - 1)) != 0)


# ---------------------------------------------------------------- global memory


def bytes_at(address: int, size: int) -> Array:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


class GlobalMemory:
    """The allocations. Those that overlap, such as views of one tensor, are one region."""

    def __init__(self, allocations: Sequence[Allocation], findings: Findings, instructions: list[Instruction]) -> None:
        merged: list[Allocation] = []
        for new in sorted((a for a in allocations if a.size), key=lambda a: (a.address, -a.size)):
            last = merged[-1] if merged else None
            if last and new.address < last.address + last.size:
                end = max(last.address + last.size, new.address + new.size)
                name = last.name if last.name == new.name else f"{last.name}+{new.name}"
                merged[-1] = Allocation(name, last.address, end - last.address, last.fresh and new.fresh)
            else:
                merged.append(new)
        self.findings = findings
        self.starts = np.array([a.address for a in merged], np.int64)
        self.ends = np.array([a.address + a.size for a in merged], np.int64)
        self.regions = [
            Region(a.name, bytes_at(a.address, a.size), findings, instructions, a.address % 16, a.fresh) for a in merged
        ]

    def split(self, access: Access) -> list[tuple[Region, Array | slice, Access]]:
        """An access by addresses as accesses by offsets in regions, each with the lanes that it is of."""
        addresses = access.offsets
        if not len(self.starts):
            self.report_outside(access, -1, 0)
            return []
        low, high = int(addresses.min()), int(addresses.max()) + access.size
        number = int(np.searchsorted(self.starts, low, "right")) - 1
        if number >= 0 and high <= self.ends[number]:
            return [(self.regions[number], slice(None), access._replace(offsets=addresses - self.starts[number]))]
        numbers = np.searchsorted(self.starts, addresses, "right") - 1
        inside = (numbers >= 0) & (addresses + access.size <= self.ends[numbers])
        if not inside.all():
            first = int(np.flatnonzero(~inside)[0])
            self.report_outside(access, int(numbers[first]), first)
        parts = []
        for number in np.unique(numbers[inside]):
            lanes = np.flatnonzero(inside & (numbers == number))
            part = access._replace(offsets=addresses[lanes] - self.starts[number], stamps=access.stamps[lanes])
            parts.append((self.regions[number], lanes, part))
        return parts

    def report_outside(self, access: Access, number: int, lane: int) -> None:
        address = int(access.offsets[lane])
        where = f"address {address:#x}, before all allocations"
        if number >= 0:
            beyond = address + access.size - int(self.ends[number])
            where = f"{beyond} bytes beyond the end of {self.regions[number].name}"
            if number + 1 < len(self.starts):
                after = self.regions[number + 1].name
                where += f", {int(self.starts[number + 1]) - address} bytes before {after}"
        self.findings.add("global memory out of bounds", access.instruction, f"{who(access.stamps[lane])}, {where}")
