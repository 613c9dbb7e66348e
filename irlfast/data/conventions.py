r"""How people write demonstrations in rows: one small function a convention, in the table ``CONVENTIONS``.

The first convention whose columns all have a value reads the row. A pair of ``chosen`` and ``rejected`` comes first, so
that a rejected answer is never learned as an expert's. A null column is absent.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from irlfast.data.messages import is_conversation, messages_of, text_of
from irlfast.data.rows import BadRow, Message

Row = Mapping[str, Any]
TALKS = ("messages", "conversations", "conversation")  # columns of whole conversations
QUESTIONS = ("question", "query", "input")
EXPECTED = "prompt and completion, messages, conversations, instruction and output, or chosen (and rejected)"


class Turns(NamedTuple):
    """The whole conversations that a convention finds in a row, with their answers."""

    messages: list[Message]
    columns: tuple[str, ...]  # that it used
    rejected: list[Message] | None = None  # None where there is no such column; empty where that cannot be read


class Convention(NamedTuple):
    name: str
    columns: tuple[str, ...]  # that it needs
    read: Callable[[Row, str], Turns]  # of a row and the last of the columns
    has: Literal["both", "prompt", "answer"] = "both"


# ---------------------------------------------------------------- one function a convention


def pair(row: Row, column: str) -> Turns:
    """``chosen`` and ``rejected``: dialogues, messages, or texts beside a prompt."""
    chosen = dialogue(row, "chosen")
    try:
        rejected = dialogue(row, column).messages
    except BadRow:  # only methods that need it mind; it is counted as no reply to the same prompt
        rejected = []
    return Turns(chosen.messages, (*chosen.columns, column), rejected)


def dialogue(row: Row, column: str) -> Turns:
    r"""A prompt and an answer, where texts may be Anthropic-HH's ``\n\nHuman: …\n\nAssistant: …``."""
    if is_dialogue(row[column]):
        return Turns(split_dialogue(row[column]), (column,))
    if not is_dialogue(row.get("prompt")):
        return reply(row, column)
    before = split_dialogue(row["prompt"])
    if before[-1] == {"role": "assistant", "content": ""}:
        before.pop()
    answer = answer_of(row[column], column)
    if isinstance(row[column], str):
        answer = [{"role": "assistant", "content": row[column].strip()}]
    return joined(before, ("prompt",), answer, column)


def reply(row: Row, column: str) -> Turns:
    """A prompt, and the answer in ``column``: texts or messages."""
    return joined(*before_answer(row), answer_of(row[column], column), column)


def talk(row: Row, column: str) -> Turns:
    """The whole conversation in one column."""
    return Turns(messages_of(row[column], column), (column,))


def prompt_alone(row: Row, column: str) -> Turns:
    """A prompt without an answer."""
    return Turns(*before_answer(row))


def whole_text(row: Row, column: str) -> Turns:
    """A text of which all is learned, after nothing."""
    return Turns([{"role": "assistant", "content": text_of(row[column], f"column {column}")}], (column,))


CONVENTIONS = (
    Convention("chosen and rejected", ("chosen", "rejected"), pair),
    Convention("real", ("real",), dialogue),  # SPIN's; its generated answers are an older policy's, and not used
    Convention("messages", ("messages",), talk),  # OpenAI's, TRL's
    Convention("conversations", ("conversations",), talk),  # ShareGPT's
    Convention("conversation", ("conversation",), talk),
    Convention("prompt and completion", ("completion",), reply),  # TRL's, of texts or messages
    Convention("prompt and response", ("prompt", "response"), reply),
    Convention("chosen", ("chosen",), dialogue),
    Convention("instruction and output", ("instruction", "output"), reply),  # Alpaca's
    Convention("instruction and response", ("instruction", "response"), reply),  # Dolly's
    Convention("question and answer", ("question", "answer"), reply),
    Convention("question and response", ("question", "response"), reply),  # OpenOrca's
    Convention("query and response", ("query", "response"), reply),
    Convention("prompt", ("prompt",), prompt_alone, "prompt"),
    Convention("instruction", ("instruction",), prompt_alone, "prompt"),
    Convention("question", ("question",), prompt_alone, "prompt"),
    Convention("query", ("query",), prompt_alone, "prompt"),
    Convention("text", ("text",), whole_text, "answer"),
)


def convention_of(row: Row) -> Convention:
    """The first convention whose columns all have a value that is not empty, else one whose columns are not null.

    A prompt or a text alone comes last: a prompt beside an empty answer is not a prompt alone.
    """
    whole = [convention for convention in CONVENTIONS if convention.has == "both"]
    for there, conventions in ((filled, whole), (given, whole), (given, CONVENTIONS)):
        for convention in conventions:
            if all(there(row, column) for column in convention.columns):
                return convention
    raise BadRow(f"found {columns_of(row)}; expected {EXPECTED}, or the key columns to name them")


def given(row: Row, column: str) -> bool:
    return row.get(column) is not None


def filled(row: Row, column: str) -> bool:
    return given(row, column) and row[column] not in ("", [])


def columns_of(row: Row) -> str:
    found = [column for column in row if given(row, column)]
    return f"columns {', '.join(found)}"[:200] if found else "no column with a value"


# ---------------------------------------------------------------- parts of a row


def before_answer(row: Row) -> tuple[list[Message], tuple[str, ...]]:
    """The prompt of a row and its columns: the first of ``prompt``, a conversation, an instruction or a question."""
    if filled(row, "prompt"):
        return prompt_of(row["prompt"], "prompt"), ("prompt",)
    for column in TALKS:
        if filled(row, column):
            messages = messages_of(row[column], column)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            return messages, (column,)
    if filled(row, "instruction"):
        return instruction_of(row)
    for column in QUESTIONS:
        if filled(row, column):
            return prompt_of(row[column], column), (column,)
    return ([{"role": "user", "content": ""}], ("prompt",)) if given(row, "prompt") else ([], ())


def prompt_of(value: Any, column: str) -> list[Message]:
    """A prompt's messages; a text is the user's."""
    return messages_of(value, column) if is_conversation(value) else [alone("user", value, column)]


def answer_of(value: Any, column: str) -> list[Message]:
    """An answer's messages; a text is the assistant's."""
    return messages_of(value, column) if is_conversation(value) else [alone("assistant", value, column)]


def alone(role: str, value: Any, column: str) -> Message:
    if isinstance(value, list) and any(isinstance(part, str) for part in value):
        raise BadRow(f"column {column}: found a list of texts, expected one text or messages")
    return {"role": role, "content": text_of(value, f"column {column}")}


def instruction_of(row: Row) -> tuple[list[Message], tuple[str, ...]]:
    """Alpaca's ``instruction``, with ``input`` (Dolly's ``context``) below; ``history`` has the earlier turns."""
    columns = [column for column in ("instruction", "input", "context") if given(row, column)]
    texts = [text_of(row[column], f"column {column}") for column in columns]
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRow("column history: expected a list of pairs, a question and its answer")
    earlier = [
        alone(role, text, "history") for turn in history for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    question = {"role": "user", "content": "\n\n".join(text for text in texts if text)}
    return [*earlier, question], (*columns, *(["history"] if history else []))


def joined(before: list[Message], columns: tuple[str, ...], answer: list[Message], column: str) -> Turns:
    """A prompt and an answer's messages, which may repeat the end of the prompt, or be a whole conversation.

    TRL trains nothing of the column ``prompt``, so that its assistant turns get ``weight`` 0.
    """
    starts = answer[0]["role"] if answer else "assistant"
    if not before and starts == "assistant":
        raise BadRow(f"column {column}: found an answer without a prompt; expected a column prompt beside it")
    repeated = 0 if starts in ("assistant", "tool") else overlap(before, answer)
    whole = starts == "system" or (starts == "user" and before[-1:] and before[-1]["role"] == "user")
    if whole and not repeated:
        return Turns(answer, (column,))
    earlier = context(before) if "prompt" in columns else before
    return Turns(earlier + answer[repeated:], (*columns, column))


def overlap(before: list[Message], after: list[Message]) -> int:
    """How many messages at the start of ``after`` are the last ones before."""
    return next((count for count in range(len(before), 0, -1) if after[:count] == before[-count:]), 0)


def context(messages: list[Message]) -> list[Message]:
    """Messages of which nothing is learned."""
    return [message | {"weight": 0} if message["role"] == "assistant" else message for message in messages]


def is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and bool(re.match(r"\s*Human:", value)) and "\n\nAssistant:" in value


def split_dialogue(text: str) -> list[Message]:
    """The messages of a dialogue in a text."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[name], "content": content.strip()} for name, content in turns]
