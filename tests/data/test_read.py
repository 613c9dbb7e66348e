"""Several sources are mixed by weight, and their counts name what was read and left out."""

import itertools
import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from irlfast.common.files import InputError
from irlfast.config import dump, load_config, make_config
from irlfast.data.counts import EXAMPLES, describe_source, dropped_rows
from irlfast.data.read import mix
from irlfast.data.sources import sources_of
from tests.data.test_conventions import said
from tests.data.test_sources import ROWS, config_of, lines, read, texts_of


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
