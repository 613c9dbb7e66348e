"""Files of a run: everything is written to a temporary name, flushed, then renamed (DESIGN §5)."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import irlfast

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")  # of files of rows
COMPRESSIONS = (".gz", ".zst")  # that may follow them
PACKAGE_PARENT = Path(irlfast.__file__).resolve().parent.parent


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence naming what was found and what was expected."""


class LocalError(InputError):
    """One that a process may meet alone, while the others wait for it: each says its own."""


def find_path(name: str) -> Path | None:
    """The existing path that ``name`` means: from the working directory, else beside the irlfast package (its demo)."""
    for path in (Path(name).expanduser(), PACKAGE_PARENT / name):
        if path.exists():
            return path
    return None


def row_file_ending(name: str) -> tuple[str, str]:
    """The ending of a file of rows and that of its compression: ``(".jsonl", ".gz")``; empty where it has another."""
    packed = next((end for end in COMPRESSIONS if name.lower().endswith(end)), "")
    inner = name.lower().removesuffix(packed)
    return next((end for end in ENDINGS if inner.endswith(end)), ""), packed


def is_glob(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def is_local(name: str) -> bool:
    """Whether a name can only be a file's or a folder's; one like ``owner/name`` may be on the hub."""
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
    """Delete a file or a folder; one that is not there is fine."""
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
    """Line numbers (from 1) and rows of a JSON-lines file; blank lines are passed over.

    Raises:
        InputError: naming the file and the line, where a line is not a JSON object or the file is not UTF-8.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # both JSONDecodeError and UnicodeDecodeError
                raise InputError(f"{path}, line {number}: not JSON ({error}); expected one object a line") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: found {type(row).__name__}, expected a JSON object")
            yield number, row
