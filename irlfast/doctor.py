"""What this machine can do: ``irlfast doctor``. Exit status 1 where a part that is required is missing."""

import argparse
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from typing import NamedTuple

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

PACKAGES = {
    "torch": "everything",
    "transformers": "models, tokenizers",
    "deepspeed": "training",
    "datasets": "reading demonstrations",
    "peft": "LoRA",
    "bitsandbytes": "QLoRA (load_in_4bit)",
    "triton": "the kernels on a GPU",
    "vllm": "fast sampling; may live in an environment of its own (vllm_python)",
    "flash-attn": "attention over packed rows on a GPU",
}
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
    try:
        wanted = {found.name: found for found in map(Requirement, importlib.metadata.requires("irlfast") or [])}
        findings += [of_package(wanted[name]) for name in PACKAGES]
    except importlib.metadata.PackageNotFoundError:
        findings.append(Finding("irlfast", ABSENT, "pip install -e . in its folder", True))
    if importlib.util.find_spec("torch"):
        findings += backends()
    return findings


def of_package(wanted: Requirement) -> Finding:
    """A package beside what irlfast's own metadata asks for; one of an extra may be absent."""
    what, required = PACKAGES[wanted.name], wanted.marker is None
    command = f"pip install '{wanted.name}{wanted.specifier}'"
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(wanted.name, ABSENT, f"{what}: {command}", required)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(wanted.name, BAD, f"found {version}, expected {wanted.specifier}: {command}", required)
    return Finding(wanted.name, GOOD, f"{version}; {wanted.specifier}: {what}")


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
    argparse.ArgumentParser(prog="irlfast doctor", description="Say what this machine can do.").parse_args()
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
