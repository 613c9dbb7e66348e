"""The locks have all that the requirements ask for, with checksums, and `make` installs from them alone."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = sorted(path.stem for path in (ROOT / "locks").glob("*.txt"))
TORCH = ("torch", "triton")
MADE_OF = {"packages": "requirements.txt", "docs": "requirements-docs.txt"}  # the others are made of their own .in


def lines_of(path: Path) -> list[str]:
    """The requirements of a file, each on one line."""
    whole = path.read_text().replace("\\\n", " ")
    return [line for line in whole.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def versions_of(lock: str) -> dict[str, str]:
    """The version of each package that this Python would install from a lock."""
    requirements = [Requirement(line.partition("--hash")[0]) for line in lines_of(ROOT / "locks" / f"{lock}.txt")]
    return {
        canonicalize_name(each.name): next(iter(each.specifier)).version
        for each in requirements
        if each.marker is None or each.marker.evaluate()
    }


def asked(lines: list[str]) -> list[Requirement]:
    requirements = [Requirement(line) for line in lines]
    return [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]


def unmet(requirements: list[Requirement], versions: dict[str, str]) -> list[str]:
    """The requirements that no locked version meets."""
    return [
        str(each)
        for each in requirements
        if not each.specifier.contains(versions.get(canonicalize_name(each.name), "0"), prereleases=True)
        or canonicalize_name(each.name) not in versions
    ]


@pytest.mark.parametrize("lock", LOCKS)
def test_each_line_of_a_lock_is_one_version_with_checksums(lock):
    for line in lines_of(ROOT / "locks" / f"{lock}.txt"):
        assert re.fullmatch(r"[a-z0-9.-]+==[\w.!+]+ *(;[^#]*?)?( +--hash=sha256:[0-9a-f]{64})+", line), line[:100]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_what_it_is_made_of(lock):
    made_of = ROOT / MADE_OF.get(lock, f"locks/{lock}.in")
    left_out = TORCH if lock == "packages" else ()
    requirements = [each for each in asked(lines_of(made_of)) if each.name not in left_out]
    assert requirements
    assert not unmet(requirements, versions_of("packages") | versions_of(lock))


@pytest.mark.parametrize("torch", ["torch", "torch-cpu"])
def test_the_locked_packages_have_all_that_irlfast_and_they_themselves_need(torch):
    versions = versions_of("packages") | versions_of(torch)
    assert not unmet(asked(importlib.metadata.requires("irlfast")), versions)
    for name in versions_of("packages"):
        needs = asked(importlib.metadata.requires(name) or [])
        assert not unmet(needs, versions), f"{name} needs {unmet(needs, versions)}"


def test_a_package_that_several_locks_of_one_environment_have_is_of_one_version():
    for lock in ("build", "torch", "torch-cpu", "docs"):
        packages, own = versions_of("packages"), versions_of(lock)
        shared = packages.keys() & own.keys()
        assert {name: own[name] for name in shared} == {name: packages[name] for name in shared}


def test_make_installs_everything_from_the_locks():
    targets = (".venv/installed", ".venv/docs-installed", ".venv-vllm/installed", ".venv-audit/installed")
    shown = subprocess.run(["make", "-nB", *targets], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installs = re.findall(r"pip install [^|\n]*", shown)
    unlocked = [line for line in installs if "--no-deps --no-build-isolation --require-hashes" not in line]
    assert len(installs) >= 7
    assert [line.split()[-2:] for line in unlocked] == [["--editable", "."]]
    assert {*re.findall(r"locks/([\w-]+)\.txt", " ".join(installs))} == {*LOCKS}


def test_a_package_that_is_not_as_locked_is_refused(tmp_path):
    """A wheel of the locked name and version with other content."""
    name = "iniconfig-" + versions_of("packages")["iniconfig"]
    wheel = tmp_path / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: iniconfig\nVersion: " + name[10:])
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")
    [line] = [line for line in lines_of(ROOT / "locks/packages.txt") if line.startswith("iniconfig==")]
    (tmp_path / "lock.txt").write_text(line)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--require-hashes"]
    command += ["--find-links", str(tmp_path), "--target", str(tmp_path / "in"), "-r", str(tmp_path / "lock.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "in").exists()


def test_the_reports_of_an_audit_never_fail_and_say_what_they_lack(tmp_path):
    """The tools are not there, as without a network."""
    (tmp_path / "python").symlink_to(sys.executable)
    done = subprocess.run([tmp_path / "python", ROOT / ".ci/audit.py"], capture_output=True, text=True, check=True)
    assert "none, as pip-audit cannot be started (No such file or directory)" in done.stdout
    assert "none, as cyclonedx-py cannot be started" in done.stdout


def test_an_audit_whose_tools_do_not_start_is_reported_and_tried_again(tmp_path):
    """pip ends well here, and leaves no tool."""
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks/audit.txt").write_text("")
    python = tmp_path / "python"  # `python -m venv --clear .venv-audit` makes a pip that installs nothing
    python.write_text("#!/bin/sh\nmkdir -p .venv-audit/bin\nln -sf /bin/true .venv-audit/bin/pip\n")
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/installed").touch()
    make = ["make", "--old-file=.venv/installed", "audit", f"PYTHON={python}"]
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "pip-audit: " in done.stderr and "make audit: no reports, for the error above; CI goes on" in done.stdout
    assert not (tmp_path / ".venv-audit/installed").exists()
