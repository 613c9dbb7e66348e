"""The counts of a run: bytes by allocation, sectors, instructions by class, products of tensor cores, bank conflicts.

The counts are those of the PTX. A GPU's compiler may merge, split or remove instructions.
"""

from dataclasses import astuple, dataclass, field

import numpy as np

from tests.ptx.parser import Instruction

SECTOR = 32  # bytes: what global memory delivers at least
BANKS, WORD = 32, 4  # of shared memory: one word per bank and wavefront


@dataclass
class Traffic:
    """The traffic of an allocation, or of the shared memory of all blocks."""

    loaded: int = 0  # bytes that all lanes asked for
    stored: int = 0
    distinct_loaded: int = 0  # bytes that were read at least once: the least that must be loaded
    distinct_stored: int = 0
    sectors_loaded: int = 0  # 32-byte sectors, counted once per instruction of a warp
    sectors_stored: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def reread(self) -> int:
        return self.loaded - self.distinct_loaded


@dataclass
class Counts:
    memory: dict[str, Traffic] = field(default_factory=dict)  # by name; allocations that overlap are one
    instructions: dict[str, int] = field(default_factory=dict)  # executed by lanes, by class; false guards do not count
    threads: int = 0
    multiply_adds: int = 0  # of tensor cores
    shared_loaded: int = 0  # bytes
    shared_stored: int = 0
    wavefronts: int = 0  # of shared memory
    bank_conflicts: int = 0  # wavefronts beyond those that the bytes need
    barriers: int = 0  # of whole blocks
    atomics: int = 0  # by lanes; a vector is one


CLASSES = {
    **dict.fromkeys(("ld", "st", "cp", "red", "atom", "ldmatrix", "stmatrix"), "memory"),
    **dict.fromkeys(("ex2", "lg2", "tanh", "sqrt", "rsqrt", "rcp", "sin", "cos"), "special"),
    **dict.fromkeys(("mov", "selp", "cvta", "prmt"), "move"),
    **dict.fromkeys(("shfl", "redux", "vote", "match"), "warp"),
    **dict.fromkeys(("mma", "wgmma"), "tensor"),
    **dict.fromkeys(("bar", "barrier", "fence", "membar"), "barrier"),
    **dict.fromkeys(("bra", "ret", "exit"), "branch"),
    "cvt": "convert",
}


def class_of(instruction: Instruction) -> str:
    """`fp32`, `fp64`, `fp16`, `integer` for arithmetic, by the type; else the kind of work."""
    if instruction.opcode in CLASSES:
        return CLASSES[instruction.opcode]
    kind = instruction.modifiers[-1] if instruction.modifiers else ""
    if instruction.opcode == "div" and kind == "f32":
        return "special"
    return {"f32": "fp32", "f64": "fp64", "f16": "fp16"}.get(kind, "integer")


def sectors(addresses: np.ndarray, warps: np.ndarray) -> int:
    """Sectors that an instruction of each warp touches. ``addresses`` [k] of lanes, ``warps`` [k] their warps."""
    first = addresses // SECTOR
    keys = (warps << 40) + first  # an aligned access of at most 16 bytes lies in one sector
    steps = np.diff(keys)
    if (steps < 0).any():
        steps = np.diff(np.sort(keys))
    return 1 + int(np.count_nonzero(steps))


def wavefronts(offsets: np.ndarray, lanes: np.ndarray, size: int) -> tuple[int, int]:
    """Wavefronts that accesses to shared memory take, and how many of them are due to conflicts.

    ``offsets`` [k] in bytes of ``lanes`` [k], numbered across warps. Lanes of a wavefront may share words, and else
    need different banks. Accesses of 8 bytes go by half warps, of 16 bytes by quarters.
    """
    together = 32 if size <= WORD else 32 * WORD // size
    phase = lanes // together
    words = offsets // WORD
    if size > WORD:
        words = (words[:, None] + np.arange(size // WORD)).ravel()
        phase = np.repeat(phase, size // WORD)
    keys = np.sort((phase << 32) + words)
    keys = keys[np.concatenate(([True], np.diff(keys) > 0))]
    phases = keys >> 32
    new_phase = np.concatenate(([True], np.diff(phases) > 0))
    number = np.cumsum(new_phase) - 1
    load = np.bincount(number * BANKS + (keys & (BANKS - 1)), minlength=(int(number[-1]) + 1) * BANKS)
    total = int(load.reshape(-1, BANKS).max(axis=1).sum())
    return total, total - int(number[-1]) - 1
