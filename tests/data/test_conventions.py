"""Rows of every convention give back drawn conversations unchanged, and no row ends in a traceback."""

import json
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.data import demonstrations
from irlfast.data.demonstrations import CUT, ELSEWHERE, EQUAL, read_question_and_answer, to_demonstration
from irlfast.data.messages import replace_surrogates
from irlfast.data.rows import BadRow, LeftOut

WORDS = [
    "2021-05-03",
    "007",
    "null",
    "NA",
    "nan",
    "1e5",
    "True",
    "None",
    'a "quoted" word',
    "a,b;c\td",
    "two\nlines",
    "é 漢 😀",
]
texts = st.one_of(st.sampled_from(WORDS), st.text(st.characters(exclude_categories=["Cs"]), max_size=12)).filter(
    lambda text: text.strip() == text != "" and "Human:" not in text and "Assistant:" not in text
)


def said(role, text):
    return {"role": role, "content": text}


@st.composite
def conversations(draw):
    """Draw the messages before an answer, the answer, and another answer; user and assistant take turns."""
    earlier = draw(st.lists(st.tuples(texts, texts), max_size=2))
    turns = [said(role, text) for pair in earlier for role, text in zip(("user", "assistant"), pair, strict=True)]
    answer, other = draw(texts), draw(texts)
    system = [said("system", draw(texts))] if draw(st.booleans()) else []
    return [*system, *turns, said("user", draw(texts))], said("assistant", answer), said("assistant", other)


def sharegpt(messages):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


def struct_of_lists(messages):
    return {name: [m[name] for m in messages] for name in ("role", "content")}


def dialogue(messages):
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages)


def alpaca(prompt, answer):
    system = prompt[0]["content"] if prompt[0]["role"] == "system" else None
    turns = [m["content"] for m in prompt if m["role"] != "system"]
    history = [list(pair) for pair in zip(turns[0:-1:2], turns[1:-1:2], strict=True)]
    return {"instruction": turns[-1], "input": "", "output": answer["content"], "system": system, "history": history}


# name: (a function from prompt, answer and other answer to a row; whether the other answer is a rejected answer)
WHOLE = {
    "TRL's messages in prompt and completion": (lambda p, a, b: {"prompt": p, "completion": [a]}, False),
    "messages": (lambda p, a, b: {"messages": [*p, a]}, False),
    "messages as JSON": (lambda p, a, b: {"messages": json.dumps([*p, a])}, False),
    "messages as a struct of lists": (lambda p, a, b: {"messages": struct_of_lists([*p, a])}, False),
    "messages of parts": (
        lambda p, a, b: {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in [*p, a]]},
        False,
    ),
    "ShareGPT": (lambda p, a, b: {"conversations": sharegpt([*p, a])}, False),
    "ShareGPT's pairs": (
        lambda p, a, b: {"conversations": sharegpt(p), "chosen": sharegpt([a])[0], "rejected": sharegpt([b])[0]},
        True,
    ),
    "Alpaca": (lambda p, a, b: alpaca(p, a), False),
    "SPIN": (lambda p, a, b: {"real": [*p, a], "generated": [*p, b]}, False),
    "TRL's explicit pairs": (lambda p, a, b: {"prompt": p, "chosen": [a], "rejected": [b]}, True),
    "TRL's implicit pairs": (lambda p, a, b: {"chosen": [*p, a], "rejected": [*p, b]}, True),
    "UltraFeedback": (
        lambda p, a, b: {
            "prompt": p[-1]["content"], "prompt_id": "x", "messages": [*p, a], "chosen": [*p, a], "rejected": [*p, b],
            "score_chosen": 8.0, "score_rejected": 2.0,
        },
        True,
    ),
    "pairs beside a prompt without its system turn": (
        lambda p, a, b: {"prompt": p, "chosen": [p[-1], a], "rejected": [p[-1], b]}, True
    ),
    "a null column beside": (
        lambda p, a, b: {"messages": [*p, a], "chosen": None, "prompt": None, "rejected": [*p, b]}, False
    ),
    "named by the key columns": (lambda p, a, b: {"q": p, "a": [a], "messages": [*p, b]}, False),
    "KTO": (lambda p, a, b: {"prompt": p, "completion": [a], "label": True}, False),
}  # fmt: skip


def without_weights(messages):
    return [{name: value for name, value in m.items() if name != "weight"} for m in messages]


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=25, deadline=None)
@given(drawn=conversations())
def test_a_conversation_comes_back_from_every_convention(name, drawn):
    prompt, answer, other = drawn
    make, has_rejected = WHOLE[name]
    columns = {"prompt": "q", "answer": "a"} if "key columns" in name else None
    parsed = to_demonstration(make(prompt, answer, other), "here", "last", columns).demonstration
    assert without_weights(parsed.prompt) == prompt
    assert without_weights([parsed.answer]) == [answer]
    if has_rejected and other != answer:
        assert parsed.rejected == other
    else:
        assert parsed.rejected is None


ONE_TURN = {
    "prompt and completion": lambda q, a: {"prompt": q, "completion": a},
    "prompt and messages": lambda q, a: {"prompt": q, "completion": [said("assistant", a)]},
    "prompt and response": lambda q, a: {"prompt": q, "response": a},
    "question and answer": lambda q, a: {"question": q, "answer": a, "id": 3},
    "query and response": lambda q, a: {"query": q, "response": a},
    "OpenOrca": lambda q, a: {"system_prompt": "", "question": q, "response": a},
    "Dolly": lambda q, a: {"instruction": q, "context": "", "response": a, "category": "x"},
    "Alpaca": lambda q, a: {"instruction": q, "input": "", "output": a, "text": "below is"},
    "chosen beside a prompt": lambda q, a: {"prompt": q, "chosen": a, "rejected": None},
    "completion beside chosen": lambda q, a: {"prompt": q, "completion": a, "chosen": None, "rejected": "no"},
    "empty cells of a CSV file": lambda q, a: {"prompt": q, "completion": a, "chosen": "", "messages": ""},
    "instruction beside a pair": lambda q, a: {"system": "", "input": q, "chosen": a, "rejected": "no"},
    "completion beside a pair": lambda q, a: {"prompt": q, "completion": "no", "chosen": a, "rejected": "no"},
    "real beside a pair": lambda q, a: {"prompt": q, "real": "no", "chosen": a, "rejected": "no"},
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_TURN)
@settings(max_examples=25, deadline=None)
@given(question=texts, answer=texts)
def test_a_question_and_an_answer_come_back_from_every_convention(name, question, answer):
    parsed = to_demonstration(ONE_TURN[name](question, answer), "here").demonstration
    assert parsed.prompt == [said("user", question)]
    assert parsed.answer == said("assistant", answer)


@settings(max_examples=100, deadline=None)
@given(drawn=conversations().filter(lambda drawn: drawn[0][0]["role"] != "system"), prompt_beside=st.booleans())
def test_dialogues_of_hh_come_back_with_and_without_a_prompt(drawn, prompt_beside):
    prompt, answer, other = drawn
    if prompt_beside:
        before = dialogue(prompt) + "\n\nAssistant:"
        row = {"prompt": before, "chosen": " " + answer["content"], "rejected": " " + other["content"]}
    else:
        row = {"chosen": dialogue([*prompt, answer]), "rejected": dialogue([*prompt, other])}
    parsed = to_demonstration(row, "here").demonstration
    assert without_weights(parsed.prompt) == prompt
    assert without_weights([parsed.answer]) == [answer]
    assert parsed.rejected == (None if other == answer else other)


def test_the_answer_is_the_first_or_the_last_assistant_turn_whose_weight_is_not_0():
    turns = [said("system", "s"), said("assistant", "welcome"), said("user", "q"), said("assistant", "a")]
    turns += [said("user", "r"), said("assistant", "b"), said("assistant", "c") | {"weight": 0}, said("user", "thanks")]
    last = to_demonstration({"messages": turns}, "here", "last")
    assert last.demonstration.answer == said("assistant", "b")
    assert last.demonstration.prompt == turns[:5]
    assert last.notes == [CUT]
    assert to_demonstration({"messages": turns}, "here", "all").demonstration == last.demonstration
    first = to_demonstration({"messages": turns}, "here", "first").demonstration
    assert (first.prompt, first.answer) == (turns[:3], said("assistant", "a"))
    with pytest.raises(LeftOut, match="weight 0"):
        to_demonstration({"messages": [turns[2], turns[3] | {"weight": 0}]}, "here")


def test_assistant_turns_in_prompt_get_weight_0_and_assistant_turns_in_completion_are_learned():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    prompt = [said("user", "q"), said("assistant", "a"), said("user", "r")]
    completion = [{"role": "assistant", "tool_calls": [call]}, said("tool", "3"), said("assistant", "it is 3")]
    parsed = to_demonstration({"prompt": prompt, "completion": completion, "tools": "[]"}, "here", "all").demonstration
    assert [m.get("weight") for m in parsed.prompt] == [None, 0, None, None, None]
    assert parsed.prompt[3] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert parsed.answer == said("assistant", "it is 3")
    assert parsed.tools is None


def test_pairs_are_compared_at_the_first_turn_that_differs_and_equal_answers_are_no_pair():
    q, r, end = said("user", "q"), said("user", "r"), said("assistant", "end")
    one, other = said("assistant", "one"), said("assistant", "other")
    parsed = to_demonstration({"chosen": [q, one, r, end], "rejected": [q, other, r, end]}, "here", "last")
    assert parsed.demonstration[:3] == ([q], one, other)
    assert parsed.notes == [CUT]
    for learn in ("all", "last"):
        same = to_demonstration({"chosen": [q, one], "rejected": [q, one]}, "here", learn)
        assert (same.demonstration.rejected, same.notes) == (None, [EQUAL])
    longer = [q, one, r, end]
    for learn in ("first", "last", "all"):
        for pair in ((longer, [q, one]), ([q, one], longer)):
            parsed = to_demonstration({"chosen": pair[0], "rejected": pair[1]}, "here", learn)
            assert parsed.demonstration.answer == (one if learn == "first" else pair[0][-1])
            assert parsed.demonstration.rejected is None
            assert {EQUAL if learn == "first" else ELSEWHERE} == {*parsed.notes} - {CUT}
    elsewhere = to_demonstration({"chosen": [q, one], "rejected": [r, other]}, "here")
    assert (elsewhere.demonstration.answer, elsewhere.demonstration.rejected) == (one, None)
    assert elsewhere.notes == [ELSEWHERE]


@pytest.mark.parametrize("label", [False, 0, 0.0, "false", "False", "0", " FALSE "])
@pytest.mark.parametrize("make", [*ONE_TURN.values()][:8])
def test_a_row_with_a_false_label_is_never_an_expert_answer(make, label):
    with pytest.raises(LeftOut, match="with label false"):
        to_demonstration(make("q", "a") | {"label": label}, "here")
    assert to_demonstration(make("q", "a") | {"label": label}, "here", prompts_only=True).demonstration.answer is None
    for true in (True, 1, "True", "1", None):
        assert to_demonstration(make("q", "a") | {"label": true}, "here").demonstration.answer == said("assistant", "a")


def test_every_key_of_a_message_is_kept_unless_it_is_null():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "be good", "name": "boss", "audio": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": 4, "tool_call_id": "1", "tool_calls": None},
        {"role": "assistant", "content": "4", "reasoning_content": "hm", "thinking": None},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given_tools in (tools, json.dumps(tools), [json.dumps(tools[0])]):
        parsed = to_demonstration({"messages": messages, "tools": given_tools}, "here")
        assert parsed.demonstration.tools == tools
        assert parsed.columns == {"messages", "tools"}
    developer, user, called, tool = parsed.demonstration.prompt
    assert developer == {"role": "developer", "content": "be good", "name": "boss"}
    assert user == said("user", "ab")
    assert called["content"] == ""
    assert called["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert tool == {"role": "tool", "content": "4", "tool_call_id": "1"}
    assert parsed.demonstration.answer == {"role": "assistant", "content": "4", "reasoning_content": "hm"}


def test_the_roles_of_sharegpt_become_user_assistant_system_and_tool():
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    turns = [
        ("human", "q"),
        ("function_call", call),
        ("observation", "3"),
        ("chatgpt", "it is 3"),
        ("user", "?"),
        ("bing", "b"),
    ]
    parsed = to_demonstration({"conversations": [{"from": a, "value": b} for a, b in turns], "system": "s"}, "here")
    prompt = parsed.demonstration.prompt
    assert [m["role"] for m in prompt] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert prompt[2]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert parsed.demonstration.answer == said("assistant", "b")
    assert parsed.columns == {"conversations", "system"}


def test_a_prompt_without_an_answer_is_refused_unless_only_prompts_are_wanted():
    talk = [said("user", "q"), said("assistant", "a"), said("user", "r")]
    rows = [
        {"prompt": "q"},
        {"prompt": talk},
        {"question": "q", "id": 1},
        {"instruction": "q", "input": "", "output": None},
    ]
    for row in rows:
        with pytest.raises(BadRow, match="without an answer"):
            to_demonstration(row, "here")
        assert to_demonstration(row, "here", prompts_only=True).demonstration.answer is None
    parsed = to_demonstration({"messages": talk}, "here", prompts_only=True).demonstration
    assert (parsed.prompt, parsed.answer) == (talk, None)
    assert to_demonstration({"prompt": "q", "completion": "a"}, "here", prompts_only=True).demonstration.answer
    assert to_demonstration({"prompt": "q", "completion": ""}, "here", prompts_only=True).demonstration.answer is None


BAD = {
    "found columns a, b; expected prompt and completion": {"a": 1, "b": 2, "c": None},
    "found no column with a value": {"prompt": None},
    "column messages, message 2: found a number as role": {"messages": [said("user", "q"), {"role": 3}]},
    "column messages, message 2: found a text": {"messages": [said("user", "q"), "a"]},
    "found no content in the assistant's turn": {"messages": [said("user", "q"), said("assistant", None)]},
    "a part of type 'image_url', expected texts; images": {"prompt": [said("user", [{"type": "image_url"}])]},
    "column completion: found an object": {"prompt": "q", "completion": {"a": 1}},
    "column prompt: found a list of texts": {"prompt": ["q", "r"], "completion": "a"},
    "column messages: found a text that is not JSON": {"messages": "q"},
    "column messages: found an object whose lists differ": {"messages": {"role": ["user"], "content": []}},
    "column chosen: found an answer without a prompt": {"chosen": "a", "rejected": "b"},
    "found no turn of the assistant": {"messages": [said("user", "q")]},
    "found nothing before the assistant's turn": {"messages": [said("assistant", "q")]},
    "column history: expected a list of pairs": {"instruction": "q", "output": "a", "history": ["x"]},
    "column tools: found a list": {"messages": [said("user", "q"), said("assistant", "a")], "tools": [3]},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_messages_for_bad_rows_name_what_was_found(message):
    with pytest.raises(BadRow, match=message):
        to_demonstration(BAD[message], "here")


KEYS = "role content from value tool_calls type text function arguments weight".split()
TELLING = ["user", "gpt", "[]", '["\\ud83d"]', '{"name": "f\\ud83d"}', "\n\nHuman: q\n\nAssistant: a", "text"]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(TELLING)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
rest = dict.fromkeys(KEYS[1:], anything)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "gpt", "tool"])}, optional=rest),
    max_size=3,
)
COLUMNS = (
    "prompt completion messages conversations chosen rejected real instruction input output history question answer "
    "query response text label system tools generated"
).split()
QUESTIONS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("completion", "response", "output", "answer")


@settings(max_examples=200, deadline=None)
@given(
    row=st.dictionaries(st.sampled_from(COLUMNS), anything | messages, max_size=5),
    learn=st.sampled_from(["first", "last", "all"]),
    prompts_only=st.booleans(),
)
def test_any_row_becomes_a_demonstration_or_an_error_of_one_sentence(row, learn, prompts_only):
    try:
        parsed = to_demonstration(replace_surrogates(row)[0], "here", learn, None, prompts_only).demonstration
    except (BadRow, LeftOut) as error:
        assert str(error)
        assert "\n" not in str(error)
        return
    for message in [*parsed.prompt, parsed.answer, parsed.rejected]:
        assert message is None or (isinstance(message["content"], str) and isinstance(message["role"], str))
    assert replace_surrogates([parsed.prompt, parsed.answer, parsed.rejected, parsed.tools])[1] == 0
    assert prompts_only or parsed.answer["role"] == "assistant"


@settings(max_examples=200, deadline=None)
@given(
    pair=st.sampled_from([*((one, other) for one in QUESTIONS for other in ANSWERS)]),
    texts=st.tuples(texts | st.sampled_from(TELLING), texts | st.sampled_from(["", " ", *TELLING])),
    more=st.dictionaries(st.sampled_from([*COLUMNS, "id"]), scalars, max_size=1),
)
def test_a_question_and_its_answer_are_read_in_the_short_way_as_in_the_long_one(pair, texts, more):
    row = {**more, **dict(zip(pair, texts, strict=True))}
    with mock.patch.object(demonstrations, "read_question_and_answer", return_value=None):
        long = parsed_or_refused(row)
    assert parsed_or_refused(row) == long
    plain = read_question_and_answer(row, "here")
    assert plain is None or plain == long


def parsed_or_refused(row):
    try:
        return to_demonstration(row, "here")
    except (BadRow, LeftOut) as error:
        return type(error), str(error)


def test_half_an_emoji_is_replaced_and_counted():
    row, count = replace_surrogates({"prompt": "fine \ud83d", "k\udc00": [{"a": "\ud83d\udc00"}, 3]})
    assert row == {"prompt": "fine \ufffd", "k\ufffd": [{"a": "\ufffd\ufffd"}, 3]}
    assert count == 4
