"""Rows are read from files of every format, folders and saved datasets, with the same texts from each."""

import csv
import gzip
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.common.files import COMPRESSIONS, ENDINGS, InputError
from irlfast.config import make_config
from irlfast.data.counts import describe_source
from irlfast.data.file_formats import CHUNK, READERS, read_file
from irlfast.data.read import read_demonstrations
from irlfast.data.sources import sources_of
from tests.data.test_conventions import WORDS, anything, said

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]


def config_of(name, **keys):
    given_name = (
        [str(item) if isinstance(item, Path) else item for item in name] if isinstance(name, list) else str(name)
    )
    return make_config({"dataset_name": given_name, "model_name_or_path": "owner/name"} | keys)


def read(name, held_out=False, limit=None, prompts_only=False, **keys):
    """Read the demonstrations of a dataset, and the counts of its sources."""
    config, counts = config_of(name, **keys), []
    sources = sources_of(config, held_out)
    return [*read_demonstrations(config, sources, counts, limit=limit, prompts_only=prompts_only)], counts


def texts_of(name, **keys):
    return [(d.prompt[-1]["content"], d.answer["content"]) for d in read(name, **keys)[0]]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pack(path, content, packed):
    if packed == ".gz":
        path.write_bytes(gzip.compress(content))
    elif packed == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(content)


def table(rows, delimiter):
    with tempfile.TemporaryFile("w+", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        file.seek(0)
        return file.read().encode()


def parquet(rows):
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def arrow(rows, new=pa.ipc.new_stream):
    sink, whole = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    with new(sink, whole.schema) as writer:
        writer.write_table(whole)
    return sink.getvalue().to_pybytes()


def json_lines(rows):
    return "\r\n".join(map(json.dumps, rows)).encode() + b"\n\n"


WRITERS = {
    ".jsonl": [json_lines, lambda rows: b"\xef\xbb\xbf" + json_lines(rows)],
    ".ndjson": [json_lines],
    ".json": [
        lambda rows: b"\xef\xbb\xbf\n" + json.dumps(rows).encode(),
        json_lines,
        lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    ],
    ".csv": [lambda rows: table(rows, ","), lambda rows: b"\xef\xbb\xbf" + table(rows, ",")],
    ".tsv": [lambda rows: table(rows, "\t")],
    ".parquet": [parquet],
    ".arrow": [arrow, lambda rows: arrow(rows, pa.ipc.new_file)],
}
cells = st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
cells = cells.filter(lambda text: text.strip() and "\0" not in text)  # Python 3.10's csv takes no NUL


@pytest.mark.parametrize("packed", ["", *COMPRESSIONS])
@pytest.mark.parametrize("ending", ENDINGS)
@settings(max_examples=12, deadline=None)
@given(pairs=st.lists(st.tuples(cells, cells), min_size=1, max_size=4))
def test_every_file_format_gives_back_the_texts_that_were_written(ending, packed, pairs):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    with tempfile.TemporaryDirectory() as folder:
        for number, writer in enumerate(WRITERS[ending]):
            path = Path(folder) / f"my.data-{number}{ending.upper() if number else ending}{packed}"
            pack(path, writer(rows), packed)
            assert texts_of(path) == pairs


def test_there_is_a_reader_for_every_ending():
    assert {*READERS} == {*ENDINGS} == {*WRITERS}


def test_a_json_list_longer_than_one_chunk_is_read_whole(tmp_path):
    rows = [{"prompt": f"{i}", "completion": "[{]},\\ " * (i % 40_000)} for i in range(1, 120_000, 17_001)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert path.stat().st_size > CHUNK
    assert [row for _, row in read_file(path)] == rows
    path.write_text(json.dumps(rows)[:-9])
    with pytest.raises(InputError, match=r"rows.json: cannot be read \(row 8: not JSON"):
        texts_of(path)
    path.write_text(json.dumps(rows) + json.dumps(rows))
    with pytest.raises(InputError, match="found more after the end of its list"):
        texts_of(path)


def test_numbers_become_the_text_in_the_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(
        '[{"prompt": 1e5, "completion": 2.50}, {"prompt": 7, "completion": NaN}, {"prompt": true, "completion": 0.1}]'
    )
    assert texts_of(path) == [("1e5", "2.50"), ("7", "NaN"), ("true", "0.1")]


def test_control_characters_in_json_stay_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a\tb\x07", "completion": "\\u0000\x1b"}\n')
    assert texts_of(path) == [("a\tb\x07", "\0\x1b")]


BROKEN = {
    "rows.jsonl": (b'{"prompt": "a", "completion": "b"}\n\n{"prompt": \n', "rows.jsonl, line 3: not JSON"),
    "list.jsonl": (b'{"prompt": "a", "completion": "b"}\n[3]\n', "list.jsonl, line 2: found a list, expected a JSON o"),
    "latin.jsonl": (b'{"prompt": "a", "completion": "\xff"}\n', "latin.jsonl, line 1: not JSON"),
    "deep.jsonl": (b'{"prompt": ' + b"[" * 9999 + b"\n", "deep.jsonl, line 1: not JSON"),
    "object.json": (b'{\n"data": []}', "object.json, line 1: not JSON"),
    "item.json": (b'[{"prompt": "a", "completion": "b"}, 3]', "item.json, row 2: found a number, expected"),
    "long.csv": (b"prompt,completion\na,b\na,b,c\n", "long.csv, row 2: found 3 cells, expected 2"),
    "quote.csv": (b'prompt,completion\n"a" b,c\n', "quote.csv: cannot be read .line 2: "),
    "open.csv": (b'prompt,completion\na,"b\nc,d\n', "open.csv: cannot be read .line 3: "),
    "twice.csv": (b"prompt,prompt\na,b\n", "twice.csv: cannot be read .found two columns 'prompt'"),
    "latin.csv": (b"prompt,completion\na,\xff\n", "latin.csv: cannot be read"),
    "rows.parquet": (b"PAR1 no", "rows.parquet: cannot be read"),
    "rows.arrow": (b"no", "rows.arrow: cannot be read"),
    "rows.jsonl.gz": (b"no", "rows.jsonl.gz: cannot be read"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 99)[:-9], "cut.jsonl.gz: cannot"),
    "rows.csv.zst": (b"no", "rows.csv.zst: cannot be read"),
    "rows.txt": (b"no", "rows.txt: found a file that ends in '.txt', expected .jsonl, .ndjson, .json, .csv,"),
    "rows": (b"no", "rows: found a file that ends in 'nothing', expected .jsonl"),
    "empty.jsonl": (b"\n", "found no demonstration; .*empty.jsonl: 0 rows read"),
    "empty.csv": (b"", "found no demonstration; .*empty.csv: 0 rows read"),
    "null.jsonl": (b'{"messages": [{"role": "assistant", "content": null}]}', "null.jsonl, line 1: message 1: found"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_refused_in_one_sentence_that_names_the_place(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        texts_of(tmp_path / name)
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "chosen"]), anything), max_size=4
    )
)
def test_any_json_row_is_read_or_counted_or_refused_with_its_file_and_line(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = lines(Path(folder) / "rows.jsonl", rows)
        try:
            demonstrations, [counts] = read(path, bad_rows="skip")
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert len(demonstrations) + counts.left_out.total() == counts.rows == len(rows)
        try:
            read(path)
        except InputError as error:
            assert re.search(rf"{re.escape(str(path))}(, line \d+)?: ", str(error))


# ---------------------------------------------------------------- folders, patterns, saved datasets, splits


def test_the_names_of_files_give_the_splits_of_a_folder(tmp_path):
    lines(tmp_path / "train-00000-of-00002.jsonl", ROWS[:1])
    lines(tmp_path / "train-00001-of-00002.jsonl", ROWS[1:2])
    lines(tmp_path / "train_sft-00000-of-00001.jsonl", ROWS[2:3])
    (tmp_path / "dev").mkdir()
    lines(tmp_path / "dev" / "rows.json", ROWS[3:4])
    lines(tmp_path / "latest.jsonl", ROWS)
    (tmp_path / "README.md").write_text("about")
    demonstrations, [counts] = read(tmp_path)
    assert [d.answer["content"] for d in demonstrations] == ["c0", "c1"]
    assert "files ignored, whose names tell no split: 1" in describe_source(counts)
    assert texts_of(tmp_path, dataset_train_split="train_sft") == [("p2", "c2")]
    assert texts_of(tmp_path, dataset_train_split="validation") == texts_of(tmp_path, dataset_train_split="dev")
    assert texts_of(tmp_path, eval_dataset_name=str(tmp_path), held_out=True) == [("p3", "c3")]
    with pytest.raises(InputError, match=r"no split 'test', expected one that it has: .*'train_sft'"):
        texts_of(tmp_path, dataset_test_split="test", held_out=True)


def test_a_folder_without_split_names_and_a_pattern_are_the_split_train(tmp_path):
    for number in range(3):
        lines(tmp_path / f"part{number}.jsonl", ROWS[number : number + 1])
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert texts_of(tmp_path) == texts_of(tmp_path / "*.jsonl") == [(f"p{i}", f"c{i}") for i in range(3)]
    assert texts_of(tmp_path / "part[12].jsonl") == [("p1", "c1"), ("p2", "c2")]
    lines(tmp_path / "test.jsonl", ROWS[3:])
    assert texts_of(tmp_path / "te*.jsonl") == [("p3", "c3"), ("p4", "c4")]
    with pytest.raises(InputError, match="no such file or folder"):
        texts_of(tmp_path / "*.csv")


def test_dataset_config_names_a_subfolder(tmp_path):
    (tmp_path / "main").mkdir()
    lines(tmp_path / "main" / "train.jsonl", ROWS[:1])
    assert texts_of(tmp_path, dataset_config="main") == [("p0", "c0")]
    with pytest.raises(InputError, match="found no folder 'other'"):
        texts_of(tmp_path, dataset_config="other")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "test.csv", "rows.parquet", "saved"])
def test_a_single_file_has_only_the_split_train(tmp_path, name):
    dataset = datasets.Dataset.from_list(ROWS)
    if name == "saved":
        dataset.save_to_disk(tmp_path / name)
    else:
        pack(tmp_path / name, WRITERS[Path(name).suffix][0](ROWS), "")
    path = tmp_path / name
    assert len(texts_of(path)) == 5
    assert len(texts_of(path, eval_dataset_name=str(path), held_out=True)) == 5
    for keys in ({"dataset_test_split": "test", "held_out": True}, {"dataset_train_split": "validation"}):
        with pytest.raises(InputError, match=r"found no split '(test|validation)', expected one that it has: 'train'"):
            texts_of(path, **keys)


def test_a_saved_dataset_is_read_by_split_and_a_sequence_of_structs_as_messages(tmp_path):
    talk = [said("user", "q"), said("assistant", "a")]
    features = datasets.Features(
        {"messages": datasets.Sequence({"role": datasets.Value("string"), "content": datasets.Value("string")})}
    )
    struct = {name: [m[name] for m in talk] for name in ("role", "content")}
    saved = datasets.Dataset.from_list([{"messages": struct}], features=features)
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "saved")
    assert texts_of(tmp_path / "saved") == texts_of(tmp_path / "saved", dataset_test_split="test", held_out=True)
    assert texts_of(tmp_path / "saved") == [("q", "a")]
    with pytest.raises(InputError, match="no split 'validation', expected one that it has: 'train', 'test'"):
        texts_of(tmp_path / "saved", dataset_train_split="validation")


def test_null_keys_that_arrow_adds_are_dropped(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": "2"}}}
    rows = [{"messages": [said("user", "q"), {"role": "assistant", "tool_calls": [one]}]} for one in (call, other)]
    (tmp_path / "rows.parquet").write_bytes(parquet([*rows, {"messages": [said("user", "q"), said("assistant", "a")]}]))
    answers = [d.answer for d in read(tmp_path / "rows.parquet")[0]]
    assert answers[:2] == [{"role": "assistant", "content": "", "tool_calls": [one]} for one in (call, other)]
    assert answers[2] == said("assistant", "a")


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet.zst", "./gone", "a/b/c", "~/gone", "gone.NDJSON"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for keys in ({"name": name}, {"name": ["owner/name", name]}, {"name": "owner/name", "eval_dataset_name": name}):
        with pytest.raises(InputError, match=f"dataset_name: no such file or folder: {name}"):
            config_of(**keys)


# ---------------------------------------------------------------- the hub


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_on_the_hub_is_read_by_split_downloaded_or_streamed(tmp_path, monkeypatch, streaming):
    """Hugging Face's library reads a folder laid out as a dataset of the hub."""
    (tmp_path / "data").mkdir()
    for split, rows in (("train", ROWS[:3]), ("test", ROWS[3:])):
        (tmp_path / "data" / f"{split}-00000-of-00001.parquet").write_bytes(parquet(rows))
    monkeypatch.setattr("irlfast.data.sources.locate", lambda name: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    keys = {"streaming": streaming, "dataset_revision": "main"}
    assert texts_of(tmp_path, **keys) == [(f"p{i}", f"c{i}") for i in range(3)]
    assert texts_of(tmp_path, dataset_test_split="test", held_out=True, **keys) == [("p3", "c3"), ("p4", "c4")]
    assert texts_of(tmp_path, eval_dataset_name=str(tmp_path), held_out=True, **keys) == [("p3", "c3"), ("p4", "c4")]
    with pytest.raises(InputError, match=r"split 'validation': cannot be read .*train.*test"):
        texts_of(tmp_path, dataset_train_split="validation", **keys)


def test_the_training_split_is_refused_as_the_held_out_split(tmp_path):
    with pytest.raises(InputError, match="dataset_test_split: found 'train', which the run learns from"):
        config_of(lines(tmp_path / "rows.jsonl", ROWS), dataset_test_split="train")


READ_DAMAGED = """
import random, sys
from pathlib import Path
from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.data.read import read_demonstrations
from irlfast.data.sources import sources_of

path, name = Path(sys.argv[1]), sys.argv[2]
whole, draw, refused = path.read_bytes(), random.Random(0), 0
config = make_config({"dataset_name": name, "config_name": "irlfast/demo/config.json", "train_tokenizer": 300})
for number in range(int(sys.argv[3])):
    damaged = bytearray(whole)
    for _ in range(draw.randint(1, 8)):
        damaged[draw.randrange(len(damaged))] = draw.randrange(256)
    path.write_bytes(damaged)
    try:
        list(read_demonstrations(config, sources_of(config), []))
    except InputError:
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("kind", ["file", "stream", "saved"])
def test_damaged_arrow_files_are_read_or_refused_and_do_not_crash_the_process(tmp_path, kind):
    rows = [{"prompt": f"question {number}", "completion": "answer " * number} for number in range(30)]
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        path, name = next((tmp_path / "saved").glob("*.arrow")), tmp_path / "saved"
    else:
        path = name = tmp_path / "rows.arrow"
        path.write_bytes(arrow(rows, pa.ipc.new_file if kind == "file" else pa.ipc.new_stream))
    arguments = [sys.executable, "-c", READ_DAMAGED, str(path), str(name), "200"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < int(done.stdout) <= 200
