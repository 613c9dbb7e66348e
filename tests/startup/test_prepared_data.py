"""The prepared data of a run is used again where nothing that it was made from has changed, and only there."""

import gc
import json
import os
import shutil
from pathlib import Path

import pytest

from irlfast.common.files import LOST, InputError
from irlfast.config import make_config
from irlfast.startup import prepare
from irlfast.startup.prepare import write_data
from tests.helpers.runs import contents
from tests.helpers.tokenizers_like import FAMILIES

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i * i}"} for i in range(40)]


class Read(Exception):
    """Raised where rows are read or tokenised."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that prepares the data of one run; with ``reads`` False, reading or tokenising a row fails."""
    file, output = tmp_path / "rows.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = {"config_name": "irlfast/demo/config.json", "dataset_name": str(file), "output_dir": str(output)}

    def begin(reads=True, **keys):
        config = make_config(given | {"train_tokenizer": 300} | keys)
        with monkeypatch.context() as patch:
            if not reads:

                def refuse(*arguments, **options):
                    raise Read

                patch.setattr("irlfast.data.file_formats.open_file", refuse)
                patch.setattr("irlfast.data.encoding.make_safe_tokenizer", refuse)
                patch.setattr("irlfast.models.tokenizers.train_tokenizer", refuse)
            return write_data(config, output, prompts_only=False)

    return begin


def test_a_trained_tokenizer_that_loses_bytes_gets_no_name(start, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def lose(path, content):
        return write_bytes(path, content[: len(content) // 2] if "tokenizer" in path.name else content)

    monkeypatch.setattr(Path, "write_bytes", lose)
    with pytest.raises(OSError, match=LOST):
        start()
    assert not (tmp_path / "run" / "data" / "tokenizer.json").exists()


def test_the_fingerprint_is_that_of_the_data(start, tmp_path):
    found = []
    for rows in (ROWS, ROWS, ROWS[::-1]):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        start()
        found.append(json.loads((tmp_path / "run/data.json").read_text())["fingerprint"])
        shutil.rmtree(tmp_path / "run")
    assert found[0] == found[1] != found[2]


def test_the_garbage_collector_waits_only_while_rows_are_read(start, monkeypatch):
    usual, read_sets, inside = gc.get_threshold(), prepare.read_sets, []

    def read(*given):
        inside.append(gc.get_threshold())
        if len(inside) == 1:
            raise Read
        return read_sets(*given)

    monkeypatch.setattr(prepare, "read_sets", read)
    with pytest.raises(Read):
        start()
    assert gc.get_threshold() == usual
    start()
    assert gc.get_threshold() == usual
    assert [threshold[0] for threshold in inside] == [prepare.OBJECTS] * 2


def test_a_resumed_run_reads_and_tokenises_no_row(start, tmp_path):
    with pytest.raises(Read):
        start(reads=False)
    encoder, lines = start()
    before = contents_of(tmp_path / "run")
    resumed, more = start(reads=False)
    assert more[:-1] == lines and "used again" in more[-1]
    assert contents_of(tmp_path / "run") == before
    assert resumed[2:] == encoder[2:]
    assert resumed.tokenizer.backend_tokenizer.to_str() == encoder.tokenizer.backend_tokenizer.to_str()
    for name, each in (("one", encoder), ("other", resumed)):
        each.tokenizer.save_pretrained(tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")  # and so final/ has the same bytes


def contents_of(output):
    return {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file() and path.name != "MANIFEST"}


def test_a_resumed_run_reads_rows_again_where_their_file_has_another_time_only_to_compare_its_checksum(start, tmp_path):
    start()
    os.utime(tmp_path / "rows.jsonl", (1, 1))
    start(reads=False)
    start(reads=False)


def test_rows_that_make_the_same_data_are_read_again_and_the_run_goes_on(start, tmp_path):
    start()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(Read):
        start(reads=False)
    assert "used again" not in start()[1][-1]
    start(reads=False)


def change_a_row(folder):
    file = folder / "rows.jsonl"
    about = file.stat()
    file.write_text(file.read_text().replace("answer 49", "answer 94"))
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns + 1))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change_a_row, id="a row"),
        {"max_length": 1500},
        {"prompt_template": "Q: {} A:"},
        {"chat_template": "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{{ eos_token }}{% endfor %}"},
        {"chat_template_kwargs": {"thinking": True}},
        {"system_prompt": "Be short."},
        {"bad_rows": "skip"},
        {"seed": 1},
        {"max_train_samples": 39},
        {"learn_turns": "all"},
        {"split_special_tokens": False},
    ],
    ids=str,
)
def test_prepared_data_is_not_used_again_where_what_it_was_made_from_has_changed(start, tmp_path, change):
    start()
    if callable(change):
        change(tmp_path)
    with pytest.raises(Read):
        start(reads=False, **({} if callable(change) else change))


def test_changed_rows_are_refused_as_ever(start, tmp_path):
    start()
    change_a_row(tmp_path)
    with pytest.raises(InputError, match="its run began with other demonstrations"):
        start()


@pytest.mark.parametrize(
    "name", ["train.safetensors", "eval.safetensors", "rows.jsonl", "dropped.jsonl", "tokenizer.json"]
)
@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_prepared_data_that_is_missing_or_damaged_is_made_anew_with_the_same_bytes(start, tmp_path, name, fault):
    start()
    before = contents_of(tmp_path / "run")
    file = tmp_path / "run" / "data" / name
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[1:] + b"x")
    with pytest.raises(Read):
        start(reads=False)
    start()
    after = contents_of(tmp_path / "run")
    assert {path: after[path] for path in before} == before
    start(reads=False)


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma"])
def test_the_content_of_a_tokenizer_of_the_hub_is_part_of_what_prepared_data_is_made_from(start, family, monkeypatch):
    given = {"train_tokenizer": None, "tokenizer_name_or_path": "nobody/hub"}
    monkeypatch.setattr(prepare, "load_tokenizer", lambda *arguments: FAMILIES[family]())
    start(**given)
    start(reads=False, **given)
    monkeypatch.setattr(prepare, "load_tokenizer", lambda *arguments: FAMILIES["pythia"]())
    with pytest.raises(Read):
        start(reads=False, **given)
