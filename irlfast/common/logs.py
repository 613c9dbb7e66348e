"""Logs: files that grow row by row. A kill, a full disk or a faulty disk may damage them, and nobody is refused for it.

Damaged lines are left out, counted, and said in one line.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from irlfast.common.artefacts import set_aside
from irlfast.common.files import append_line, write_text
from irlfast.common.messages import log

Row = dict[str, Any]


def append_row(path: Path, row: Row) -> None:
    """Append a row as one line, by one call that writes it whole. Half a line at the end of the log stays apart.

    Raises:
        OSError: the line does not fit onto the disk. No part of the line stays in the file.
    """
    append_line(path, json.dumps(row))


def read_row(line: bytes) -> Row | None:
    """Return the JSON object in a line, or None if the line is damaged."""
    try:
        row = json.loads(line.decode("utf-8"))  # json would take bytes with NULs for UTF-16
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_log(path: Path, is_whole: Callable[[Row], bool]) -> tuple[list[Row], int]:
    """Return the rows of a log, and the number of its damaged lines. A row must also be ``is_whole``.

    A log that does not exist has no rows.
    """
    if not path.exists():
        return [], 0
    with path.open("rb") as lines:
        read = [read_row(line) for line in lines if line.strip()]
    rows = [row for row in read if row is not None and is_whole(row)]
    return rows, len(read) - len(rows)


def mend(path: Path, is_whole: Callable[[Row], bool]) -> list[Row]:
    """Return the rows of a log, and remove its damaged lines. A log that cannot be read at all is set aside."""
    try:
        rows, damaged = read_log(path, is_whole)
    except OSError as error:  # a folder in its place, a missing permission, a faulty disk
        set_aside(path, f"cannot be read ({error.strerror})")
        return []
    if damaged:
        rewrite(path, rows)
        log(f"{path}: {damaged:,} damaged line{'s are' if damaged > 1 else ' is'} left out")
    return rows


def rewrite(path: Path, rows: Iterable[Row]) -> None:
    """Replace the rows of a log."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))  # in ASCII, which holds half characters, too
