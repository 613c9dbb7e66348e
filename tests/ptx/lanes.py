"""The state of the blocks that run together: registers of all lanes, memory, and which lanes take part in a step.

Lanes are arrays [blocks, threads of a block]. A register whose value is the same in all blocks, or in all threads, is
an array with 1 in that place, and NumPy's broadcasting keeps it so: an address that depends on the thread alone is
computed once for all blocks.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from tests.ptx.counts import Counts, sectors, wavefronts
from tests.ptx.findings import Findings
from tests.ptx.memory import BARRIER, BLOCK, LANES, POISON, THREAD, Access, GlobalMemory, Region, who
from tests.ptx.parser import (
    SHARED_BASE,
    SIZES,
    Array,
    Instruction,
    Kernel,
    RefusedPTX,
    Register,
    aligned,
)

Grid = tuple[int, int, int]


class Active:
    """The lanes that take part: ``mask`` [blocks, threads], their ``count``, and their flat ``indices``."""

    __slots__ = ("_indices", "count", "full", "mask")

    def __init__(self, mask: Array) -> None:
        self.mask = mask
        self.count = int(np.count_nonzero(mask))
        self.full = self.count == mask.size
        self._indices: Array | None = None

    @property
    def indices(self) -> Array:
        if self._indices is None:
            self._indices = np.flatnonzero(self.mask)
        return self._indices

    def where(self, condition: Array) -> "Active":
        """Return the lanes for which a condition holds."""
        if condition.size == 1:
            return self if condition.item() else Active(np.zeros_like(self.mask))
        if self.full:
            return Active(np.broadcast_to(condition, self.mask.shape))
        return Active(self.mask & condition)

    def without(self, others: "Active") -> "Active":
        return Active(self.mask & ~others.mask)

    def whole_warps(self) -> bool:
        """Whether every warp takes part with all its lanes, or with none."""
        if self.full:
            return True
        per_warp = self.mask.reshape(-1, 32).sum(axis=1)
        return bool(((per_warp == 0) | (per_warp == 32)).all())


class Copy(NamedTuple):
    """A ``cp.async`` on its way: what each lane copies, and the group that it belongs to."""

    instruction: Instruction
    lanes: Array  # [k]
    offsets: Array  # [k] in the shared region
    values: Array  # [k, size] bytes
    group: Array  # [k]


class Batch:
    """Some blocks of the grid, in the midst of a kernel."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Grid,
        block: Grid,
        blocks: range,
        parameters: Array,
        memory: GlobalMemory,
        dynamic_shared: int,
        findings: Findings,
        counts: Counts,
    ) -> None:
        self.kernel, self.findings, self.counts, self.memory = kernel, findings, counts, memory
        self.parameters = parameters
        self.threads, self.count = block[0] * block[1] * block[2], len(blocks)
        self.shape = (self.count, self.threads)
        self.everyone = Active(np.ones(self.shape, bool))
        numbers = np.arange(blocks.start, blocks.stop, dtype=np.int64)[:, None]
        thread = np.arange(self.threads, dtype=np.int64)[None, :]
        self.stamps = (numbers << BLOCK) | (thread << THREAD)
        self.warp = np.arange(self.count * self.threads) // 32  # of each flat lane, numbered across blocks
        self.values: list[Array | None] = [None] * len(kernel.registers)
        self.partly_defined: dict[int, Array] = {}  # lanes that have a value, for registers that not all lanes wrote
        self.in_flight: dict[int, Array] = {}  # lanes of accumulators that a wgmma still computes
        self.set_special_registers(numbers, thread, grid, block)
        static = kernel.static_shared
        self.shared_bytes = aligned(static, 16) + dynamic_shared if dynamic_shared else static  # of each block
        per_block = max(16, aligned(self.shared_bytes, 16))
        poison = np.tile(POISON, self.count * per_block // len(POISON))
        self.shared = Region("shared memory", poison, findings, kernel.instructions, 0, True, per_block)
        self.copies: list[Copy] = []
        self.copy_group = np.zeros(self.shape, np.int64)  # the number of groups that each lane has committed
        self.touched_since_fence: set[int] = set()  # registers, since the last wgmma.fence
        self.fenced = False
        # wgmma on their way, by warpgroup: the groups that it has committed, and the one that it has not yet
        self.products: dict[int, list[list]] = defaultdict(lambda: [[]])
        self.guarded = np.zeros(len(kernel.instructions), np.int64)  # lanes that executed a guarded instruction

    def set_special_registers(self, numbers: Array, thread: Array, grid: Grid, block: Grid) -> None:
        values = {"%laneid": thread % 32, "%warpid": thread // 32}
        for number, axis in enumerate("xyz"):
            below, blocks_below = int(np.prod(block[:number])), int(np.prod(grid[:number]))
            values[f"%tid.{axis}"] = thread // below % block[number]
            values[f"%ctaid.{axis}"] = numbers // blocks_below % grid[number]
            values[f"%ntid.{axis}"] = np.full((1, 1), block[number])
            values[f"%nctaid.{axis}"] = np.full((1, 1), grid[number])
        for name, slot in self.kernel.special.items():
            self.values[slot] = values[name].astype(np.uint32)

    # ------------------------------------------------------------ registers

    def read(self, register: Register, instruction: Instruction, active: Active) -> Array:
        slot = register.slot
        self.touched_since_fence.add(slot)
        value = self.values[slot]
        if value is None:
            self.findings.add("a register is read that nothing wrote", instruction, register.name)
            value = self.values[slot] = np.full((1, 1), poison_of(register.type))
        elif slot in self.partly_defined:
            lanes = active.mask & ~self.partly_defined[slot]
            self.report_lanes("a register is read that nothing wrote", register, instruction, lanes)
        if slot in self.in_flight:
            lanes = active.mask & self.in_flight[slot]
            self.report_lanes("an accumulator is read before wgmma.wait_group", register, instruction, lanes)
        return value

    def report_lanes(self, mistake: str, register: Register, instruction: Instruction, lanes: Array) -> None:
        if lanes.any():
            first = who(self.stamps[lanes][0])
            details = f"{register.name}, {first}, {np.count_nonzero(lanes)} lanes"
            self.findings.add(mistake, instruction, details)

    def write(self, register: Register, value: Array, active: Active) -> None:
        slot = register.slot
        self.touched_since_fence.add(slot)
        if active.full:
            self.values[slot] = value
            self.partly_defined.pop(slot, None)
            return
        old = self.values[slot]
        if old is None:
            self.partly_defined[slot] = active.mask
            old = np.full((1, 1), poison_of(register.type))
        elif slot in self.partly_defined:
            self.partly_defined[slot] = self.partly_defined[slot] | active.mask
        self.values[slot] = np.where(active.mask, value, old.view(value.dtype))

    # ------------------------------------------------------------ memory

    def flat(self, value: Array, active: Active) -> Array:
        """The values of the active lanes [k]."""
        whole = np.broadcast_to(value, self.shape).reshape(-1)
        return whole if active.full else whole[active.indices]

    def spread(self, values: Array, active: Active) -> Array:
        """Values of the active lanes [k] as an array of all lanes."""
        if active.full:
            return np.ascontiguousarray(values).reshape(self.shape)
        whole = np.zeros(self.count * self.threads, values.dtype)
        whole[active.indices] = values
        return whole.reshape(self.shape)

    def access(
        self, instruction: Instruction, addresses: Array, size: int, active: Active, atomic: bool = False
    ) -> Access:
        """Accesses by the active lanes; ``addresses`` [k]. Those that are not aligned are reported and moved."""
        access = Access(instruction, addresses, self.flat(self.stamps, active), size, atomic)
        odd = addresses % size != 0
        if odd.any():
            first = int(np.flatnonzero(odd)[0])
            details = f"{who(access.stamps[first])}, address {int(addresses[first]):#x} for {size} bytes"
            self.findings.add("misaligned", instruction, details)
            access = access._replace(offsets=addresses - addresses % size)
        return access

    def shared_access(
        self, instruction: Instruction, addresses: Array, size: int, active: Active
    ) -> tuple[Access, Array]:
        """Accesses to the region of shared memory by the active lanes that are inside it, and which [k] are."""
        access, lanes = self.access(instruction, addresses, size, active), active.indices
        offsets = access.offsets - SHARED_BASE
        inside = (offsets >= 0) & (offsets + size <= self.shared_bytes)
        if not inside.all():
            first = int(np.flatnonzero(~inside)[0])
            details = f"{who(access.stamps[first])}, byte {int(offsets[first])} of {self.shared_bytes}"
            self.findings.add("shared memory out of bounds", instruction, details)
            access, lanes, offsets = access._replace(stamps=access.stamps[inside]), lanes[inside], offsets[inside]
        self.count_wavefronts(offsets, lanes, size)
        return access._replace(offsets=offsets + lanes // self.threads * self.shared.per_block), inside

    def count_wavefronts(self, offsets: Array, lanes: Array, size: int) -> None:
        blocks = 1
        if len(lanes) == self.everyone.count:
            by_block = offsets.reshape(self.shape)
            if (by_block == by_block[0]).all():  # all blocks do the same: one is enough
                offsets, lanes, blocks = by_block[0], lanes[: self.threads], self.count
        if len(lanes):
            total, conflicts = wavefronts(offsets, lanes, size)
            self.counts.wavefronts += blocks * total
            self.counts.bank_conflicts += blocks * conflicts

    def load_shared(self, instruction: Instruction, addresses: Array, size: int, item: int, active: Active) -> Array:
        """The numbers of ``item`` bytes that each active lane reads, [k, size / item] unsigned; 0 outside."""
        access, inside = self.shared_access(instruction, addresses, size, active)
        result = np.zeros((active.count, size // item), f"uint{8 * item}")
        result[inside] = self.shared.load(access, item)
        return result

    def store_shared(self, instruction: Instruction, addresses: Array, values: Array, active: Active) -> None:
        access, inside = self.shared_access(instruction, addresses, values.shape[1] * values.itemsize, active)
        self.shared.store(access, values[inside])

    def load_global(self, instruction: Instruction, addresses: Array, size: int, item: int, active: Active) -> Array:
        """As :meth:`load_shared`."""
        result = np.zeros((active.count, size // item), f"uint{8 * item}")
        for region, lanes, part in self.memory.split(self.access(instruction, addresses, size, active)):
            region.traffic.sectors_loaded += sectors(addresses[lanes], self.warp[active.indices[lanes]])
            result[lanes] = region.load(part, item)
        return result

    def store_global(self, instruction: Instruction, addresses: Array, values: Array, active: Active) -> None:
        access = self.access(instruction, addresses, values.shape[1] * values.itemsize, active)
        for region, lanes, part in self.memory.split(access):
            region.traffic.sectors_stored += sectors(addresses[lanes], self.warp[active.indices[lanes]])
            region.store(part, values[lanes])

    # ------------------------------------------------------------ order

    def pass_barrier(self, blocks: Array) -> None:
        """Blocks [k] have passed a barrier."""
        passed = (self.stamps[blocks] >> BARRIER) + 1
        if (passed & ((1 << BLOCK - BARRIER) - 1) == 0).any():
            raise RefusedPTX(f"{self.kernel.name}: a block passes more than {1 << BLOCK - BARRIER} barriers")
        thread = np.arange(self.threads, dtype=np.int64)[None, :]
        self.stamps[blocks] = (passed << BARRIER) | (thread << THREAD)
        self.counts.barriers += len(blocks)

    def pass_warp_barrier(self, active: Active, instruction: Instruction) -> None:
        for region in (self.shared, *self.memory.regions):
            region.warps_wait = True
        self.stamps = self.stamps + active.mask
        if ((self.stamps & (LANES - 1)) == 0)[active.mask].any():
            raise RefusedPTX(f"{self.kernel.name}: more than {LANES} of {instruction.name} between two barriers")


def poison_of(kind: str) -> np.generic:
    if kind == "pred":
        return np.bool_(False)
    bits = 0x7FC5DEAD7FC5DEAD & ((1 << 8 * SIZES[kind]) - 1)
    return np.frombuffer(bits.to_bytes(SIZES[kind], "little"), f"uint{8 * SIZES[kind]}")[0]
