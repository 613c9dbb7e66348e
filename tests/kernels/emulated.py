"""``irlfast._cuda`` compiled for the CPU: each thread of a kernel is a fibre, see ``tests/csrc/emulated``."""

import fcntl
import hashlib
import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "tests/csrc/emulated"
SOURCES = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "csrc/cuda/module.cpp"]
# -ffp-contract=off, like nvcc's --fmad=false, for the code that must give the CPU's bits. A GPU fails on a
# vector that is not aligned, a CPU does not: hence the sanitizer, which ends the process.
FLAGS = "-std=c++17 -O2 -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas -fvisibility=hidden -fPIC".split()
SANITIZER = ["-fsanitize=undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]


def module() -> ModuleType:
    """The module, built once for each state of the sources."""
    files = [*(ROOT / "csrc").rglob("*.*"), *SHIM.glob("*.h"), Path(__file__)]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]
    folder = ROOT / "build/emulated"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"_cuda-{state}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            build(path)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    actual = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(actual)
    return actual


def build(path: Path) -> None:
    includes = [SHIM, pybind11.get_include(), sysconfig.get_path("include")]
    command = ["g++", *FLAGS, *SANITIZER, '-DIRLFAST_DEVICE="cpu"', *(f"-I{folder}" for folder in includes)]
    partial = path.with_suffix(".partial")
    subprocess.run([*command, "-shared", "-x", "c++", *SOURCES, "-o", partial], check=True)
    partial.rename(path)
