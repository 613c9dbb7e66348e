"""Configurations: values of keys, files of YAML, words of the command line."""

import os
import re
from typing import Any

from hypothesis import strategies as st
from pydantic_core import PydanticUndefined

from irlfast.common.files import home_path
from irlfast.common.yaml_text import parse_yaml
from irlfast.config import Config, dump, load_config, make_config
from irlfast.config.schema import FIELDS
from irlfast.runs.output import check_output
from tests.fuzz.guards import fresh_folder, refusal
from tests.fuzz.inputs import HOSTILE_TEXTS, texts, values

KEYS = sorted(FIELDS)
ACCEPTED = {
    "dataset_name": "irlfast/demo/train.jsonl",
    "config_name": "irlfast/demo/config.json",
    "train_tokenizer": 300,
}
YAML_PARTS = (
    *("a: ", "- ", "&a ", "*a ", "<<: ", "{", "}", "[", "]", ", ", ": ", "? ", "| ", "> ", "!!", "# ", "\n", "  "),
    *(
        "--- ",
        "... ",
        "%YAML ",
        "'",
        '"',
        "null",
        "2001-99-99",
        "1_000",
        "0x_",
        ".nan",
        "!!binary ",
        "!!set ",
        "!!omap ",
    ),
    *("method: irft\n", "beta: 1\n", "columns: ", "dataset_name: x.jsonl\n", "reward_function: ", "output_dir: "),
    *HOSTILE_TEXTS,
)


def values_of(key: str) -> st.SearchStrategy[tuple[str, Any]]:
    """Draw a key with one of its words, its default, or a hostile value."""
    field = Config.__pydantic_fields__[key]  # type: ignore[attr-defined]
    words = re.findall(r"'(\w+)'", str(field.annotation)) if "Literal" in str(field.annotation) else []
    default = None if field.default is PydanticUndefined else field.default
    return st.tuples(st.just(key), st.sampled_from([default, *words, 1, 0.5, True]) | values)


some_values = st.lists(st.sampled_from(KEYS).flatmap(values_of), max_size=4).map(dict)
some_files = st.lists(st.sampled_from(YAML_PARTS) | st.text(max_size=6), max_size=24).map("".join) | st.text(
    max_size=60
)
some_words = st.lists(
    st.tuples(st.sampled_from(KEYS), st.sampled_from(["=", "", "+="]), texts | st.text("[]{}&*:, a1", max_size=20)).map(
        "".join
    )
    | texts,
    max_size=4,
)
INPUTS = st.one_of(
    st.tuples(st.just("values"), some_values),
    st.tuples(st.just("file"), st.tuples(some_files, st.binary(max_size=8))),
    st.tuples(st.just("words"), some_words),
)
EXAMPLES: list[Any] = [
    ("words", ["1" * 300]),  # no path can have this name
    ("words", ["a\nb"]),
    ("values", {"output_dir": "~nobody/x"}),
    ("values", {"dataset_name": "~nobody/*.jsonl"}),
]


def check(drawn: tuple[str, Any]) -> None:
    kind, content = drawn
    folder = fresh_folder()
    os.chdir(folder)
    if kind == "values":
        refusal(take, ACCEPTED | content, names=KEYS)
    elif kind == "file":
        path = folder / "run.yaml"
        path.write_bytes(content[0].encode(errors="replace") + content[1])
        refusal(load_config, [str(path)], names=["config file", "unknown key", *KEYS])
    else:
        words = [f"{key}={value}" for key, value in ACCEPTED.items()]
        try:
            refusal(load_config, [*words, *content], names=["config", "unknown key", "recipe", *KEYS])
        except SystemExit as end:  # argparse prints the help, or one sentence of its own
            assert end.code in (0, 2)


def take(keys: dict[str, Any]) -> None:
    """Make a configuration, read back what the run would write of it, and look at its output_dir."""
    config = make_config(keys)
    assert Config(**parse_yaml(dump(config))) == config
    if not os.path.isabs(config.output_dir) and ".." not in config.output_dir:
        check_output(home_path(config.output_dir), config)
