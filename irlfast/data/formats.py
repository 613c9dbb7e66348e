"""Files of rows, one small reader a format. No reader guesses types: text stays as it is written."""

import csv
import gzip
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from irlfast.common.files import ending
from irlfast.data.messages import kind
from irlfast.data.rows import BadRow

Rows = Iterator[tuple[str, dict[str, Any] | BadRow]]  # "line 3" or "row 3", and the row
CHUNK = 2**20  # characters of a JSON list that are read at a time
BATCH = 1024  # rows of a table
BETWEEN = re.compile(r"[\s,]*")


class Written(float):
    """A number of a JSON file, which as text is as it is written: ``1e5``, ``2.50``."""

    def __new__(cls, text: str) -> "Written":
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple:
        return Written, (self.text,)


DECODER = json.JSONDecoder(parse_float=Written, parse_constant=Written, strict=False)


def read_file(path: Path) -> Rows:
    """The rows of a file, by its ending."""
    form, packed = ending(path.name)
    with opened(path, packed) as stream:
        if packed and form in (".parquet", ".arrow"):
            with tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(stream, unpacked)
                unpacked.seek(0)
                yield from READERS[form](unpacked)
        else:
            yield from READERS[form](stream)


def opened(path: Path, packed: str) -> IO[bytes]:
    if packed == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if packed == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


# ---------------------------------------------------------------- JSON


def json_rows(stream: Any) -> Rows:
    """One object a line, or one list of objects."""
    start = stream.peek(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    yield from list_rows(stream) if start == b"[" else line_rows(stream)


def line_rows(stream: Any) -> Rows:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield f"line {number}", json_row(line)


def json_row(line: bytes) -> dict | BadRow:
    try:
        return object_of(DECODER.decode(line.decode("utf-8")))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        reason = f"{error.msg}, character {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        return BadRow(f"not JSON ({reason}); expected one object a line, or one list of objects")


def object_of(value: Any) -> dict | BadRow:
    return value if isinstance(value, dict) else BadRow(f"found {kind(value)}, expected a JSON object")


def list_rows(stream: Any) -> Rows:
    """The objects of a list, of which no more than some are in memory."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
    part = text.read(CHUNK).lstrip()
    place, number = 1, 0
    while True:
        place = BETWEEN.match(part, place).end()  # type: ignore[union-attr]
        if part[place : place + 1] == "]":
            break
        try:
            value, place = DECODER.raw_decode(part, place)
        except (ValueError, RecursionError) as error:
            more = text.read(max(CHUNK, len(part)))
            if not more:
                raise ValueError(f"row {number + 1}: not JSON ({error}); expected a list of objects") from error
            part, place = part[place:] + more, 0
        else:
            number += 1
            yield f"row {number}", object_of(value)
    if (part[place + 1 :] + text.read(CHUNK)).strip():
        raise ValueError(f"found more after the end of its list of {number} rows, expected one list")


# ---------------------------------------------------------------- tables


def csv_rows(stream: Any, delimiter: str = ",") -> Rows:
    """Cells are texts; a row may have several lines within quotes."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        twice = [name for number, name in enumerate(header) if name in header[:number]]
        if twice:
            raise ValueError(f"found two columns {twice[0]!r}, expected names that differ")
        for number, cells in enumerate(filter(None, reader), 1):
            fits = len(cells) == len(header)
            short = BadRow(f"found {len(cells)} cells, expected {len(header)} as in the first line")
            yield f"row {number}", dict(zip(header, cells, strict=True)) if fits else short
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}; expected cells as in RFC 4180") from error


def tsv_rows(stream: Any) -> Rows:
    yield from csv_rows(stream, "\t")


def parquet_rows(stream: Any) -> Rows:
    import pyarrow.parquet

    yield from rows_of(pyarrow.parquet.ParquetFile(stream).iter_batches(BATCH))


def arrow_rows(stream: Any) -> Rows:
    """Arrow's file format, and its stream format, as Hugging Face datasets writes."""
    import pyarrow.ipc

    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        file = pyarrow.ipc.open_file(stream)
        yield from rows_of(file.get_batch(number) for number in range(file.num_record_batches))
    else:
        yield from rows_of(pyarrow.ipc.open_stream(stream))


def rows_of(batches: Any) -> Rows:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            for row in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield f"row {number}", clean(row)


def clean(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose columns stay, null or not, but not the null keys within."""
    return {name: without_nulls(value) for name, value in row.items()}


def without_nulls(value: Any) -> Any:
    """A value without the keys that are null: Arrow gives every object the keys of all."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


READERS = {
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
