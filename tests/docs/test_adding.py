"""The pages of docs/extending/ are followed to the letter in a copy of the repository.

A block whose title names a file is an edit of this file: a diff replaces lines, other text goes to the end, or before a
line. A block of bash is run. Edits and commands come in the order of the page.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_pages import EXTENDING, ROOT, Block, Command, blocks_of, commands_of
from tests.helpers.tiers import full, slow

PAGES = sorted(page for page in EXTENDING.glob("*.md") if "title=" in page.read_text(encoding="utf-8"))
PLACE = re.compile(r'title="(?P<file>[\w/.-]+)(?:, before (?P<name>\w+))?"')


@pytest.fixture
def copy(tmp_path):
    """The repository's files as git has them, with what is not committed yet, and the native modules."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in [*listed.stdout.splitlines(), *(str(path.relative_to(ROOT)) for path in ROOT.glob("irlfast/*.so"))]:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
    (ROOT / "build").mkdir(exist_ok=True)  # where tests keep what they have built, by the state of its sources
    (tmp_path / "build").symlink_to(ROOT / "build")
    return tmp_path


TIERS = {"data-format": [], "kernel": slow, "loss": slow}
PARAMETERS = [pytest.param(page, id=page.stem, marks=TIERS.get(page.stem, full)) for page in PAGES]


@pytest.mark.parametrize("page", PARAMETERS)
def test_the_steps_of_a_page_work_as_they_are_written(page, copy):
    printed, edited = [], []
    for block in blocks_of(page):
        place = PLACE.search(block.options)
        if place:
            edit(copy, block, **place.groupdict())
            edited.append(place["file"])
        elif block.language == "bash":
            printed += [run(copy, command) for command in commands_of(block)]
    assert any("passed" in text for text in printed), "no test of the page ran"
    for check in (["check"], ["format", "--check"]):
        run(copy, Command({}, ["python", "-m", "ruff", *check, *edited]))


def edit(copy: Path, block: Block, file: str, name: str | None) -> None:
    path = copy / file
    path.parent.mkdir(exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if block.language == "diff":
        old, new = ("".join(re.findall(rf"^[ {sign}](.*\n)", block.text, re.M)) for sign in ("-", "+"))
        assert text.count(old) == 1, f"{block}: {file} does not have these lines, or has them twice"
        text = text.replace(old, new)
    elif name:
        line = re.search(rf"^{name}\b", text, re.M)
        assert line, f"{block}: {file} has no line that begins with {name}"
        text = f"{text[: line.start()]}{block.text}\n\n{text[line.start() :]}"
    else:
        text = f"{text}\n\n{block.text}" if text else block.text
    path.write_text(text, encoding="utf-8")


def run(copy: Path, command: Command) -> str:
    """Run a command of the page in the copy, by this interpreter, and return what it printed."""
    assert command.words[0] == "python", shlex.join(command.words)
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"} | command.variables
    arguments = [sys.executable, *command.words[1:]]
    done = subprocess.run(arguments, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
