"""Files of a run: each is written under a temporary name, flushed to disk, then renamed (docs/design.md, section 5)."""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import irlfast
from irlfast.common.printable import printable

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")  # the files of rows that can be read
COMPRESSIONS = (".gz", ".zst")  # may follow one of the endings
LONGEST_MESSAGE = 2000  # characters
LOST = "is not on the disk as it was written"  # the text of an OSError
PACKAGE_PARENT = Path(irlfast.__file__).resolve().parent.parent


class InputError(ValueError):
    """Raised for input that cannot be used; the message is one sentence: what was found, and what was expected.

    Control characters of the names and values that it quotes become escapes, and secrets are redacted. Too long a
    message is cut in its middle.
    """

    def __init__(self, message: str):
        message = printable(message)
        half = LONGEST_MESSAGE // 2
        cut = f"{message[:half]} … {message[-half:]}"
        super().__init__(message if len(message) <= LONGEST_MESSAGE else cut)


def find_path(name: str) -> Path | None:
    """Return the existing path that ``name`` means: in the working directory, or beside the package (the demo)."""
    for path in (home_path(name), PACKAGE_PARENT / name):
        if os.path.exists(path):  # Path.exists raises at a name that is too long
            return path
    return None


def resolved(name: str) -> str:
    """Return the absolute path, without links, of the file, the folder or the pattern that ``name`` means.

    ``file.py:function`` keeps its function. A name that means nothing here is returned as it is.
    """
    file, colon, function = name.rpartition(":")
    if file.endswith(".py"):
        return resolved(file) + colon + function
    folder, _, last = name.rpartition("/")
    if is_glob(last) and (place := find_path(folder or ".")):
        return str(place.resolve() / last)
    path = find_path(name)
    return str(path.resolve()) if path else name


def home_path(name: str) -> Path:
    """Return the path of a name that may begin with ``~``. A name of an unknown user stays as it is."""
    return Path(os.path.expanduser(name))  # Path.expanduser raises there


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
    temporary = staged(path, save)
    flush(temporary)
    publish(temporary, path)


def staged(path: Path, save: Callable[[Path], Any]) -> Path:
    """Let ``save`` write a file or a folder under a temporary name beside ``path``, and return that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    remove(temporary)
    save(temporary)
    open_to_umask(temporary)
    return temporary


def open_to_umask(path: Path) -> None:
    """Give the files that safetensors has made private the rights that the umask gives all others."""
    mask = read_umask()
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(0o666 & ~mask)


def read_umask() -> int:
    """Return the umask. Where only setting it tells, another thread may make a private file at that moment."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^Umask:\s*(\d+)$", status.read_text(), re.M)):
        return int(found[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def temporary_name(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def flush(path: Path) -> None:
    """Flush a file, or a folder and all below it, to disk."""
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        fsync(item)


def publish(temporary: Path, path: Path) -> None:
    """Rename ``temporary``, which is flushed, to ``path``, and flush the names in the folders above."""
    if path.is_dir() or temporary.is_dir():  # a folder can only be renamed to an empty place
        remove(path)
    os.replace(temporary, path)
    for folder in (path.parent, path.parent.parent):  # the second has the name of the first, which may be new
        fsync(folder)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that ``path`` is on, or will be on."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(nearest).free


def lost(path: Path | str) -> OSError:
    """Return the error of a file that a failing disk has not as it was written."""
    return OSError(errno.EIO, LOST, str(path))


def check_written(path: Path, size: int) -> None:
    """Raise an OSError if the file has not the ``size`` that was written: a failing disk may lose bytes in silence."""
    if path.stat().st_size != size:
        raise lost(path)


def check_end(file: IO[bytes], position: int) -> None:
    """Raise an OSError if an open file that is written in order has not come to ``position``: bytes of it are lost."""
    file.flush()
    if file.tell() != position:
        raise lost(file.name)


def put_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 to ``path`` itself."""
    content = text.encode()
    path.write_bytes(content)
    check_written(path, len(content))


def copy_folder(source: Path, target: Path, linked: str = "") -> None:
    """Copy a folder of files to a new folder. Files whose names end with ``linked``, if it is given, become hard links.

    Where the file system has no hard links, or the target is on another one, these files are copied, too.
    """

    def copy(file: str, to: str) -> None:
        if linked and file.endswith(linked):
            with contextlib.suppress(OSError):
                os.link(file, to)
                return
        shutil.copy2(file, to)

    shutil.copytree(source, target, copy_function=copy)
    for file in source.rglob("*"):
        if file.is_file():
            check_written(target / file.relative_to(source), file.stat().st_size)


def has_links(folder: Path) -> bool:
    """Return whether the file system of a folder has hard links."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(suffix=".tmp", dir=folder) as own:
        Path(own, "file").touch()
        os.link(Path(own, "file"), Path(own, "link"))
        return True
    return False


def remove_temporary(folder: Path) -> None:
    """Delete the temporary files and folders that a kill has left in ``folder``: ours, and ``.tmp*`` of safetensors."""
    for pattern in ("*.tmp", ".tmp*"):
        for path in [*folder.rglob(pattern)]:
            remove(path)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: put_text(temporary, text))


def append_line(path: Path, line: str, durable: bool = False) -> None:
    """Append a line by one call that writes it whole. Half a line at the end of the file stays apart.

    Several processes may append to a file at once. ``durable`` flushes the line to disk.

    Raises:
        OSError: the line does not fit onto the disk. No part of the line stays in the file.
    """
    content = line.encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            content = b"\n" + content
        if os.write(handle, content) < len(content):
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if durable:
            os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, jsonl_text(rows))


def jsonl_text(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


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
