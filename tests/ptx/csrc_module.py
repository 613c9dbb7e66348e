"""``irlfast._cuda`` compiled by nvcc, whose launches run in the interpreter from nvcc's PTX.

The host's code is the real one: it chooses kernels, grids and vectors. ``fake_cudart.cpp`` takes the place of CUDA's
runtime.
"""

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pybind11
import torch

from tests.ptx.machine import Allocation, Report, compiled, run
from tests.ptx.parser import entries

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build/ptx"
ARCHITECTURES = ("compute_80", "compute_90a")
SOURCES = ("softmax_slopes", "logits_log_ratio", "rmsprop")
OPTIONS = {"rmsprop": ["--fmad=false"]}  # as CMakeLists.txt has them
FLAGS = "-std=c++17 -O3 -lineinfo -Xcompiler=-fPIC,-fvisibility=hidden".split()
LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)


class Module(NamedTuple):
    functions: ModuleType  # token_logps and the others, as irlfast._cuda has them
    library: ctypes.CDLL
    kernels: dict[tuple[str, str], tuple[str, str]]  # by architecture and name without hashes: the PTX, and the name


def without_hash(kernel: str) -> str:
    """A mangled name without the hashes of the file that it was compiled from."""
    return re.sub(r"(_GLOBAL__N__)[0-9a-f]{8}(_\w+?_cu_)[0-9a-f]{8}", r"\1\2", kernel)


@functools.cache
def original() -> Module:
    """The module, compiled once for each state of csrc."""
    objects = [object_of(source) for source in SOURCES]
    host = [Path(__file__).with_name("fake_cudart.cpp"), CSRC / "cuda/module.cpp"]
    state = "".join(map(str, objects)).encode() + b"".join(one.read_bytes() for one in [*host, CSRC / "binding.h"])
    path = BUILD / f"_cuda-{hashlib.sha256(state).hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with locked(BUILD):
        if not path.exists():
            link([*host, *objects], path)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    functions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(functions)
    kernels = {}
    for source, one in zip(SOURCES, objects, strict=True):
        for architecture in ARCHITECTURES:
            kernels |= kernels_of((one.parent / f"{source}.{architecture}.ptx").read_text(), architecture)
    return Module(functions, ctypes.CDLL(str(path)), kernels)


def kernels_of(ptx: str, architecture: str) -> dict[tuple[str, str], tuple[str, str]]:
    return {(architecture, without_hash(name)): (ptx, name) for name in entries(ptx)}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def object_of(source: str) -> Path:
    """Compile a source, once for each state of it and of its headers. Its PTX lies beside the object."""
    files = [*sorted(CSRC.glob("*.h")), *sorted((CSRC / "cuda").glob("*.h")), CSRC / f"cuda/{source}.cu"]
    text = b"".join(path.read_bytes() for path in files) + repr((ARCHITECTURES, FLAGS, OPTIONS)).encode()
    folder = BUILD / f"{source}-{hashlib.sha256(text).hexdigest()[:16]}"
    with locked(folder):
        if not (folder / "out.o").exists():
            targets = [f"-gencode=arch={one},code={one}" for one in ARCHITECTURES]
            keep = ["--keep", "--keep-dir", str(folder)]
            partial = folder / "partial.o"
            compile_by_nvcc(source, CSRC, *targets, *keep, "-c", "-o", str(partial))
            partial.rename(folder / "out.o")
    return folder / "out.o"


def compile_by_nvcc(source: str, csrc: Path, *arguments: str) -> None:
    command = ["nvcc", *FLAGS, *OPTIONS.get(source, []), *arguments, str(csrc / f"cuda/{source}.cu")]
    subprocess.run(command, check=True, capture_output=True, text=True)


def with_changes(source: str, file: str, old: str, new: str, folder: Path) -> Module:
    """The module with the kernels of one source, for the first architecture, after a change in a file of csrc."""
    csrc = shutil.copytree(CSRC, folder / "csrc")
    text = (csrc / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file}: found {text.count(old)} times {old!r}, expected once")
    (csrc / file).write_text(text.replace(old, new))
    out = folder / "out.ptx"
    compile_by_nvcc(source, csrc, f"-arch={ARCHITECTURES[0]}", "-ptx", "-o", str(out))
    module = original()
    return module._replace(kernels=module.kernels | kernels_of(out.read_text(), ARCHITECTURES[0]))


def link(files: Sequence[Path], path: Path) -> None:
    includes = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))]
    command = ["nvcc", *FLAGS, "-shared", "-cudart", "none", '-DIRLFAST_DEVICE=\\"cpu\\"', *includes]
    partial = path.with_suffix(".partial")
    subprocess.run([*command, *map(str, files), "-o", str(partial)], check=True, capture_output=True, text=True)
    partial.rename(path)


# ---------------------------------------------------------------- launches


@contextmanager
def interpreted(built: Module, architecture: str, allocations: Sequence[Allocation]) -> Iterator[list[Report]]:
    """Within the context, launches may touch these allocations. Their reports are appended to the list."""
    reports: list[Report] = []
    errors: list[Exception] = []

    def launch(name: bytes, grid: ctypes.Array, block: ctypes.Array, shared: int, arguments: ctypes.Array) -> int:
        try:
            ptx, kernel = built.kernels[architecture, without_hash(name.decode())]
            parameters = compiled(ptx, kernel).kernel.parameters
            values = [ctypes.string_at(arguments[k], parameter.size) for k, parameter in enumerate(parameters)]
            reports.append(run(ptx, kernel, tuple(grid[:3]), tuple(block[:3]), values, allocations, shared))
        except Exception as error:  # C++ cannot carry it
            errors.append(error)
        return len(errors)

    callback = LAUNCHER(launch)
    built.library.set_launcher(callback)
    try:
        yield reports
    except RuntimeError:
        if errors:
            raise errors[0] from None
        raise
    finally:
        built.library.set_launcher(LAUNCHER())


def allocation(name: str, tensor: torch.Tensor | None, fresh: bool = False) -> list[Allocation]:
    """The bytes of a tensor from its first to its last element, each row on its own if rows are apart."""
    if tensor is None:
        return []
    if tensor.dim() == 2 and not tensor.is_contiguous():
        return [one for number, row in enumerate(tensor) for one in allocation(f"{name}[{number}]", row, fresh)]
    return [Allocation(name, tensor.data_ptr(), tensor.numel() * tensor.itemsize, fresh)]
