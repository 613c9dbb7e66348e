r"""The data formats: ``CONVENTIONS`` is the one table of the columns that rows may have, with a function to read each.

Add a data format here: one function and one entry (docs/extending/data-format.md). The first convention whose columns
all have a value reads the row. ``chosen`` and ``rejected`` come first, so that a rejected answer is never learned as an
expert's. A null column counts as absent.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from irlfast.data.messages import is_conversation, to_messages, to_text
from irlfast.data.rows import BadRow, Message

Row = Mapping[str, Any]
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")  # columns of whole conversations
QUESTION_COLUMNS = ("question", "query", "input")
EXPECTED = "prompt and completion, messages, conversations, instruction and output, or chosen (and rejected)"


class Conversation(NamedTuple):
    """The conversation that a convention reads from a row, with its answer."""

    messages: list[Message]
    columns: tuple[str, ...]  # the columns that were used
    # The conversation with the rejected answer: None without such a column, empty if the column cannot be read.
    rejected: list[Message] | None = None


class Convention(NamedTuple):
    name: str
    columns: tuple[str, ...]  # the columns that the convention needs
    read: Callable[[Row, str], Conversation]  # takes the row and the last of ``columns``
    has: Literal["both", "prompt", "answer"] = "both"


# ---------------------------------------------------------------- one function per convention


def read_pair(row: Row, column: str) -> Conversation:
    """Read ``chosen`` and ``rejected``: dialogues, messages, or texts beside a prompt."""
    chosen = read_dialogue(row, "chosen")
    try:
        rejected = read_dialogue(row, column).messages
    except BadRow:  # most methods learn without it; ``choose_answer`` counts it as no reply to the same prompt
        rejected = []
    return Conversation(chosen.messages, (*chosen.columns, column), rejected)


def read_dialogue(row: Row, column: str) -> Conversation:
    r"""Read a prompt and an answer, whose texts may be Anthropic-HH's ``\n\nHuman: …\n\nAssistant: …``."""
    if is_dialogue(row[column]):
        return Conversation(split_dialogue(row[column]), (column,))
    if not is_dialogue(row.get("prompt")):
        return read_prompt_and_answer(row, column)
    prompt = split_dialogue(row["prompt"])
    if prompt[-1] == {"role": "assistant", "content": ""}:
        prompt.pop()
    answer = answer_messages(row[column], column)
    if isinstance(row[column], str):
        answer = [{"role": "assistant", "content": row[column].strip()}]
    return join_prompt_and_answer(prompt, ("prompt",), answer, column)


def read_prompt_and_answer(row: Row, column: str) -> Conversation:
    """Read a prompt, and the answer in ``column``: texts or messages."""
    return join_prompt_and_answer(*find_prompt(row), answer_messages(row[column], column), column)


def read_conversation(row: Row, column: str) -> Conversation:
    """Read a whole conversation from one column."""
    return Conversation(to_messages(row[column], column), (column,))


def read_prompt(row: Row, column: str) -> Conversation:
    """Read a prompt without an answer."""
    return Conversation(*find_prompt(row))


def read_text(row: Row, column: str) -> Conversation:
    """Read a text without a prompt: the model learns all of it."""
    return Conversation([{"role": "assistant", "content": to_text(row[column], f"column {column}")}], (column,))


CONVENTIONS = (
    Convention("chosen and rejected", ("chosen", "rejected"), read_pair),
    Convention("real", ("real",), read_dialogue),  # SPIN; ``generated`` is ignored, as an older policy sampled it
    Convention("messages", ("messages",), read_conversation),  # OpenAI, TRL
    Convention("conversations", ("conversations",), read_conversation),  # ShareGPT
    Convention("conversation", ("conversation",), read_conversation),
    Convention("prompt and completion", ("completion",), read_prompt_and_answer),  # TRL: texts or messages
    Convention("prompt and response", ("prompt", "response"), read_prompt_and_answer),
    Convention("chosen", ("chosen",), read_dialogue),
    Convention("instruction and output", ("instruction", "output"), read_prompt_and_answer),  # Alpaca
    Convention("instruction and response", ("instruction", "response"), read_prompt_and_answer),  # Dolly
    Convention("question and answer", ("question", "answer"), read_prompt_and_answer),
    Convention("question and response", ("question", "response"), read_prompt_and_answer),  # OpenOrca
    Convention("query and response", ("query", "response"), read_prompt_and_answer),
    Convention("prompt", ("prompt",), read_prompt, "prompt"),
    Convention("instruction", ("instruction",), read_prompt, "prompt"),
    Convention("question", ("question",), read_prompt, "prompt"),
    Convention("query", ("query",), read_prompt, "prompt"),
    Convention("text", ("text",), read_text, "answer"),
)


COLUMNS = {column for convention in CONVENTIONS for column in convention.columns}


def find_convention(row: Row) -> Convention:
    """Return the first convention whose columns are all filled, else the first whose columns all have a value.

    Raises:
        BadRow: there is none.
    """
    present = frozenset(column for column in row.keys() & COLUMNS if has_value(row, column))
    filled = frozenset(column for column in present if is_filled(row, column))
    convention = convention_of(filled, present)
    if convention is None:
        raise BadRow(f"found {describe_columns(row)}; expected {EXPECTED}, or the key columns to name them")
    return convention


@functools.cache
def convention_of(filled: frozenset[str], present: frozenset[str]) -> Convention | None:
    """Return the convention of a row with these columns.

    Conventions of a prompt alone or a text alone come last: a prompt beside an empty answer is not a prompt alone.
    """
    with_answer = [convention for convention in CONVENTIONS if convention.has == "both"]
    for columns, conventions in ((filled, with_answer), (present, with_answer), (present, CONVENTIONS)):
        for convention in conventions:
            if columns.issuperset(convention.columns):
                return convention
    return None


def has_value(row: Row, column: str) -> bool:
    """Return whether the column is there and not null."""
    return row.get(column) is not None


def is_filled(row: Row, column: str) -> bool:
    """Return whether the column is there, not null, and neither an empty text nor an empty list."""
    return has_value(row, column) and row[column] not in ("", [])


def describe_columns(row: Row) -> str:
    columns = [column for column in row if has_value(row, column)]
    return f"columns {', '.join(columns)}"[:200] if columns else "no column with a value"


# ---------------------------------------------------------------- parts of a row


def find_prompt(row: Row) -> tuple[list[Message], tuple[str, ...]]:
    """Return the prompt and its columns: the first of ``prompt``, a conversation, an instruction or a question."""
    if is_filled(row, "prompt"):
        return prompt_messages(row["prompt"], "prompt"), ("prompt",)
    for column in CONVERSATION_COLUMNS:
        if is_filled(row, column):
            messages = to_messages(row[column], column)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            return messages, (column,)
    if is_filled(row, "instruction"):
        return instruction_messages(row)
    for column in QUESTION_COLUMNS:
        if is_filled(row, column):
            return prompt_messages(row[column], column), (column,)
    return ([{"role": "user", "content": ""}], ("prompt",)) if has_value(row, "prompt") else ([], ())


def prompt_messages(value: Any, column: str) -> list[Message]:
    """Return a prompt as messages; a text becomes a turn of the user."""
    return to_messages(value, column) if is_conversation(value) else [single_message("user", value, column)]


def answer_messages(value: Any, column: str) -> list[Message]:
    """Return an answer as messages; a text becomes a turn of the assistant."""
    return to_messages(value, column) if is_conversation(value) else [single_message("assistant", value, column)]


def single_message(role: str, value: Any, column: str) -> Message:
    if isinstance(value, list) and any(isinstance(part, str) for part in value):
        raise BadRow(f"column {column}: found a list of texts, expected one text or messages")
    return {"role": role, "content": to_text(value, f"column {column}")}


def instruction_messages(row: Row) -> tuple[list[Message], tuple[str, ...]]:
    """Return the turns of ``history``, then ``instruction`` with ``input`` (Alpaca) or ``context`` (Dolly) below it."""
    columns = [column for column in ("instruction", "input", "context") if has_value(row, column)]
    texts = [to_text(row[column], f"column {column}") for column in columns]
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRow("column history: expected a list of pairs, a question and its answer")
    earlier = []
    for user, assistant in history:
        earlier += [single_message("user", user, "history"), single_message("assistant", assistant, "history")]
    question = {"role": "user", "content": "\n\n".join(text for text in texts if text)}
    return [*earlier, question], (*columns, *(["history"] if history else []))


def join_prompt_and_answer(
    prompt: list[Message], columns: tuple[str, ...], answer: list[Message], column: str
) -> Conversation:
    """Join a prompt and the messages of ``column``, which may repeat the end of the prompt or be a whole conversation.

    TRL does not train on the column ``prompt``, so the assistant turns there get ``weight`` 0.
    """
    first_role = answer[0]["role"] if answer else "assistant"
    if not prompt and first_role == "assistant":
        raise BadRow(f"column {column}: found an answer without a prompt; expected a column prompt beside it")
    repeated = 0 if first_role in ("assistant", "tool") else count_repeated(prompt, answer)
    is_whole = first_role == "system" or (first_role == "user" and prompt[-1:] and prompt[-1]["role"] == "user")
    if is_whole and not repeated:
        return Conversation(answer, (column,))
    earlier = without_learning(prompt) if "prompt" in columns else prompt
    return Conversation(earlier + answer[repeated:], (*columns, column))


def count_repeated(before: list[Message], after: list[Message]) -> int:
    """Return how many messages at the start of ``after`` are the last messages of ``before``."""
    for count in range(len(before), 0, -1):
        if after[:count] == before[-count:]:
            return count
    return 0


def without_learning(messages: list[Message]) -> list[Message]:
    """Give every assistant turn ``weight`` 0, so that it is context and never learned."""
    return [message | {"weight": 0} if message["role"] == "assistant" else message for message in messages]


def is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and bool(re.match(r"\s*Human:", value)) and "\n\nAssistant:" in value


def split_dialogue(text: str) -> list[Message]:
    r"""Split ``\n\nHuman: …\n\nAssistant: …`` into messages."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[name], "content": content.strip()} for name, content in turns]
