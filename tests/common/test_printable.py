"""Nothing that data, file names or configurations hold can move a terminal's cursor, colour it, or forge a message."""

import contextlib
import io
import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irlfast.common import ranks
from irlfast.common.messages import Progress, log
from irlfast.common.printable import printable
from tests.helpers.runs import printed, settings
from tests.helpers.tiers import full

ATTACKS = [
    "\x1b[2J\x1b[31m",  # clear the screen, and go on in red
    "\x1b]0;title\x07",
    "\x9b31m",  # the same in one byte
    "\rirlfast: all is well",
    "\nirlfast: all is well",
    "\x0b\x0c\x85\u2028\u2029irlfast: all is well",
    "\x08" * 9,
    "\u202egnp.exe",
    "\u2066\u2067\u2068\u2069\u200e\u200f\u061c",
    "\ud83d",
    "\U000e0041",
    "[red]r[/red][/][bold]",
    "[link=http://x]x[/link]:smile:",
    "\\",
]
HOSTILE = "".join(ATTACKS)
texts = st.lists(st.sampled_from(ATTACKS) | st.text(max_size=5)).map("".join)


def raw(text: str) -> set[str]:
    """The characters of a text that a terminal may obey, apart from the ends of its lines."""
    bidirectional = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    controls = {c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} - {"\n"}
    return controls | {c for c in text if unicodedata.bidirectional(c) in bidirectional}


@given(texts)
def test_no_character_stays_that_a_terminal_obeys_and_others_stay_as_they_are(text):
    shown = printable(text)
    assert not raw(shown)
    assert "\n" not in shown
    assert printable(shown) == shown
    assert [c for c in shown if ord(c) > 127] == [
        c for c in text if ord(c) > 127 and (unicodedata.category(c)[0] not in "CZ" or c in shown)
    ]
    assert printable("a\n\t\x1bb", keep="\n\t") == "a\n\t\\x1bb"


@pytest.mark.parametrize(
    "text", ["Grüße, 東京\u3000駅", "نص عربي", "👩\u200d👩\u200d👧 ❤\ufe0f", "क्\u200dष", "C:\\new", "[red]"]
)
def test_ordinary_text_of_any_script_is_shown_as_it_is(text):
    assert printable(text) == text


@given(text=texts)
def test_a_message_is_one_line_whatever_it_quotes(text):
    for say in (log, ranks.say, lambda text: Progress(text, 1, "row").show()):
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            say(text)
        assert not raw(shown.getvalue())
        assert shown.getvalue().count("\n") == 1
        assert shown.getvalue().endswith("\n")


def hostile_rows(folder: Path) -> Path:
    """Rows with hostile prompts, answers and column names, in a file with a hostile name."""
    folder.mkdir()
    path = folder / f"{HOSTILE.replace(chr(0xD83D), '').replace('/', '')}.jsonl"
    row = {"prompt": f"2+2?{HOSTILE}", "completion": f"4{HOSTILE}", f"id{HOSTILE}": 1}
    path.write_text("".join(json.dumps(row | {"prompt": f"{i} {row['prompt']}"}) + "\n" for i in range(12)))
    return path


def check(text: str) -> None:
    assert not raw(text)
    assert not re.search(r"^irlfast: all is well", text, re.MULTILINE)


def train_on_hostile_rows(folder: Path, *more: str) -> tuple[str, str]:
    keys = {"eval_dataset_name": None, "max_eval_samples": 2, "sft_steps": 1, "stages": 1, "inner_steps": 1}
    keys |= {"train_tokenizer": 300, "max_prompt_length": 300, "max_length": 500, "global_batch_size": 1}
    given = settings(folder / "run", dataset_name=hostile_rows(folder / "data"), **keys)
    return printed(["-m", "irlfast.train", *(x for x in given if not x.startswith("eval_dataset_name")), *more])


def test_a_dry_run_on_hostile_names_and_texts_shows_them_as_text(tmp_path):
    out, err = train_on_hostile_rows(tmp_path, "--dry_run")
    check(err)
    assert not raw(out) - {"\t"}
    assert "columns ignored: id\\x1b[2J" in out
    assert "[link=http://x]x[/link]:smile:" in out  # markup stays text


@full
def test_a_run_on_hostile_names_and_texts_prints_none_of_them_raw(tmp_path):
    out, err = train_on_hostile_rows(tmp_path)
    check(out)
    check(err)
    assert "columns ignored: id\\x1b[2J" in err


@pytest.mark.parametrize("key", ["method", "dtype", "dataset_name", "model_name_or_path", "output_dir", "no" + HOSTILE])
def test_a_hostile_value_of_the_configuration_is_one_line_of_an_error(tmp_path, key):
    config = tmp_path / "config.yaml"
    given = {"dataset_name": "x.jsonl", "model_name_or_path": ".", key: HOSTILE}
    config.write_text(json.dumps(given).replace("\\ud83d", ""))  # YAML has no half characters
    out, err = printed(["-m", "irlfast.train", str(config)], code=2)
    check(out + err)
    assert err.count("\n") == 1
    assert err.startswith("irlfast: ")
