"""Files and folders of rows: every format, compressed or not, damaged or not, alone or in a folder with splits."""

import csv
import gzip
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from hypothesis import strategies as st

from irlfast.common.files import COMPRESSIONS, ENDINGS
from irlfast.config import make_config
from irlfast.data.counts import describe_source, dropped_rows
from irlfast.data.read import read_demonstrations
from irlfast.data.sources import sources_of
from tests.fuzz.configuration import ACCEPTED
from tests.fuzz.guards import WORK, fresh_folder, refusal
from tests.fuzz.inputs import changed, damaged, texts, values
from tests.fuzz.rows import COLUMNS, WHOLE, cells, check_demonstration

PAIRS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(3)]
some_rows = st.lists(
    st.just(PAIRS[0]) | st.dictionaries(st.sampled_from(COLUMNS) | texts, cells, max_size=4) | changed(WHOLE),
    max_size=5,
)
string_rows = st.lists(st.dictionaries(st.sampled_from(COLUMNS), st.text(max_size=8), max_size=3), max_size=4)


def table_of(rows: list[dict]) -> pyarrow.Table:
    names = sorted({name for row in rows for name in row})
    return pyarrow.table({name: pyarrow.array([row.get(name) for row in rows], pyarrow.string()) for name in names})


def arrow_bytes(rows: list[dict], opened: Any) -> bytes:
    table, file = table_of(rows), io.BytesIO()
    with opened(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def parquet_bytes(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(table_of(rows), file)
    return file.getvalue()


def csv_bytes(rows: list[dict], delimiter: str) -> bytes:
    names, file = sorted({name for row in rows for name in row}), io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(names)
    writer.writerows([row.get(name, "") for name in names] for row in rows)
    return file.getvalue().encode(errors="replace")


json_lines = some_rows.map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
json_list = (some_rows | values).map(lambda rows: json.dumps(rows).encode())
# The content of files that are as their endings say. Valid tables are drawn from few, because Arrow is slow to write.
TABLES = {
    ".parquet": [parquet_bytes(PAIRS), parquet_bytes([])],
    ".arrow": [arrow_bytes(PAIRS, pyarrow.ipc.new_file), arrow_bytes(PAIRS, pyarrow.ipc.new_stream)],
}
CONTENTS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), json_lines | json_list),
    ".csv": string_rows.map(lambda rows: csv_bytes(rows, ",")),
    ".tsv": string_rows.map(lambda rows: csv_bytes(rows, "\t")),
    **{ending: st.sampled_from(tables) for ending, tables in TABLES.items()},
}
raw = st.text("[]{}:,\"\\ua1\n\r\t '.eE-+0NaInfity", max_size=40).map(str.encode) | st.binary(max_size=40)


@st.composite
def files(draw: Any) -> tuple[str, bytes]:
    """Draw the name and the content of a file of rows."""
    ending, compression = draw(st.sampled_from(ENDINGS)), draw(st.sampled_from(["", "", *COMPRESSIONS]))
    content = draw(CONTENTS[ending] | raw)
    content = draw(damaged(content)) if draw(st.booleans()) else content
    if compression:
        content = gzip.compress(content, 1) if compression == ".gz" else pyarrow.compress(content, "zstd", asbytes=True)
        content = draw(damaged(content, 1)) if draw(st.booleans()) else content
    words = st.sampled_from(["rows", "train", "test", "dev", "train-00000-of-00001", "b/train", "b/c", ".x", "a\nb"])
    return draw(words) + ending + compression, content


SAVED_FILES = ("dataset_dict.json", "train/state.json", "train/dataset_info.json", "train/data-00000-of-00001.arrow")
saved = st.tuples(st.sampled_from(SAVED_FILES), st.none() | st.binary(max_size=8) | st.just("changed"), st.data())
keys = st.fixed_dictionaries(
    {},
    optional={
        "bad_rows": st.sampled_from(["skip", "mend"]),
        "learn_turns": st.sampled_from(["first", "all"]),
        "dataset_train_split": st.sampled_from(["test", "validation", "nowhere"]),
        "dataset_config": st.sampled_from(["b", "../x", "/"]),
        "columns": st.dictionaries(st.sampled_from(["prompt", "answer"]), st.sampled_from(COLUMNS), max_size=2),
        "method": st.just("sft"),
    },
)
INPUTS = st.one_of(
    st.tuples(st.just("file"), files(), keys, st.booleans()),
    st.tuples(st.just("folder"), st.lists(files(), min_size=1, max_size=3), keys, st.booleans()),
    st.tuples(
        st.just("saved"), st.tuples(st.sampled_from(SAVED_FILES), st.integers(0), st.binary()), keys, st.booleans()
    ),
)
EXAMPLES: list[Any] = [
    ("folder", [("rows.jsonl", b"{}")], {"dataset_config": "/"}, False),  # read every file of the machine
    ("folder", [("rows.jsonl", b"{}")], {"dataset_config": "../x"}, False),
]


def check(drawn: tuple) -> None:
    kind, content, settings, prompts_only = drawn
    folder = fresh_folder()
    place = folder / "data"
    if kind == "saved":
        damage_saved(place, *content)
    else:
        written = [content] if kind == "file" else content
        for name, data in written:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            if not (place / name).is_dir():
                (place / name).write_bytes(data)
        place = place / content[0] if kind == "file" else place
    given = ACCEPTED | settings | {"dataset_name": str(place), "eval_dataset_name": str(place)}
    given |= {"bad_rows": settings["bad_rows"]} if "bad_rows" in settings else {}
    try:
        config = make_config(given)
    except ValueError:  # keys that do not go together; the target configuration is about them
        return
    refusal(read, config, prompts_only, names=[str(place), str(folder), repr(str(place))[1:-1]])


def damage_saved(place: Path, name: str, start: int, new: bytes) -> None:
    """Copy a dataset that datasets saved, and write over one of its files from ``start`` on."""
    original = WORK / "saved"
    if not original.exists():
        datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS)}).save_to_disk(str(original))
    shutil.copytree(original, place)
    data = (place / name).read_bytes()
    start %= len(data) + 1
    (place / name).write_bytes(data[:start] + new + data[start + len(new) :] if new else data[:start])


def read(config: Any, prompts_only: bool) -> None:
    """Read all rows as a run does, and describe what was left out."""
    counts: list[Any] = []
    for demonstration in read_demonstrations(config, sources_of(config), counts, prompts_only=prompts_only):
        check_demonstration(demonstration, prompts_only)
        json.dumps(demonstration.row, default=str)
    lines = [*map(describe_source, counts), *map(json.dumps, dropped_rows(counts))]
    assert all(lines)
    os.fspath(config.dataset_name)
