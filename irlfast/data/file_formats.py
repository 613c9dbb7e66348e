"""Readers of files of rows, one small function per file format. No reader guesses types: text stays as written."""

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

from irlfast.common.files import row_file_ending
from irlfast.data.messages import describe_type
from irlfast.data.rows import BadRow

Rows = Iterator[tuple[str, dict[str, Any] | BadRow]]  # "line 3" or "row 3", and the row
CHUNK = 2**20  # characters of a JSON list that are read at a time
BATCH = 1024  # rows of a table that are read at a time
SEPARATOR = re.compile(r"[\s,]*")
BOM = b"\xef\xbb\xbf"


class WrittenNumber(float):
    """A number of a JSON file whose ``str`` is the text in the file: ``1e5``, ``2.50``."""

    def __new__(cls, text: str) -> "WrittenNumber":
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple:
        return WrittenNumber, (self.text,)


DECODER = json.JSONDecoder(parse_float=WrittenNumber, parse_constant=WrittenNumber, strict=False)


def read_file(path: Path) -> Rows:
    """Read the rows of a file with the reader for its ending."""
    ending, compression = row_file_ending(path.name)
    with open_file(path, compression) as stream:
        if compression and ending in (".parquet", ".arrow"):  # these readers seek
            with tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(stream, unpacked)
                unpacked.seek(0)
                yield from READERS[ending](unpacked)
        else:
            yield from READERS[ending](stream)


def open_file(path: Path, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


# ---------------------------------------------------------------- JSON


def json_rows(stream: Any) -> Rows:
    """Read one object per line, or one list of objects."""
    start = stream.peek(1024).removeprefix(BOM).lstrip()[:1]
    yield from list_rows(stream) if start == b"[" else line_rows(stream)


def line_rows(stream: Any) -> Rows:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip():
            yield f"line {number}", json_row(line)


def json_row(line: bytes) -> dict | BadRow:
    try:
        return check_object(DECODER.decode(line.decode("utf-8")))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        reason = f"{error.msg}, character {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        return BadRow(f"not JSON ({reason}); expected one object a line, or one list of objects")


def check_object(value: Any) -> dict | BadRow:
    return value if isinstance(value, dict) else BadRow(f"found {describe_type(value)}, expected a JSON object")


def list_rows(stream: Any) -> Rows:
    """Read the objects of a list; only a part of the list is in memory at a time."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
    part = text.read(CHUNK).lstrip()
    place, number = 1, 0
    while True:
        place = SEPARATOR.match(part, place).end()  # type: ignore[union-attr]
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
            yield f"row {number}", check_object(value)
    if (part[place + 1 :] + text.read(CHUNK)).strip():
        raise ValueError(f"found more after the end of its list of {number} rows, expected one list")


# ---------------------------------------------------------------- tables


def csv_rows(stream: Any, delimiter: str = ",") -> Rows:
    """Read a table whose cells are texts; a cell in quotes may have several lines."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        repeated = [name for number, name in enumerate(header) if name in header[:number]]
        if repeated:
            raise ValueError(f"found two columns {repeated[0]!r}, expected names that differ")
        for number, cells in enumerate(filter(None, reader), 1):
            row: dict[str, Any] | BadRow
            if len(cells) == len(header):
                row = dict(zip(header, cells, strict=True))
            else:
                row = BadRow(f"found {len(cells)} cells, expected {len(header)} as in the first line")
            yield f"row {number}", row
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}; expected cells as in RFC 4180") from error


def tsv_rows(stream: Any) -> Rows:
    yield from csv_rows(stream, "\t")


def parquet_rows(stream: Any) -> Rows:
    import pyarrow.parquet

    yield from batch_rows(pyarrow.parquet.ParquetFile(stream).iter_batches(BATCH))


def arrow_rows(stream: Any) -> Rows:
    """Read Arrow's file format, or its stream format, which Hugging Face datasets writes."""
    import pyarrow.ipc

    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        file = pyarrow.ipc.open_file(stream)
        yield from batch_rows(file.get_batch(number) for number in range(file.num_record_batches))
    else:
        yield from batch_rows(pyarrow.ipc.open_stream(stream))


def batch_rows(batches: Any) -> Rows:
    """Yield the rows of Arrow's batches. A damaged batch would crash the process, if it were not checked."""
    number = 0
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, batch.num_rows, BATCH):
            for row in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield f"row {number}", drop_null_keys(row)


def drop_null_keys(row: dict[str, Any]) -> dict[str, Any]:
    """Drop the null keys inside each column's value. A column that is null itself stays."""
    return {name: without_nulls(value) for name, value in row.items()}


def without_nulls(value: Any) -> Any:
    """Drop null keys at every depth, because Arrow gives every object the keys of all objects."""
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
