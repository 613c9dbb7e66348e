"""Files of a run: each is written under a temporary name, flushed to disk, then renamed (docs/design.md, section 5)."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import irlfast

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")  # the files of rows that can be read
COMPRESSIONS = (".gz", ".zst")  # may follow one of the endings
PACKAGE_PARENT = Path(irlfast.__file__).resolve().parent.parent


class InputError(ValueError):
    """Raised for input that cannot be used; the message is one sentence: what was found, and what was expected."""


class LocalError(InputError):
    """An InputError that one process may meet alone while the others wait: every process prints its own."""


def find_path(name: str) -> Path | None:
    """Return the existing path that ``name`` means: in the working directory, or beside the package (the demo)."""
    for path in (Path(name).expanduser(), PACKAGE_PARENT / name):
        if path.exists():
            return path
    return None


def row_file_ending(name: str) -> tuple[str, str]:
    """Split off the ending and the compression of a file of rows: ``(".jsonl", ".gz")``; empty texts for others."""
    compression = next((end for end in COMPRESSIONS if name.lower().endswith(end)), "")
    inner = name.lower().removesuffix(compression)
    return next((end for end in ENDINGS if inner.endswith(end)), ""), compression


def is_glob(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def is_local(name: str) -> bool:
    """Return whether a name can only mean a file or a folder. A name like ``owner/name`` may be on the hub."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or bool(row_file_ending(name)[0]) or is_glob(name)


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Let ``save`` write a file or a folder under a temporary name, flush it to disk, then rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    remove(temporary)
    save(temporary)
    for item in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
        handle = os.open(item, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if path.is_dir():  # a folder cannot be renamed over a full one
        remove(path)
    os.replace(temporary, path)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """Return the line numbers (from 1) and rows of a JSON-lines file, without blank lines.

    Raises:
        InputError: a line is not a JSON object, or the file is not UTF-8. The message names the file and the line.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # both JSONDecodeError and UnicodeDecodeError
                raise InputError(f"{path}, line {number}: not JSON ({error}); expected one object per line") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: found {type(row).__name__}, expected a JSON object")
            yield number, row
