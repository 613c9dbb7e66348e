"""The demonstrations are reproducible, right by an independent rule check, and without overlap."""

import collections
import json
import random
import re
from pathlib import Path

import pytest

from irlfast.demo import generate

FOLDER = Path(generate.__file__).parent
# Written by hand, so that an error that writers and expert share would show.
KNOWN = {
    "twenty to nine in the evening": "20:40",
    "half past noon": "12:30",
    "ten to noon": "11:50",
    "a quarter to midnight": "23:45",
    "five past midnight": "00:05",
    "twenty past twelve at night": "00:20",
    "ten to one in the afternoon": "12:50",
    "twelve oh five in the afternoon": "12:05",
    "seventeen minutes past three in the morning": "03:17",
    "nine o'clock at night": "21:00",
    "12:25 am": "00:25",
    "12:25 pm": "12:25",
    "midnight": "00:00",
    "the third of March nineteen eighty-seven": "1987-03-03",
    "the twenty-first of May two thousand and six": "2006-05-21",
    "the twelfth of August nineteen hundred": "1900-08-12",
    "the thirtieth of June nineteen oh five": "1905-06-30",
    "Mar 2, 2023": "2023-03-02",
    "the day before the 1st of March 1988": "1988-02-29",
    "the day after 28 February 1900": "1900-03-01",
    "the day after New Year's Eve 1999": "2000-01-01",
    "Christmas Day 1954": "1954-12-25",
    "four hundred and seventeen": "417",
    "twelve thousand four hundred six": "12406",
    "thirty thousand and five": "30005",
    "twenty-six hundred and five": "2605",
    "three and three quarters thousand": "3750",
    "1.2 million": "1200000",
    "an hour and a half": "90 min",
    "three and a quarter hours": "195 min",
    "two hours and a minute": "121 min",
    "ten minutes short of two hours": "110 min",
    "3 h 25 min": "205 min",
}
SHAPES = {"time": r"\d\d:\d\d", "date": r"\d{4}-\d\d-\d\d", "number": r"\d+", "duration": r"\d+ min"}


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def kind(answer: str) -> str:
    [name] = [name for name, shape in SHAPES.items() if re.fullmatch(shape, answer)]
    return name


def test_regenerating_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "__file__", str(tmp_path / "generate.py"))
    generate.main()
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


@pytest.mark.parametrize("prompt", KNOWN)
def test_the_expert_answers_known_prompts(prompt):
    assert generate.expert(prompt) == KNOWN[prompt]


@pytest.mark.parametrize("name", ["train", "test"])
def test_every_answer_is_right(name):
    for row in read(name):
        assert generate.expert(row["prompt"]) == row["completion"], row


@pytest.mark.parametrize("write", generate.WRITERS, ids=lambda write: write.__name__)
def test_the_expert_answers_every_prompt_of_the_writers(write):
    rng = random.Random(1)
    for _ in range(5000):
        prompt, completion = write(rng)
        assert generate.expert(prompt) == completion, prompt


def test_no_held_out_prompt_is_a_training_prompt():
    prompts = [row["prompt"] for name in ("train", "test") for row in read(name)]
    assert len({*prompts}) == len(prompts) == generate.TRAIN_ROWS + generate.TEST_ROWS


@pytest.mark.parametrize(("name", "rows"), [("train", 8000), ("test", 500)])
def test_the_files_have_their_sizes_and_about_as_many_rows_of_each_kind(name, rows):
    demonstrations = read(name)
    assert len(demonstrations) == rows
    assert all({*row} == {"prompt", "completion"} for row in demonstrations)
    kinds = collections.Counter(kind(row["completion"]) for row in demonstrations)
    assert {*kinds} == {*SHAPES}
    assert min(kinds.values()) > 0.8 * rows / len(SHAPES)


def test_the_set_is_small_enough_to_ship():
    assert sum((FOLDER / f"{name}.jsonl").stat().st_size for name in ("train", "test")) < 700_000


def test_the_model_has_about_a_million_parameters():
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(FOLDER / "config.json")
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e6
