"""Seven faults of a file, and the files of a run or of an evaluation that they are done to."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from irlfast.common.artefacts import MANIFEST
from irlfast.common.files import remove


def artefacts(output: Path) -> list[Path]:
    """All artefacts that the run's manifests list, and all files in them, but what is gone since."""
    paths = {}
    for manifest in sorted(output.rglob(MANIFEST)):
        for line in manifest.read_text().splitlines():
            entry = json.loads(line)
            whole = manifest.parent / entry["name"]
            paths |= dict.fromkeys([whole, *(whole / name for name in entry["files"])])
    return [path for path in paths if path.exists()]


def truncate(path: Path, draw: random.Random, output: Path) -> None:
    os.truncate(path, draw.randrange(max(1, path.stat().st_size)))


def flip(path: Path, draw: random.Random, output: Path) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def empty(path: Path, draw: random.Random, output: Path) -> None:
    path.write_bytes(b"" if path.stat().st_size else b" ")


def delete(path: Path, draw: random.Random, output: Path) -> None:
    remove(path)


def folder(path: Path, draw: random.Random, output: Path) -> None:
    remove(path)
    path.mkdir()


def other(path: Path, draw: random.Random, output: Path) -> None:
    path.write_bytes(draw.randbytes(max(1, path.stat().st_size)))


def stale(path: Path, draw: random.Random, output: Path) -> None:
    """A copy of another phase's file of this name, or of another file."""
    files = [each for each in sorted(output.rglob("*")) if each.is_file() and each != path]
    same = [each for each in files if each.name == path.name and each.read_bytes() != path.read_bytes()]
    shutil.copy(draw.choice(same or files), path)


FAULTS: list[Callable] = [truncate, flip, delete, empty, folder, other, stale]


def strike(path: Path, fault: Callable, draw: random.Random, output: Path) -> None:
    """Do a fault to a file. A folder is deleted, becomes a file, or gets another file."""
    if path.is_file():
        fault(path, draw, output)
    elif fault is delete:
        remove(path)
    elif fault is other:
        remove(path)
        path.write_bytes(b"other")
    else:
        (path / "foreign.json").write_text("{}")


def restore(output: Path, pristine: Path) -> None:
    remove(output)
    shutil.copytree(pristine, output)
