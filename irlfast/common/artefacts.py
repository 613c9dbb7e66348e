"""Artefacts: the files and folders that a run keeps, each with the length and the SHA-256 of every file.

``MANIFEST`` in a folder has one line of JSON for each artefact in it: its name, and its files with their lengths and
checksums; the last line of a name counts. A line is appended before the artefact gets its name. So an artefact without
its line is foreign. A kill can leave a line whose artefact still has its temporary name: the next start of the command
gives it its name. A damaged line is as none.
"""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from irlfast.common.files import (
    InputError,
    append_line,
    flush,
    json_text,
    jsonl_text,
    lost,
    publish,
    put_text,
    staged,
    temporary_name,
)
from irlfast.common.messages import log

MANIFEST = "MANIFEST"
Files = dict[str, list]  # path within the artefact -> [length, SHA-256]; "." is an artefact that is one file
VERIFIED: dict[Path, Any] = {}  # artefacts that this process has read whole, with their state then


def keep(path: Path, save: Callable[[Path], Any], changed: str = "") -> None:
    """Let ``save`` write an artefact under a temporary name, then note its checksums and rename it to ``path``.

    Raises:
        InputError: another content was noted before; only with ``changed``, which is the message.
    """
    keep_staged(staged(path, save), path, changed)


def keep_staged(temporary: Path, path: Path, changed: str = "") -> None:
    """Make the artefact ``path`` of what is written as ``temporary``, as :func:`keep` does."""
    flush(temporary)
    files, noted = checksums(temporary), notes(path.parent).get(path.name)
    if changed and noted not in (None, files):
        raise InputError(changed)
    if noted != files:
        note(path, files)
    publish(temporary, path)
    VERIFIED[path] = state(path)


def finish_kept(output: Path) -> None:
    """Give its name to each artefact below ``output`` that a kill left between its line and its name."""
    for manifest in output.rglob(MANIFEST):
        for name, files in notes(manifest.parent).items():
            temporary = temporary_name(manifest.with_name(name))
            if os.path.lexists(temporary) and verified(temporary, files):
                publish(temporary, manifest.with_name(name))


def keep_text(path: Path, text: str, changed: str = "") -> None:
    keep(path, lambda temporary: put_text(temporary, text), changed)


def keep_json(path: Path, value: Any, changed: str = "") -> None:
    keep_text(path, json_text(value), changed)


def keep_jsonl(path: Path, rows: Iterable[dict]) -> None:
    keep_text(path, jsonl_text(rows))


def intact(path: Path) -> bool:
    """Return whether ``path`` is there, and is what the run wrote. Anything else in its place goes to ``quarantine/``.

    A process reads an artefact whole once, and again where the length or the time of a file has changed since.
    With several processes only the main one may call this: ``dist.on_main(intact, path)``.
    """
    noted, present = notes(path.parent).get(path.name), os.path.lexists(path)
    if noted and present and verified(path, noted):
        return True
    if present:
        set_aside(path, "is not as it was written" if noted else "is not of this run")
    elif noted:
        log(f"{path}: is missing")
    return False


def verified(path: Path, noted: Files) -> bool:
    """Return whether the artefact's files are as noted; files that cannot be read are not."""
    try:
        if VERIFIED.get(path) != state(path) and checksums(path) != noted:
            return False
        VERIFIED[path] = state(path)
    except OSError:
        return False
    return True


def set_aside(path: Path, why: str) -> None:
    """Move ``path`` to ``quarantine/`` in the run's folder, and say so."""
    root = [path.parent, *(folder for folder in path.parents if (folder / MANIFEST).exists())][-1]
    place = root / "quarantine" / path.relative_to(root)
    names = itertools.chain([place.name], (f"{place.name}.{number}" for number in itertools.count(1)))
    place = next(place.with_name(name) for name in names if not os.path.lexists(place.with_name(name)))
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, place)
    log(f"{path}: {why}; moved to {place}")


def notes(folder: Path) -> dict[str, Files]:
    """Return what ``MANIFEST`` in ``folder`` says of each artefact, without lines that a kill or a fault has broken."""
    noted: dict[str, Files] = {}
    path = folder / MANIFEST
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if is_entry(entry):
            noted[entry["name"]] = entry["files"]
    return noted


def is_entry(entry: Any) -> bool:
    """Return whether a line of ``MANIFEST`` has the name of a file in its folder, and files with two figures each."""
    if not isinstance(entry, dict) or not isinstance(name := entry.get("name"), str):
        return False
    files = entry.get("files")
    plain = name not in ("", ".", "..") and not {"/", "\0"} & {*name} and name.isprintable()
    return plain and isinstance(files, dict) and all(isinstance(each, list) for each in files.values())


def note(path: Path, files: Files) -> None:
    """Append an artefact's line. Several processes may do so at once, each by one write."""
    manifest = path.parent / MANIFEST
    if manifest.exists() and not manifest.is_file():
        set_aside(manifest, "is not a file")
    append_line(manifest, json.dumps({"name": path.name, "files": files}, ensure_ascii=False), durable=True)
    if notes(path.parent).get(path.name) != files:
        raise lost(manifest)


def files_of(path: Path) -> list[Path]:
    """Return the one file, or all files below a folder, in order."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def checksums(path: Path) -> Files:
    """Return the length and the SHA-256 of the file, or of all files below the folder; several are read at a time."""
    files = files_of(path)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = [*pool.map(checksum, files)]
    return {file.relative_to(path).as_posix(): each for file, each in zip(files, sums, strict=True)}


def checksum(file: Path) -> list:
    """Return ``[length, SHA-256]`` of a file."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as content:
        for part in iter(functools.partial(content.read, 1 << 20), b""):
            digest.update(part)
        return [content.tell(), digest.hexdigest()]


def state(path: Path) -> Any:
    """Return what tells, without reading them, that files have changed: their names, lengths and times."""
    return [(file, at.st_size, at.st_mtime_ns) for file in files_of(path) for at in (file.stat(),)]
