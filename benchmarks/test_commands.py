"""Run every script on small data, by the commands of the pages: ``pytest benchmarks/test_commands.py --quick``."""

import importlib
import itertools
import json
import re
import shlex
import sys

import pytest

from benchmarks import conftest, plans, runs
from benchmarks.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
SCRIPTS = sorted({(name, given.strip()) for name, given in re.findall(r"python -m benchmarks\.(\w+)([^`#\n]*)", TEXT)})


def work_of(command: tuple[str, str]) -> tuple[str, str]:
    """Return the script and what it is asked to do, without options."""
    name, arguments = command
    return name, arguments.partition("--")[0].strip()


REPEATS = {again for command, again in itertools.combinations(SCRIPTS, 2) if work_of(command) == work_of(again)}
COMMANDS = [
    pytest.param(*command, id=" ".join(command), marks=pytest.mark.slow if command in REPEATS else ())
    for command in SCRIPTS
]
BENCHMARKS = sorted(set(re.findall(r"pytest (?:-\S+ )*(benchmarks/[\w/{},.]*)", TEXT)))


@pytest.mark.parametrize("name, arguments", COMMANDS)
def test_a_script_runs_as_a_page_says(name, arguments, pytestconfig, data, tmp_path, monkeypatch):
    if not pytestconfig.getoption("quick"):
        pytest.skip("hours; its command is in docs/")
    from tests.helpers.runs import printed

    given = [str(data) if word == "DATA" else word for word in shlex.split(arguments)]
    given = [str(ROOT / word) if word.startswith("benchmarks/") else word for word in given]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / f"{name}.py"), *given, "--quick"])
    # The same commands, in processes that have imported already.
    monkeypatch.setattr(runs, "start", printed)
    monkeypatch.setattr(plans, "start", lambda count, given, _: printed(["-m", "benchmarks.planned", *given], count))
    monkeypatch.setattr(conftest, "RESULTS_FOLDER", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    importlib.import_module(f"benchmarks.{name}").main()
    written = list((tmp_path / "results").iterdir())
    assert written and all("-quick" in path.stem and path.stat().st_size for path in written)


def test_the_pages_name_every_script():
    started = {"throughput", "planned"}  # by test_throughput.py, plans.py and walls.py
    modules = (ROOT / "benchmarks").glob("*.py")
    scripts = {path.stem for path in modules if "\nif __name__" in path.read_text()}
    assert {name for name, _ in SCRIPTS} == scripts - started


def test_every_benchmark_on_a_page_is_a_file_that_pytest_collects():
    named = {path for pattern in BENCHMARKS for path in expand_braces(pattern)}
    assert len(named) > 5
    for path in named - {"benchmarks/"}:
        assert re.fullmatch(r"benchmarks/test_\w+\.py", path) and (ROOT / path).exists(), path


def expand_braces(pattern: str) -> list[str]:
    """Expand one pair of braces, as a shell does."""
    before, brace, rest = pattern.partition("{")
    inside, _, after = rest.partition("}")
    return [f"{before}{choice}{after}" for choice in inside.split(",")] if brace else [pattern]


def test_the_summary_of_a_result_has_all_its_rows_and_goals():
    newest = max((ROOT / "benchmarks/results").glob("*-pair-loss-cpu.json"))
    results = json.loads(newest.read_text())
    summary = "\n".join(conftest.summary(results))
    for case in results["cases"].values():
        assert f"{case['name']}: " in summary and all(row in summary for row in case["rows"])
    assert all(goal["what"] in summary for goal in results["goals"])
