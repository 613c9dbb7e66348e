"""Turn a row of any convention into a demonstration: choose the turn to learn, and note what is left out."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from irlfast.data.conventions import (
    COLUMNS,
    CONVERSATION_COLUMNS,
    EXPECTED,
    QUESTION_COLUMNS,
    Convention,
    Conversation,
    Row,
    convention_of,
    describe_columns,
    find_convention,
    is_filled,
    read_prompt_and_answer,
    without_learning,
)
from irlfast.data.messages import OTHER_CONTENT_KEYS, fill_content, to_text, to_tools
from irlfast.data.rows import BadRow, Demonstration, LeftOut, Message

SYSTEM_COLUMNS = ("system", "system_prompt")
OPTIONAL_COLUMNS = (*SYSTEM_COLUMNS, "rejected", "tools", "label")  # columns that a row may lack
TEXT_COLUMNS = {"prompt", "instruction", *QUESTION_COLUMNS}  # which are read alike where they hold a text
PROMPT_COLUMNS = {"prompt", "instruction", "input", "context", "history", "question", "query"}
BESIDE_ANSWER = {*PROMPT_COLUMNS, *SYSTEM_COLUMNS, "tools", "label"}  # columns that never hold an answer
KNOWN_COLUMNS = frozenset({*COLUMNS, *CONVERSATION_COLUMNS, *BESIDE_ANSWER})  # all that reading looks at
CUT = "conversations cut after the turn that is learned"
EQUAL = "rejected answers left out, equal to the chosen one"
ELSEWHERE = "rejected answers left out, not in reply to the same prompt"


class ParsedRow(NamedTuple):
    """A demonstration and how it was read."""

    demonstration: Demonstration
    convention: str
    columns: set[str]  # the columns that were used, by their names in the file
    notes: list[str]  # the parts of the row that are not used


class LearnedTurn(NamedTuple):
    """The turn to learn, the messages before it, and the rejected turn in its place."""

    prompt: list[Message]
    answer: Message | None
    rejected: Message | None
    notes: list[str]


def to_demonstration(
    row: dict[str, Any],
    where: str,
    learn: str = "last",
    columns: Mapping[Any, str] | None = None,
    prompts_only: bool = False,
) -> ParsedRow:
    """Read a row of any convention.

    Args:
        learn: the assistant turn that is the answer: ``first`` or ``last``. ``all`` has the last turn as the answer,
            too; SFT then also learns the earlier turns.
        columns: the names in the file of ``prompt``, ``answer``, ``rejected``, ``messages``, ``system``, ….
        prompts_only: rows need no answer; without one, their ``answer`` is None.

    Raises:
        BadRow: the row cannot be read.
        LeftOut: the row has nothing to learn.
    """
    plain = None if columns or prompts_only else read_question_and_answer(row, where)
    if plain:
        return plain
    names = convention_columns(columns or {})
    inner = rename_columns(row, names) if names else row
    convention = find_convention(inner)
    conversation = add_system_column(inner, convention.read(inner, convention.columns[-1]))
    prompt, answer, rejected, notes = choose_answer(conversation, convention, learn, prompts_only)
    reason = None if answer is None else reason_to_leave_out(answer, inner, conversation, convention)
    if reason and not prompts_only:
        raise LeftOut(reason)
    tools = to_tools(inner.get("tools"))
    used = [*conversation.columns, *["tools"] * bool(tools), *["label"] * has_label(inner, conversation, convention)]
    demonstration = Demonstration(
        [*map(fill_content, prompt)],
        None if answer is None or reason else fill_content(answer),
        rejected and fill_content(rejected),
        tools,
        where,
        row,
    )
    return ParsedRow(demonstration, convention.name, {names.get(name, name) for name in used}, notes)


def read_question_and_answer(row: dict[str, Any], where: str) -> ParsedRow | None:
    """Read a row of one question and its answer, both texts, in a fifth of the time; return None for any other row."""
    pair = question_and_answer(frozenset(KNOWN_COLUMNS.intersection(row)))
    if pair is None:
        return None
    name, question, answer = pair
    prompt, completion = row[question], row[answer]
    if type(prompt) is not str or type(completion) is not str or not prompt or not completion.strip():
        return None
    messages = [{"role": "user", "content": prompt}]
    demonstration = Demonstration(messages, {"role": "assistant", "content": completion}, None, None, where, row)
    return ParsedRow(demonstration, name, {question, answer}, [])


@functools.cache
def question_and_answer(columns: frozenset[str]) -> tuple[str, str, str] | None:
    """Return a convention, its question's column and its answer's, if rows with these columns have nothing more."""
    convention = convention_of(columns, columns)
    if convention is None or convention.read is not read_prompt_and_answer or len(columns) != 2:
        return None
    answer = convention.columns[-1]
    (question,) = columns - {answer}
    return (convention.name, question, answer) if question in TEXT_COLUMNS else None


# ---------------------------------------------------------------- the columns of a row


def convention_columns(columns: Mapping[Any, str]) -> dict[str, str]:
    """Return the key ``columns`` with ``answer`` replaced by the conventions' name for it."""
    answer = "chosen" if "rejected" in columns else "completion"
    return {answer if name == "answer" else name: column for name, column in columns.items()}


def rename_columns(row: Row, names: Mapping[str, str]) -> dict[str, Any]:
    """Rename a row's columns to the conventions' names, and drop columns that compete with the named answer."""
    missing = [column for name, column in names.items() if column not in row and name not in OPTIONAL_COLUMNS]
    if missing:
        raise BadRow(f"found {describe_columns(row)}, and not {missing[0]!r}, which the key columns names")
    names_answer = bool({"completion", "chosen", "messages", "text"} & {*names})
    renamed = {}
    for column, value in row.items():
        if column not in names.values() and (column in BESIDE_ANSWER or not names_answer):
            renamed[column] = value
    return renamed | {name: row.get(column) for name, column in names.items()}


def add_system_column(row: Row, conversation: Conversation) -> Conversation:
    """Put a column ``system`` or ``system_prompt`` first, where the conversation has no system message yet."""
    column = next((name for name in SYSTEM_COLUMNS if is_filled(row, name)), None)
    messages, rejected = conversation.messages, conversation.rejected
    if column is None or (messages and messages[0]["role"] == "system"):
        return conversation
    system = [{"role": "system", "content": to_text(row[column], f"column {column}")}]
    return Conversation(system + messages, (*conversation.columns, column), system + rejected if rejected else rejected)


def reason_to_leave_out(answer: Message, row: Row, conversation: Conversation, convention: Convention) -> str | None:
    """Return why an answer is not learned, or None."""
    if has_label(row, conversation, convention) and parse_label(row["label"]) is False:
        return "with label false"
    has_content = answer.get("content", "").strip() or any(answer.get(name) for name in OTHER_CONTENT_KEYS)
    return None if has_content else "without an answer"


def has_label(row: Row, conversation: Conversation, convention: Convention) -> bool:
    """Return whether the row has KTO's label, true or false, for its answer."""
    if "label" not in row or convention.has != "both" or conversation.rejected is not None:
        return False
    return parse_label(row["label"]) is not None


def parse_label(label: Any) -> bool | None:
    """Read a label as JSON, Arrow or CSV write it; None for a label of another kind."""
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    return words.get(str(label).strip().lower())


# ---------------------------------------------------------------- the turn to learn


def choose_answer(conversation: Conversation, convention: Convention, learn: str, prompts_only: bool) -> LearnedTurn:
    """Choose the turn to learn in a row's conversation, and the rejected turn in its place.

    Raises:
        BadRow: the row has no prompt or no answer, though one is needed.
    """
    messages = conversation.messages
    if prompts_only:
        if convention.has == "answer":
            raise BadRow(f"found {convention.name} alone; expected a prompt")
        if convention.has == "prompt" or (messages and messages[-1]["role"] != "assistant"):
            return LearnedTurn(messages, None, None, [])
    elif convention.has == "prompt":
        raise BadRow(f"found a {convention.name} without an answer; expected {EXPECTED}")
    rejected = conversation.rejected
    notes: list[str] = []
    if rejected is not None:
        messages, rejected, notes = cut_after_difference(messages, rejected, learn)
    prompt, answer, later = split_at_answer(messages, learn)
    if not prompt and convention.has != "answer":
        raise BadRow("found nothing before the assistant's turn; expected a turn of the user")
    if later:
        notes.append(CUT)
    rejected_turn = reply_to(prompt, rejected, learn) if rejected else None
    if rejected is not None and rejected_turn in (None, answer):
        notes.append(EQUAL if rejected_turn else ELSEWHERE)
        rejected_turn = None
    return LearnedTurn(prompt, answer, rejected_turn, notes)


def cut_after_difference(
    chosen: list[Message], rejected: list[Message], learn: str
) -> tuple[list[Message], list[Message] | None, list[str]]:
    """Mark the common start of two conversations as context; to learn the last turn, cut both after they differ."""
    if chosen == rejected:
        return chosen, None, [EQUAL]
    pairs = enumerate(zip(chosen, rejected, strict=False))
    start = next((number for number, (one, other) in pairs if one != other), 0)
    if start == 0:  # nothing in common, or one conversation continues the other
        return chosen, rejected, []
    chosen = without_learning(chosen[:start]) + chosen[start:]
    rejected = without_learning(rejected[:start]) + rejected[start:]
    both_answer = all(len(side) > start and side[start]["role"] == "assistant" for side in (chosen, rejected))
    if learn != "last" or not both_answer:
        return chosen, rejected, []
    notes = [CUT] if len(chosen) > start + 1 else []
    return chosen[: start + 1], rejected[: start + 1], notes


def split_at_answer(messages: list[Message], learn: str) -> tuple[list[Message], Message, int]:
    """Return the messages before the assistant's turn to learn, that turn, and the number of messages after it."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRow("found no turn of the assistant, expected one")
    weighted = [number for number in answers if messages[number].get("weight") not in (0, "0")]
    if not weighted:
        raise LeftOut("whose turns all have weight 0")
    after_user = [number for number in weighted if any(message["role"] == "user" for message in messages[:number])]
    place = (after_user or weighted)[0] if learn == "first" else weighted[-1]
    answer = messages[place]
    if "content" not in answer and not any(name in answer for name in OTHER_CONTENT_KEYS):
        raise BadRow(f"message {place + 1}: found no content in the assistant's turn, expected a text or tool_calls")
    return messages[:place], answer, len(messages) - place - 1


def reply_to(prompt: list[Message], rejected: list[Message], learn: str) -> Message | None:
    """Return the rejected answer if it replies to the same prompt, else None."""
    try:
        before, answer, _ = split_at_answer(rejected, learn)
    except (BadRow, LeftOut):
        return None
    return answer if before == prompt else None
