"""The CUDA sources compiled by nvcc without a GPU: each kernel's resources per architecture; the module's errors."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from irlfast import native

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
# Vectors that the code of the best kernel reads and writes: all that it has, by the kinds of parameter in RMSprop.
WIDE = {"logits_log_ratio.cu": (4, 2), "rmsprop.cu": (28, 32), "softmax_slopes.cu": (4, 1)}
REGISTERS = 64  # per thread: then four blocks of 256 threads fit a multiprocessor, and enough loads are on their way
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
needs_module = pytest.mark.skipif(native.cuda is None, reason="irlfast._cuda is not built here")


class Usage(NamedTuple):
    """The resources of a kernel, as ptxas reports them."""

    kernel: str
    architecture: str
    registers: int
    spills: int  # bytes, stores and loads
    stack: int  # bytes
    shared: int  # bytes


def demangled(log: str) -> str:
    names = subprocess.run(["c++filt"], input=log, capture_output=True, text=True, check=True).stdout
    return names.replace("irlfast::", "").replace("(anonymous namespace)::", "")


def usages(log: str) -> list[Usage]:
    actual = []
    for part in log.split("Compiling entry function '")[1:]:
        name, architecture = re.match(r"(?:void )?(\w+(?:<.*?>(?=\())?)\(.*' for '(\w+)'", part).groups()
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.* (\d+) .* stores, (\d+)", part).groups())
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        shared = re.search(r"(\d+) bytes smem", part)
        actual.append(
            Usage(name, architecture, registers, stores + loads, stack, int(shared.group(1)) if shared else 0)
        )
    return actual


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_kernels_compile_without_spills_and_leave_room_for_others(source, tmp_path):
    flags = "-std=c++17 -O3 -Xcompiler=-Wall,-Wextra,-Werror -Xptxas=-v,--warn-on-spills,--warning-as-error".split()
    targets = [f"-gencode=arch={arch},code={code}" for code, arch in ARCHITECTURES.items()]
    command = ["nvcc", *flags, *targets, "-c", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    actual = usages(demangled(done.stdout + done.stderr))
    print(f"{'registers':>9} {'spills':>6} {'shared':>6}  kernel")
    for usage in actual:
        print(f"{usage.registers:9} {usage.spills:6} {usage.shared:6}  {usage.kernel} on {usage.architecture}")
        assert usage.spills == usage.stack == 0, usage
        assert usage.registers <= REGISTERS, usage
    assert {usage.architecture for usage in actual} == set(ARCHITECTURES)


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_memory_is_read_and_written_by_16_bytes(source, tmp_path):
    """The compiler may split vectors, and has done so once."""
    ptx = tmp_path / "out.ptx"
    subprocess.run(["nvcc", "-std=c++17", "-O3", "-arch=compute_90a", "-ptx", str(source), "-o", str(ptx)], check=True)
    kernels = ptx.read_text().split(".entry")[1:]
    wide = [len(re.findall(r"ld\.global\S*\.v4\.[uf]32", kernel)) for kernel in kernels]
    written = [len(re.findall(r"st\.global\S*\.(?:v4\.[uf]32|v2\.u32|v4\.u16)", kernel)) for kernel in kernels]
    print(source.name, *zip(wide, written, strict=True))
    loads, stores = WIDE[source.name]
    assert max(wide) >= loads and max(written) >= stores


def launches(n: int, address: int) -> dict[str, Callable[[], None]]:
    """A launch of every kernel on n rows, sequences or elements at one address."""
    logits, scoring, wide = (address, "bfloat16", 4), (n, 4, address, 1.0, 0.0), (address, "float32", 4)
    module, row = native.cuda, (n, *[address] * 3, 0, 0, 0, False)
    return {
        "token_logps": lambda: module.token_logps(logits, (0, "float32", 0), scoring, address, address, 0, 0),
        "gradient": lambda: module.write_gradient(logits, logits, scoring, address, address, 0),
        "softmax_slopes": lambda: module.softmax_slopes(wide, "float16", 0, scoring, address, True, 0),
        "sequence_sums": lambda: module.sequence_sums(*[address] * 3, n, 0, "float32", False, address, 0),
        "rmsprop": lambda: module.rmsprop([row], 0.1, 0.9, 0.1, 0.0, 0.0, 1.0, 0),
    }


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_module_imports_and_a_launch_says_what_is_missing():
    for kernel, call in launches(1, torch.zeros(64, dtype=torch.int64).data_ptr()).items():
        with pytest.raises(RuntimeError, match=f"^{kernel}_kernel: CUDA driver"):
            call()


@needs_module
def test_the_binding_checks_what_it_is_given():
    address = torch.zeros(64, dtype=torch.int64).data_ptr()
    none, out = (0, "float32", 0), (address, address, 0, 0)
    for logits, scoring, message in (
        ((0, "float32", 4), (2, 4, address, 1.0, 0.0), "logits: found a null pointer"),
        ((address + 1, "bfloat16", 4), (2, 4, address, 1.0, 0.0), "logits: found an address that is not aligned"),
        ((address, "float64", 4), (2, 4, address, 1.0, 0.0), "logits: found dtype float64, expected float32"),
        ((address, "float32", -4), (2, 4, address, 1.0, 0.0), "logits: found rows -4 apart"),
        ((address, "float32", 4), (2, 0, address, 1.0, 0.0), r"logits: found \[2, 0\]"),
        ((address, "float32", 4), (2**31, 4, address, 1.0, 0.0), r"logits: found \[2147483648, 4\]"),
        ((address, "float32", 4), (2, 4, 0, 1.0, 0.0), "targets: found a null pointer"),
    ):
        with pytest.raises(ValueError, match=message):
            native.cuda.token_logps(logits, none, scoring, *out)
    narrow, scoring = (address, "bfloat16", 3), (2, 4, address, 1.0, 0.0)
    with pytest.raises(ValueError, match="grad: found rows 3 apart, expected at least V"):
        native.cuda.write_gradient(narrow, narrow, scoring, address, address, 0)
    with pytest.raises(ValueError, match="grad: found another dtype than that of logits"):
        native.cuda.write_gradient((address, "float16", 4), narrow, scoring, address, address, 0)
    with pytest.raises(ValueError, match="ref_logps: found dtype bfloat16, expected float32 or float64"):
        native.cuda.sequence_sums(address, address, address, 1, address, "bfloat16", True, address, 0)


@needs_module
def test_empty_inputs_launch_no_kernel():
    """A launch would fail: any launch without a GPU, and a launch of no blocks on one."""
    memory = torch.full((64,), 7)
    for address in (0, memory.data_ptr()):
        for kernel, call in launches(0, address).items():
            try:
                call()
            except RuntimeError as error:
                pytest.fail(f"{kernel} was launched for nothing: {error}")
    assert memory.eq(7).all()
