"""Rows are read from files of every format, folders and saved datasets, with the same texts from each."""

import csv
import gzip
import itertools
import json
import re
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.common.files import COMPRESSIONS, ENDINGS, InputError
from irlfast.config import dump, load_config, make_config
from irlfast.data.counts import EXAMPLES, describe_source, dropped_rows
from irlfast.data.file_formats import CHUNK, READERS, read_file
from irlfast.data.read import mix, read_demonstrations
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


# ---------------------------------------------------------------- several sources, and their counts


def test_sources_with_weights_keep_their_shares_and_sources_without_are_read_whole(tmp_path):
    first = lines(tmp_path / "first.jsonl", [{"prompt": "a", "completion": f"{i}"} for i in range(90)])
    second = lines(tmp_path / "second.jsonl", [{"question": "b", "answer": f"{i}"} for i in range(40)])
    weighted = [{"name": str(first), "weight": 3}, {"name": str(second), "weight": 1.0}]
    demonstrations, counts = read(weighted)
    names = [d.prompt[0]["content"] for d in demonstrations]
    for count in range(1, len(names)):
        assert abs(names[:count].count("a") - 0.75 * count) <= 1
    assert names.count("a") == 90
    assert [source.rows for source in counts] == [90, len(demonstrations) - 90]
    assert len({*(d.where for d in demonstrations)}) == len(demonstrations)
    assert read(weighted)[0] == demonstrations
    demonstrations, counts = read([first, second])
    assert [source.rows for source in counts] == [90, 40]
    assert {*(d.prompt[0]["content"] for d in demonstrations[:2])} == {"a", "b"}
    assert "second.jsonl: 10 rows read as question and answer" in describe_source(read([first, second], limit=20)[1][1])


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 9), min_size=4, max_size=4),
)
def test_no_item_is_mixed_in_twice(sizes, weights):
    def streams():
        return [iter([(number, item) for item in range(size)]) for number, size in enumerate(sizes)]

    assert sorted(mix(streams(), [None] * len(sizes))) == [*itertools.chain(*streams())]
    items = [*mix(streams(), weights[: len(sizes)])]
    for number in range(len(sizes)):
        taken = [item for stream, item in items if stream == number]
        assert taken == [*range(len(taken))]
        assert abs(len(taken) - len(items) * weights[number] / sum(weights[: len(sizes)])) <= len(sizes)


def test_each_source_may_have_its_own_split_and_columns(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    lines(folder / "test.jsonl", ROWS[1:2])
    odd = lines(tmp_path / "odd.jsonl", [{"q": "p0", "a": "c0"}])
    keys = [{"name": str(odd), "columns": {"prompt": "q", "answer": "a"}}, {"name": str(folder), "split": "test"}]
    assert texts_of(keys) == [("p0", "c0"), ("p1", "c1")]
    config, _ = load_config([f"dataset_name={json.dumps(keys)}", "model_name_or_path=owner/name"])
    assert sources_of(config) == sources_of(config_of(keys))
    assert make_config(yaml.safe_load(dump(config))) == config
    keys[1]["split"] = "train"  # of the rows to learn from, and not of the held-out ones
    config = config_of(keys[1:], dataset_test_split="test")
    assert [source.split for source in (*sources_of(config), *sources_of(config, held_out=True))] == ["train", "test"]
    config, _ = load_config([f"dataset_name={odd}", "columns={prompt: q, answer: a}", "model_name_or_path=owner/name"])
    assert config.columns == keys[0]["columns"]


@pytest.mark.parametrize(
    "wrong", ["[3]", "[{nam: x}]", "[{name: owner/x, weight: 0}]", "[{name: x, split: []}]", "{name: x}"]
)
def test_the_message_for_a_wrong_source_says_what_is_expected(wrong):
    with pytest.raises(
        InputError, match=r"dataset_name: found .*, expected a name, or a list of names or of {name, weight"
    ):
        config_of("owner/x", dataset_name=yaml.safe_load(wrong))
    with pytest.raises(InputError, match="found sources with a weight and without"):
        config_of(["owner/x", {"name": "owner/y", "weight": 2}])
    with pytest.raises(InputError, match="dataset_name: found nothing"):
        config_of([])


def test_rows_are_read_one_at_a_time(tmp_path):
    """Reading one row of a file does not meet its second row, which is broken."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\nno JSON\n')
    assert len(read(path, limit=1)[0]) == 1


def test_the_summary_of_a_source_names_conventions_ignored_columns_and_rows_left_out(tmp_path):
    rows = [row | {"id": 1, "source": None, "label": i > 1} for i, row in enumerate(ROWS)]
    rows += [{"prompt": "q", "completion": " "}, {"nothing": 1}, {"prompt": "half \ud83d", "completion": "a"}]
    path = lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=r"rows.jsonl, line 7: found columns nothing; expected prompt and completion"):
        read(path)
    demonstrations, [counts] = read(path, bad_rows="skip")
    assert describe_source(counts) == (
        f"{path}: 8 rows read as prompt and completion; columns ignored: id; left out: 2 with label false, "
        "1 without an answer, 1 that cannot be read; lone surrogates replaced by U+FFFD: 1"
    )
    dropped = [*dropped_rows([counts])]
    assert [row["where"].split(", ")[1] for row in dropped] == ["line 1", "line 2", "line 6", "line 7"]
    assert dropped[0]["row"] == rows[0]
    assert demonstrations[-1].row == {"prompt": "half \ufffd", "completion": "a"}


def test_few_examples_are_kept_for_each_reason(tmp_path):
    path = lines(tmp_path / "rows.jsonl", [*ROWS, *[{"prompt": "q", "completion": ""}] * 20])
    [counts] = read(path)[1]
    assert counts.left_out == {"without an answer": 20}
    assert len(counts.dropped) == EXAMPLES


def test_only_sft_takes_texts_without_a_prompt(tmp_path):
    path = lines(tmp_path / "rows.jsonl", [{"text": "a story"}])
    [row] = read(path, method="sft")[0]
    assert (row.prompt, row.answer) == ([], said("assistant", "a story"))
    with pytest.raises(InputError, match=r"line 1: found a text without a prompt, which only method sft learns"):
        read(path)


def test_sft_learns_all_turns_and_other_methods_the_last_turn(tmp_path):
    talk = [said("user", "q"), said("assistant", "a"), said("user", "r"), said("assistant", "b")]
    path = lines(tmp_path / "rows.jsonl", [{"messages": talk}])
    assert (config_of(path).learn_turns, config_of(path, method="sft").learn_turns) == ("last", "all")
    assert read(path, learn_turns="first")[0][0].answer == talk[1]
    assert read(path)[0][0].answer == talk[3]


def test_a_file_of_prompts_is_read_if_only_prompts_are_wanted(tmp_path):
    path = lines(tmp_path / "prompts.jsonl", [{"prompt": "q"}, {"messages": [said("user", "r")]}, {"text": "no"}])
    with pytest.raises(InputError, match=r"line 1: found a prompt without an answer"):
        read(path)
    demonstrations, [counts] = read(path, prompts_only=True, bad_rows="skip")
    assert [(d.prompt[0]["content"], d.answer) for d in demonstrations] == [("q", None), ("r", None)]
    assert counts.left_out.total() == 1


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
    with pytest.raises(InputError, match="dataset_test_split: found 'train', from which the run learns"):
        config_of(lines(tmp_path / "rows.jsonl", ROWS), dataset_test_split="train")
