"""Compile the launches that a call makes, without a GPU, and read the registers and spills that ptxas reports."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90)
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class Launch(NamedTuple):
    kernel: JITFunction
    values: dict[str, Any]
    options: dict[str, int]


class Usage(NamedTuple):
    """The resources that a compiled kernel needs."""

    name: str
    architecture: int
    registers: int  # per thread
    spills: int  # bytes per thread, stores and loads
    shared: int  # bytes per program
    products: set[str]  # the instructions for tensor cores: mma, and from sm_90 on wgmma


@contextmanager
def captured() -> Iterator[list[Launch]]:
    """Record the launches of kernels instead of running them: their results stay unwritten."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = dict(zip(kernel.arg_names, args, strict=False))
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        values = names | {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        defaults = {p.name: p.default for p in kernel.params if p.has_default}
        launches.append(Launch(kernel, defaults | values, options))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def launches_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Launch]:
    with captured() as launches:
        call(*args, **kwargs)
    return launches


def compile_launch(launch: Launch, architecture: int) -> Usage:
    """Compile for these arguments as the launch would: pointers are aligned, 1 and None are constants."""
    signature, constants, attributes = {}, {}, {}
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.values[parameter.name]
        specialised = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value is not True and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        aligned = isinstance(value, torch.Tensor) and not parameter.do_not_specialize_on_alignment
        if aligned or (specialised and value % 16 == 0):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # ptxas does not report on a cached kernel
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
    [registers] = re.findall(r"Used (\d+) registers", log.getvalue())
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
    products = set(re.findall(r"\b(wgmma|mma)\.(?:mma_async|sync)", compiled.asm["ptx"]))
    return Usage(launch.kernel.__name__, architecture, int(registers), spills, compiled.metadata.shared, products)


def check_compiles(
    launch: Launch,
    *what: object,
    registers: int = 255,
    architectures: Sequence[int] = ARCHITECTURES,
    multiplies: bool = False,
) -> None:
    """Compile a launch for the architectures, print its resources, and refuse spills.

    A kernel that ``multiplies`` must do so by the architecture's own instruction for tensor cores.
    """
    for architecture in architectures:
        usage = compile_launch(launch, architecture)
        print(*what, usage)
        # Short of the limit, ptxas at times gives up a few registers so that one more program fits a multiprocessor.
        assert usage.spills <= (16 if usage.registers < 255 else 0)
        assert usage.registers <= registers
        assert usage.shared <= SHARED[architecture]
        if multiplies:
            assert usage.products == {"wgmma" if architecture >= 90 else "mma"}
