"""Show what this machine can run: ``irlfast doctor``. The exit code is 1 if a required part is missing."""

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
from rich.text import Text

from irlfast.common.printable import printable

PACKAGES = {  # a package, and its use in irlfast
    "torch": "everything",
    "transformers": "models, tokenizers",
    "deepspeed": "training",
    "datasets": "reading demonstrations",
    "peft": "LoRA",
    "bitsandbytes": "QLoRA (load_in_4bit)",
    "triton": "the kernels on a GPU",
    "vllm": "fast sampling; may be in an environment of its own (vllm_python)",
    "flash-attn": "attention over packed rows on a GPU",
}
GOOD, BAD, ABSENT = "[green]yes[/]", "[red]no[/]", "[yellow]absent[/]"
REBUILD = "install a C++17 compiler, then irlfast again"


class Finding(NamedTuple):
    part: str
    state: str
    detail: str
    fatal: bool = False


def examine() -> list[Finding]:
    """Return all findings, in the order in which they are shown."""
    python = sys.version_info[:2]
    fits = (3, 10) <= python <= (3, 13)
    findings = [Finding("Python", GOOD if fits else BAD, f"{platform.python_version()}; 3.10 to 3.13", not fits)]
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("irlfast") or []]
        by_name = {requirement.name: requirement for requirement in requirements}
        findings += [examine_package(by_name[name]) for name in PACKAGES]
    except importlib.metadata.PackageNotFoundError:
        findings.append(Finding("irlfast", ABSENT, "pip install -e . in its folder", True))
    if importlib.util.find_spec("torch"):
        findings += examine_backends()
    return findings


def examine_package(requirement: Requirement) -> Finding:
    """Compare the installed version of a package with the requirement. A package of an extra may be absent."""
    name, use, required = requirement.name, PACKAGES[requirement.name], requirement.marker is None
    command = f"pip install '{name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, ABSENT, f"{use}: {command}", required)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, BAD, f"found {version}, expected {requirement.specifier}: {command}", required)
    return Finding(name, GOOD, f"{version}; {requirement.specifier}: {use}")


def examine_backends() -> list[Finding]:
    import torch

    from irlfast import native

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
    has_triton = importlib.util.find_spec("triton") is not None
    return [
        Finding("GPU", state(gpus), names or f"no CUDA device; torch {torch.__version__}"),
        Finding("backend cpu", GOOD, f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        Finding("native CPU code", state(native.cpu), "irlfast._cpu" if native.cpu else REBUILD),
        Finding("native CUDA code", state(native.cuda), "irlfast._cuda" if native.cuda else f"{REBUILD}; needs nvcc"),
        examine_tool("C++ compiler", "c++", "g++"),
        examine_tool("cmake", "cmake"),
        examine_tool("nvcc", "nvcc"),
        Finding(
            "backend triton",
            state(gpus and has_triton),
            "log-ratios, pair loss, rewards"
            if gpus and has_triton
            else "needs a GPU and Triton; backend cpu does its work",
        ),
        Finding(
            "backend cuda",
            state(gpus and native.cuda),
            "log-ratios, pair loss"
            if gpus and native.cuda
            else "needs a GPU and native CUDA code; triton does its work",
        ),
    ]


def state(present: object) -> str:
    return GOOD if present else ABSENT


def examine_tool(part: str, *commands: str) -> Finding:
    """Look for a tool that builds the native code at installation."""
    path = next(filter(None, map(shutil.which, commands)), None)
    return Finding(part, state(path), path or "builds the native code at installation")


def main() -> int:
    argparse.ArgumentParser(prog="irlfast doctor", description="Show what this machine can run.").parse_args()
    findings = examine()
    table = Table("", "", "", box=None, show_header=False)
    for finding in findings:
        table.add_row(finding.part, finding.state, Text(printable(finding.detail)))
    Console().print(table)
    missing = [finding.part for finding in findings if finding.fatal]
    if missing:
        print(f"cannot train: {', '.join(missing)}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
