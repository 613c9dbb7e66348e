"""The interpreter reports mistakes: each of a fixed set is put into a kernel, and must not pass."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import irlfast.kernels
from tests.helpers.tiers import first_of_each_kind
from tests.ptx.driver import Findings
from tests.ptx.mutants import CUTS, MUTANTS, VALUES, Cut, Mutant

KERNELS = Path(__file__).parents[2] / "kernels"


def mutated(mutant: Mutant, folder: Path) -> ModuleType:
    """The module of the mutant's file with its text replaced."""
    source = (KERNELS / mutant.file).read_text()
    count = source.count(mutant.text)
    assert count == 1, f"kernels/{mutant.file} has the mutant's text {count} times, expected once: {mutant.text}"
    path = folder / mutant.file
    path.write_text(source.replace(mutant.text, mutant.replacement))
    spec = importlib.util.spec_from_file_location(f"irlfast.kernels.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report_of(check: Callable[[], None]) -> str:
    """How the mistake that ``check`` meets is reported; nothing where the check passes."""
    try:
        check()
    except Findings as findings:
        return str(findings)
    except AssertionError:
        return VALUES
    return ""


@pytest.mark.parametrize(
    "mutant",
    first_of_each_kind(MUTANTS, lambda mutant: (mutant.file, mutant.reports[0])),
    ids=lambda mutant: f"{mutant.file}: {mutant.mistake}",
)
def test_a_mistake_in_a_source_is_reported(mutant, tmp_path, monkeypatch, on_gpu):
    module = mutated(mutant, tmp_path)
    name = module.__name__.split(".")[-1]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(irlfast.kernels, name, module, raising=False)
    with on_gpu(mutant.architecture):
        report = report_of(mutant.check)
    assert any(expected in report for expected in mutant.reports), report or "not reported"


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut.instruction} on sm_{cut.architecture}")
def test_an_instruction_that_is_taken_out_of_the_ptx_is_reported(cut: Cut, on_gpu):
    removed = []

    def without(ptx: str) -> str:
        shorter, count = re.subn(rf"^\s*(@!?%\w+\s+)?{cut.instruction}[^;]*;", "", ptx, flags=re.M)
        removed.append(count)
        return shorter

    with on_gpu(cut.architecture, edit=without):
        report = report_of(cut.check)
    assert sum(removed), "there is no such instruction"
    assert any(expected in report for expected in cut.reports), report or "not reported"
