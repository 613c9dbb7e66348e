"""What this machine can do: ``python -m irlfast.doctor``. Exit status 1 where a part that is required is missing."""

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import sys
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Package(NamedTuple):
    name: str
    least: str
    required: bool
    what: str


PACKAGES = (
    Package("torch", "2.9", True, "everything"),
    Package("transformers", "5", True, "models, tokenizers"),
    Package("deepspeed", "0.19", True, "training"),
    Package("datasets", "4", True, "reading demonstrations"),
    Package("peft", "0.18", True, "LoRA"),
    Package("bitsandbytes", "0.50", False, "QLoRA (load_in_4bit)"),
    Package("triton", "3.5", False, "the kernels on a GPU"),
    Package("vllm", "0.32", False, "fast sampling; may live in an environment of its own (vllm_python)"),
    Package("flash-attn", "2", False, "attention over packed rows on a GPU"),
)
GOOD, BAD, ABSENT = "[green]yes[/]", "[red]no[/]", "[yellow]absent[/]"


class Finding(NamedTuple):
    part: str
    state: str
    detail: str
    fatal: bool = False


def examine() -> list[Finding]:
    """All findings, in the order in which they are shown."""
    python = sys.version_info[:2]
    fits = (3, 10) <= python <= (3, 13)
    findings = [Finding("Python", GOOD if fits else BAD, f"{platform.python_version()}; 3.10 to 3.13", not fits)]
    findings += [of_package(package) for package in PACKAGES]
    if importlib.util.find_spec("torch"):
        findings += backends()
    return findings


def of_package(package: Package) -> Finding:
    wanted = f"{package.name}>={package.least}"
    try:
        version = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(package.name, ABSENT, f"{package.what}: pip install '{wanted}'", package.required)
    if numbers(version) < numbers(package.least):
        return Finding(package.name, BAD, f"{version} is too old: pip install '{wanted}'", package.required)
    return Finding(package.name, GOOD, f"{version}; >= {package.least}: {package.what}")


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def backends() -> list[Finding]:
    import torch

    from irlfast import native

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
    has_triton = importlib.util.find_spec("triton") is not None
    rebuild = "pip install irlfast again where there is a C++17 compiler"
    return [
        Finding("GPU", GOOD if gpus else ABSENT, names or f"no CUDA device; torch {torch.__version__}"),
        Finding("backend cpu", GOOD, f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        Finding("native CPU code", GOOD if native.cpu else ABSENT, "irlfast._cpu" if native.cpu else rebuild),
        Finding(
            "native CUDA code", GOOD if native.cuda else ABSENT, "irlfast._cuda" if native.cuda else f"{rebuild}, nvcc"
        ),
        of_tool("C++ compiler", "c++", "g++"),
        of_tool("cmake", "cmake"),
        of_tool("nvcc", "nvcc"),
        Finding(
            "backend triton",
            GOOD if gpus and has_triton else ABSENT,
            "log-ratios, pair loss, rewards" if gpus and has_triton else "needs a GPU and Triton; backend cpu serves",
        ),
        Finding(
            "backend cuda",
            GOOD if gpus and native.cuda else ABSENT,
            "log-ratios, pair loss" if gpus and native.cuda else "needs a GPU and native CUDA code; triton serves too",
        ),
    ]


def of_tool(part: str, *commands: str) -> Finding:
    """What builds the native code at installation."""
    path = next(filter(None, map(shutil.which, commands)), None)
    return Finding(part, GOOD if path else ABSENT, path or "builds the native code at installation")


def main() -> int:
    findings = examine()
    table = Table("", "", "", box=None, show_header=False)
    for finding in findings:
        table.add_row(finding.part, finding.state, finding.detail)
    Console().print(table)
    missing = [finding.part for finding in findings if finding.fatal]
    if missing:
        print(f"cannot train: {', '.join(missing)}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
