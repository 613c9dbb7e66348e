"""Rows of any convention, as JSON and tables give them."""

from typing import Any

from hypothesis import strategies as st

from irlfast.common.files import jsonl_text
from irlfast.data.conventions import CONVENTIONS
from irlfast.data.demonstrations import to_demonstration
from irlfast.data.messages import replace_surrogates
from irlfast.data.rows import BadRow, LeftOut
from tests.fuzz.guards import OUTCOMES
from tests.fuzz.inputs import changed, texts, values

COLUMNS = sorted(
    {column for each in CONVENTIONS for column in each.columns}
    | {"rejected", "system", "system_prompt", "tools", "label", "history", "input", "context", "id"}
)
NAMES = ("prompt", "answer", "rejected", "messages", "text", "system", "tools", "label")
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "gpt", "human", "function_call"]) | values},
        optional={
            "content": texts | values,
            "weight": st.sampled_from([0, 1, "0", None]),
            "tool_calls": values,
            "reasoning_content": texts,
            "name": values,
        },
    ),
    max_size=5,
)
dialogue = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " a", "Human:", "\n"]) | texts, max_size=6)
cells = st.one_of(messages, texts, dialogue.map("".join), values, messages.map(repr), messages.map(jsonl_text))
WHOLE = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
        {"role": "assistant", "content": "b", "weight": 1},
    ],
    "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
    "conversations": {"from": ["human", "gpt"], "value": ["a", "b"]},
    "tools": '[{"type": "function", "function": {"name": "f", "parameters": {}}}]',
    "history": [["a", "b"]],
    "instruction": "a",
    "output": "b",
}
some_rows = st.dictionaries(st.sampled_from(COLUMNS) | texts, cells, max_size=6) | changed(WHOLE).filter(
    lambda row: isinstance(row, dict)
)
INPUTS = st.tuples(
    some_rows,
    st.sampled_from(["first", "last", "all"]),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(COLUMNS) | texts, max_size=2),
    st.booleans(),
)
EXAMPLES: list[Any] = []


def check(drawn: tuple) -> None:
    row, learn, columns, prompts_only = drawn
    try:
        parsed = to_demonstration(replace_surrogates(row)[0], "here", learn, columns, prompts_only)
    except (BadRow, LeftOut) as error:
        assert str(error) and "\n" not in str(error)
        OUTCOMES["refused"] += 1
        return
    OUTCOMES["accepted"] += 1
    check_demonstration(parsed.demonstration, prompts_only)


def check_demonstration(demonstration: Any, prompts_only: bool) -> None:
    """Check that messages have a role and a text, and that there is an answer where one is needed."""
    assert prompts_only or demonstration.answer is not None
    for message in [*demonstration.prompt, demonstration.answer, demonstration.rejected]:
        if message is not None:
            assert isinstance(message["role"], str) and isinstance(message["content"], str)
            message["content"].encode()
