"""A row of any convention to its demonstration: which turn is the answer, and what is left out of the row."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from irlfast.data.conventions import EXPECTED, Convention, Row, Turns, columns_of, context, convention_of, filled
from irlfast.data.messages import BESIDE_CONTENT, text_of, tools_of, with_content
from irlfast.data.rows import BadRow, Demonstration, LeftOut, Message

SYSTEMS = ("system", "system_prompt")
BESIDE = {"prompt", "instruction", "input", "context", "history", "question", "query", *SYSTEMS, "tools", "label"}
OPTIONAL = (*SYSTEMS, "rejected", "tools", "label")  # columns that a row may lack
CUT = "conversations cut after the turn that is learned"
EQUAL = "rejected answers left out, equal to the chosen one"
ELSEWHERE = "rejected answers left out, not in reply to the same prompt"


class Found(NamedTuple):
    """A demonstration and how it was read."""

    demonstration: Demonstration
    convention: str
    columns: set[str]  # that were used, by their names in the file
    notes: list[str]  # what of the row is not used


class Learned(NamedTuple):
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
) -> Found:
    """A row of any convention.

    Args:
        learn: which assistant turn is the answer: ``first``, or the ``last`` (``all`` too, which learns earlier ones).
        columns: names in the file of ``prompt``, ``answer``, ``rejected``, ``messages``, ``system``, ….
        prompts_only: rows without an answer are fine; their ``answer`` is None.

    Raises:
        BadRow: that the row cannot be read, and why.
        LeftOut: that it has nothing to learn, and why.
    """
    names = inner_names(columns or {})
    inner = renamed(row, names) if names else row
    convention = convention_of(inner)
    turns = with_system(inner, convention.read(inner, convention.columns[-1]))
    prompt, answer, rejected, notes = learned(turns, convention, learn, prompts_only)
    reason = None if answer is None else why_not(answer, inner, turns, convention)
    if reason and not prompts_only:
        raise LeftOut(reason)
    tools = tools_of(inner.get("tools"))
    used = [*turns.columns, *["tools"] * bool(tools), *["label"] * is_judged(inner, turns, convention)]
    demonstration = Demonstration(
        [*map(with_content, prompt)],
        None if answer is None or reason else with_content(answer),
        rejected and with_content(rejected),
        tools,
        where,
        row,
    )
    return Found(demonstration, convention.name, {names.get(name, name) for name in used}, notes)


# ---------------------------------------------------------------- the columns of a row


def inner_names(columns: Mapping[Any, str]) -> dict[str, str]:
    """The key ``columns`` by the names that the conventions use."""
    answer = "chosen" if "rejected" in columns else "completion"
    return {answer if name == "answer" else name: found for name, found in columns.items()}


def renamed(row: Row, names: Mapping[str, str]) -> dict[str, Any]:
    """A row by the names that the conventions use; columns of other conventions do not compete with those named."""
    missing = [found for name, found in names.items() if found not in row and name not in OPTIONAL]
    if missing:
        raise BadRow(f"found {columns_of(row)}, and not {missing[0]!r}, which the key columns names")
    answers = {"completion", "chosen", "messages", "text"} & {*names}
    rest = {
        name: value for name, value in row.items() if name not in names.values() and (name in BESIDE or not answers)
    }
    return rest | {name: row.get(found) for name, found in names.items()}


def with_system(row: Row, turns: Turns) -> Turns:
    """A column ``system`` or ``system_prompt`` becomes the first message, where there is no system message yet."""
    column = next((name for name in SYSTEMS if filled(row, name)), None)
    if column is None or (turns.messages and turns.messages[0]["role"] == "system"):
        return turns
    system = [{"role": "system", "content": text_of(row[column], f"column {column}")}]
    rejected = system + turns.rejected if turns.rejected else turns.rejected
    return Turns(system + turns.messages, (*turns.columns, column), rejected)


def why_not(answer: Message, row: Row, turns: Turns, convention: Convention) -> str | None:
    """The reason not to learn an answer, if there is one."""
    if is_judged(row, turns, convention) and truth(row["label"]) is False:
        return "with label false"
    text = answer.get("content", "")
    return "without an answer" if not text.strip() and not any(answer.get(name) for name in BESIDE_CONTENT) else None


def is_judged(row: Row, turns: Turns, convention: Convention) -> bool:
    """Whether a row has KTO's label, true or false, of its answer."""
    return convention.has == "both" and turns.rejected is None and truth(row.get("label")) is not None


def truth(label: Any) -> bool | None:
    """A label as JSON, Arrow or CSV have it; None where it is another kind of label."""
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    return words.get(str(label).strip().lower())


# ---------------------------------------------------------------- the turn to learn


def learned(turns: Turns, convention: Convention, learn: str, prompts_only: bool) -> Learned:
    """Prompt, answer and rejected answer of what a convention found."""
    messages = turns.messages
    if prompts_only:
        if convention.has == "answer":
            raise BadRow(f"found {convention.name} alone; expected a prompt")
        if convention.has == "prompt" or (messages and messages[-1]["role"] != "assistant"):
            return Learned(messages, None, None, [])
    elif convention.has == "prompt":
        raise BadRow(f"found a {convention.name} without an answer; expected {EXPECTED}")
    rejected = turns.rejected
    notes: list[str] = []
    if rejected is not None:
        messages, rejected, notes = compared(messages, rejected, learn)
    prompt, answer, later = split(messages, learn)
    if not prompt and convention.has != "answer":
        raise BadRow("found nothing before the assistant's turn; expected a turn of the user")
    if later:
        notes.append(CUT)
    other = reply_to(prompt, rejected, learn) if rejected else None
    if rejected is not None and other in (None, answer):
        notes.append(EQUAL if other else ELSEWHERE)
        other = None
    return Learned(prompt, answer, other, notes)


def compared(
    chosen: list[Message], rejected: list[Message], learn: str
) -> tuple[list[Message], list[Message] | None, list[str]]:
    """Two conversations whose common start is context, and where the last turn is learned, cut after they part."""
    if chosen == rejected:
        return chosen, None, [EQUAL]
    pairs = enumerate(zip(chosen, rejected, strict=False))
    part = next((number for number, (one, other) in pairs if one != other), 0)
    if part == 0:  # nothing in common, or one goes on where the other ends
        return chosen, rejected, []
    chosen, rejected = (context(side[:part]) + side[part:] for side in (chosen, rejected))
    ends = [side[part:] for side in (chosen, rejected)]
    if learn != "last" or not all(end and end[0]["role"] == "assistant" for end in ends):
        return chosen, rejected, []
    notes = [CUT] if len(ends[0]) > 1 else []
    return chosen[: part + 1], rejected[: part + 1], notes


def split(messages: list[Message], learn: str) -> tuple[list[Message], Message, int]:
    """The messages before the assistant's turn to learn, that turn, and how many come after it."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRow("found no turn of the assistant, expected one")
    weighty = [number for number in answers if messages[number].get("weight") not in (0, "0")]
    if not weighty:
        raise LeftOut("whose turns all have weight 0")
    after_user = [number for number in weighty if any(message["role"] == "user" for message in messages[:number])]
    place = (after_user or weighty)[0] if learn == "first" else weighty[-1]
    answer = messages[place]
    if "content" not in answer and not any(name in answer for name in BESIDE_CONTENT):
        raise BadRow(f"message {place + 1}: found no content in the assistant's turn, expected a text or tool_calls")
    return messages[:place], answer, len(messages) - place - 1


def reply_to(prompt: list[Message], rejected: list[Message], learn: str) -> Message | None:
    """The rejected answer, where it is in reply to the prompt."""
    try:
        before, answer, _ = split(rejected, learn)
    except (BadRow, LeftOut):
        return None
    return answer if before == prompt else None
