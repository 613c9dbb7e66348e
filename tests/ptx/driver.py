"""A driver that Triton takes for a GPU's: launches on CPU tensors run their compiled PTX in the interpreter.

Triton binds, specialises, caches and compiles as it does on a machine with a GPU. Only the last step differs.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as triton_driver
from triton.runtime.cache import get_cache_manager

from tests.ptx.machine import Allocation, Report, run

ARCHITECTURES = (80, 90)
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have
# Triton 3.6 loads what a warp reduces in some lanes alone, shuffles in all lanes, and drops what the other lanes get.
# These lanes hold NaN, so that a lane that does count would show in the results.
UNUSED_LANES = re.compile(r"a register is read that nothing wrote: \S+, thread ")


class Findings(AssertionError):
    """The interpreter saw a launch do what no kernel may do."""


class Launch(NamedTuple):
    """A launch that ran, and what the interpreter saw."""

    kernel: str
    grid: tuple[int, int, int]
    report: Report


class Session(NamedTuple):
    compiled: list[tuple[str, str]]  # the kernels that Triton compiled or read from its cache, and their constants
    launches: list[Launch]


class Launcher:
    """One compiled kernel, which Triton calls with the grid and the bound arguments of each launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.types = source.signature  # by parameter; constants are not passed
        self.metadata = metadata
        path = get_cache_manager(metadata.hash).get_file(f"{source.name[:150]}.ptx")
        self.ptx = Path(path).read_text()
        active: Any = triton_driver.active
        active.session.compiled.append((metadata.name, constants_of(source)))

    def __call__(self, x: int, y: int, z: int, *others: Any) -> None:
        values = others[-len(self.types) :]  # behind the stream, the function, metadata and hooks
        passed = [(name, type_, value) for (name, type_), value in zip(self.types.items(), values, strict=True)]
        passed = [(name, type_, value) for name, type_, value in passed if type_ != "constexpr"]
        arguments = [argument_of(type_, value) for _, type_, value in passed] + [0, 0]  # two unused scratch buffers
        allocations = [allocation_of(name, value) for name, type_, value in passed if type_.startswith("*")]
        block, shared = (32 * self.metadata.num_warps, 1, 1), self.metadata.shared
        active: Any = triton_driver.active
        ptx = active.edit(self.ptx)
        report = run(ptx, self.metadata.name, (x, y, z), block, arguments, allocations, shared)
        report = report._replace(findings=[one for one in report.findings if not UNUSED_LANES.search(one)])
        active.session.launches.append(Launch(self.metadata.name, (x, y, z), report))
        if report.findings:
            target = f"{self.metadata.name} on sm_{active.get_current_target().arch}"
            raise Findings("\n  ".join([f"{target}:", *report.findings]))


def constants_of(source: Any) -> str:
    """The arguments that a caller has declared constant, or left out. A number that is 1 is not among them."""
    values = {source.fn.params[place].name: value for (place,), value in source.constants.items()}
    declared = {param.name for param in source.fn.params if param.is_constexpr}
    return str({name: value for name, value in values.items() if name in declared or value is None})


def argument_of(type_: str, value: Any) -> int | float:
    if type_.startswith("*"):
        return value.data_ptr()
    return float(value) if type_.startswith("fp") else int(value)


def allocation_of(name: str, tensor: torch.Tensor) -> Allocation:
    """The memory that was allocated for a tensor, of which the tensor may be a part."""
    storage = tensor.untyped_storage()
    return Allocation(name, storage.data_ptr(), storage.nbytes())


@contextmanager
def gpu(architecture: int, device: Any = None, edit: Callable[[str], str] = lambda ptx: ptx) -> Iterator[Session]:
    """Run Triton's launches inside the block as PTX for sm_80 or sm_90; yield what Triton did.

    Triton remembers the compiled kernels of each ``device``, which may be any number: a new one begins without any.
    ``edit`` changes the PTX before it runs.

    Raises:
        Findings: a launch read or wrote outside its tensors, raced, or broke another rule of the machine.
    """
    session = Session([], [])
    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": SHARED[architecture]},
        load_binary=lambda name, *_: (name, name, 0, 0, 1024),  # module, function, registers, spills, most threads
        unload_module=lambda _: None,
    )
    fake = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        get_current_device=lambda: architecture if device is None else device,
        get_current_stream=lambda _: 0,
        launcher_cls=Launcher,
        utils=utils,
        session=session,
        edit=edit,
    )
    before = triton_driver._active
    triton_driver.set_active(fake)
    try:
        yield session
    finally:
        triton_driver._active = before
