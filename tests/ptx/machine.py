"""Run a kernel from its PTX on the CPU: blocks in batches, all threads of a batch as lanes of NumPy arrays.

    report = run(ptx, "softmax_kernel", (rows, 1, 1), (128, 1, 1), [z.data_ptr(), ...], [Allocation("z", ...), ...])

It writes the memory of the allocations. ``report.findings`` has one line for each mistake, none for a sound kernel.
Lanes take turns: those at the earliest instruction go on until they meet others or wait at a barrier. That is one of
the orders that a GPU may take. The checks do not depend on it, except where a race has changed a value.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.ptx.counts import Counts, Traffic, class_of
from tests.ptx.findings import Findings
from tests.ptx.instructions import decode
from tests.ptx.lanes import Active, Batch, Grid
from tests.ptx.memory import Allocation, GlobalMemory, who
from tests.ptx.operands import Operation, Reader, reader, refused
from tests.ptx.parser import Array, Instruction, Kernel, RefusedPTX, parse

BATCH = 8192  # lanes at most: fewer, and Python takes longer than NumPy; more, and arrays leave the cache
BARRIERS = (("sync",), ("cta", "sync"), ("sync", "aligned"))  # of a whole block: modifiers of `bar` and `barrier`

__all__ = ["Allocation", "RefusedPTX", "Report", "run"]


class Report(NamedTuple):
    findings: list[str]
    counts: Counts


class Step(NamedTuple):
    """Instructions that lanes execute one after the other, and how they go on."""

    operations: list[Operation]
    classes: Counter[str]  # of the instructions without a guard
    end: Instruction | None  # a branch, an exit or a barrier; None: the next step follows
    guard: Reader | None  # of the end
    following: int
    target: int | None  # the step that a branch goes to


class Program(NamedTuple):
    kernel: Kernel
    steps: list[Step]


def run(
    ptx: str,
    entry: str,
    grid: Grid,
    block: Grid,
    arguments: Sequence[int | float | bytes],
    allocations: Sequence[Allocation],
    dynamic_shared: int = 0,  # bytes
) -> Report:
    program = compiled(ptx, entry)
    kernel = program.kernel
    threads, blocks = int(np.prod(block)), int(np.prod(grid))
    if threads % 32 or threads > 1024:
        raise ValueError(f"block: found {threads} threads, expected a multiple of 32, at most 1024")
    findings, counts = Findings(entry), Counts(threads=blocks * threads)
    memory = GlobalMemory(allocations, findings, kernel.instructions)
    parameters = parameter_bytes(kernel, arguments)
    classes: Counter[str] = Counter()
    size = max(1, BATCH // threads)
    with np.errstate(all="ignore"):
        for first in range(0, blocks, size):
            together = range(first, min(first + size, blocks))
            batch = Batch(kernel, grid, block, together, parameters, memory, dynamic_shared, findings, counts)
            run_batch(batch, program, classes)
    counts.instructions = dict(classes)
    for region in memory.regions:
        counts.memory[region.name] = counts.memory.get(region.name, Traffic()) + region.final_traffic()
    return Report(findings.lines(), counts)


def parameter_bytes(kernel: Kernel, arguments: Sequence[int | float | bytes]) -> Array:
    if len(arguments) != len(kernel.parameters):
        raise ValueError(f"arguments: found {len(arguments)}, expected {len(kernel.parameters)}")
    last = kernel.parameters[-1] if kernel.parameters else None
    memory = bytearray(last.offset + last.size if last else 0)
    for parameter, value in zip(kernel.parameters, arguments, strict=True):
        if isinstance(value, float):
            value = np.array(value, {2: np.float16, 4: np.float32, 8: np.float64}[parameter.size]).tobytes()
        elif isinstance(value, int):
            value = (int(value) & ((1 << 8 * parameter.size) - 1)).to_bytes(parameter.size, "little")
        if len(value) != parameter.size:
            raise ValueError(f"arguments: found {len(value)} bytes for {parameter.name}, expected {parameter.size}")
        memory[parameter.offset : parameter.offset + parameter.size] = value
    return np.frombuffer(bytes(memory), np.uint8)


# ---------------------------------------------------------------- steps


@functools.lru_cache(maxsize=256)
def compiled(ptx: str, entry: str) -> Program:
    """The kernel cut at its labels, branches, barriers and exits, each instruction a function."""
    kernel = parse(ptx, entry)
    instructions = kernel.instructions
    ends = [number for number, instruction in enumerate(instructions) if ends_step(instruction)]
    starts = sorted({0, *kernel.labels.values(), *(number + 1 for number in ends)} - {len(instructions)})
    number_of = {start: number for number, start in enumerate(starts)}
    steps = []
    for number, start in enumerate(starts):
        stop = starts[number + 1] if number + 1 < len(starts) else len(instructions)
        steps.append(step_of(kernel, instructions[start:stop], number + 1, number_of))
    return Program(kernel, steps)


def is_barrier(instruction: Instruction) -> bool:
    return instruction.opcode in ("bar", "barrier") and "warp" not in instruction.modifiers


def ends_step(instruction: Instruction) -> bool:
    return instruction.opcode in ("bra", "ret", "exit") or is_barrier(instruction)


def step_of(kernel: Kernel, instructions: list[Instruction], following: int, number_of: dict[int, int]) -> Step:
    end = instructions[-1] if ends_step(instructions[-1]) else None
    body = instructions[:-1] if end else instructions
    plain = [instruction for instruction in body if instruction.guard is None]
    operations = [guarded(instruction, decode(instruction)) for instruction in body]
    target = None
    if end is not None and end.opcode == "bra":
        if end.target not in kernel.labels or set(end.modifiers) - {"uni"}:
            raise refused(end, "the branch is not interpreted")
        target = number_of[kernel.labels[end.target]]
    if end is not None and is_barrier(end) and (end.modifiers not in BARRIERS or len(end.operands) != 1):
        raise refused(end, "the barrier is not interpreted")
    guard = reader(end, end.guard, "pred") if end and end.guard else None
    return Step(operations, Counter(map(class_of, plain)), end, guard, following, target)


def guarded(instruction: Instruction, operation: Operation) -> Operation:
    if instruction.guard is None:
        return operation
    condition, index = reader(instruction, instruction.guard, "pred"), instruction.index

    def execute(batch: Batch, active: Active) -> None:
        chosen = active.where(condition(batch, active))
        if chosen.count:
            batch.guarded[index] += chosen.count
            operation(batch, chosen)

    return execute


# ---------------------------------------------------------------- blocks


def run_batch(batch: Batch, program: Program, classes: Counter[str]) -> None:
    executed = [0] * len(program.steps)
    ready, waiting, alive = {0: batch.everyone}, {}, batch.everyone
    while ready or waiting:
        if not ready:
            release(batch, program, waiting)
            ready, waiting = waiting, {}
        number = min(ready)
        active = ready.pop(number)
        step = program.steps[number]
        executed[number] += active.count
        for operation in step.operations:
            operation(batch, active)
        alive = go_on(batch, step, active, alive, ready, waiting)
    if batch.copies:
        instruction = batch.copies[0].instruction
        batch.findings.add("a cp.async that nothing waits for", instruction, f"{len(batch.copies)} of them")
    batch.counts.shared_loaded += batch.shared.traffic.loaded
    batch.counts.shared_stored += batch.shared.traffic.stored
    count_instructions(batch, program, executed, classes)


def go_on(
    batch: Batch, step: Step, active: Active, alive: Active, ready: dict[int, Active], waiting: dict[int, Active]
) -> Active:
    """Send the lanes to their next steps. Return those that are alive."""
    if step.end is None:
        send(ready, step.following, active)
        return alive
    chosen = active if step.guard is None else active.where(step.guard(batch, active))
    if chosen.count < active.count:
        send(ready, step.following, active.without(chosen))
    if not chosen.count:
        return alive
    if step.target is not None:
        send(ready, step.target, chosen)
    elif is_barrier(step.end):
        check_barrier(batch, step.end, chosen, alive)
        send(waiting, step.following, chosen)
    else:
        return alive.without(chosen)
    return alive


def send(steps: dict[int, Active], number: int, lanes: Active) -> None:
    steps[number] = Active(steps[number].mask | lanes.mask) if number in steps else lanes


def check_barrier(batch: Batch, instruction: Instruction, waiting: Active, alive: Active) -> None:
    if waiting.full:
        return
    own, living = waiting.mask.reshape(-1, 32), alive.mask.reshape(-1, 32)
    absent = (living & ~own) & own.any(axis=1)[:, None]
    if absent.any():
        details = f"without {who(batch.stamps.ravel()[np.flatnonzero(absent)[0]])}"
        batch.findings.add("a barrier is reached by a part of a warp", instruction, details)


def release(batch: Batch, program: Program, waiting: dict[int, Active]) -> None:
    """All lanes that are alive wait. Those of a block must do so at one barrier."""
    places = {number: lanes.mask.any(axis=1) for number, lanes in waiting.items()}
    if len(places) > 1:
        at_several = np.sum(list(places.values()), axis=0) > 1
        if at_several.any():
            block = int(np.flatnonzero(at_several)[0])
            steps = [number for number, blocks in places.items() if blocks[block]]
            ends = [program.steps[number - 1].end for number in steps]
            lines = " and ".join(end.line for end in ends if end)
            details = f"block {int(batch.stamps[block, 0]) >> 39} waits at {lines}"
            batch.findings.add("threads of a block wait at different barriers", ends[0], details)
    batch.pass_barrier(np.flatnonzero(np.any(list(places.values()), axis=0)))


def count_instructions(batch: Batch, program: Program, executed: list[int], classes: Counter[str]) -> None:
    for step, lanes in zip(program.steps, executed, strict=True):
        for name, count in step.classes.items():
            classes[name] += count * lanes
        if step.end is not None:
            classes[class_of(step.end)] += lanes
    for index in np.flatnonzero(batch.guarded):
        classes[class_of(program.kernel.instructions[index])] += int(batch.guarded[index])
