"""Messages as files have them, made one shape: ``role``, ``content`` as text, and the other keys as they are."""

import json
import re
from datetime import date, time
from decimal import Decimal
from typing import Any

from irlfast.data.rows import BadRow, Message

ROLES = {  # the words of ShareGPT and its kin; a role that is not here stays as it is, for the template to judge
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")  # ShareGPT's turns whose text is a call
BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
SURROGATE = re.compile("[\ud800-\udfff]")
KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def kind(value: Any) -> str:
    """The kind of a value, in words."""
    return KINDS.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def is_conversation(value: Any) -> bool:
    """Whether a value is messages: a list of them, one alone, or a struct of lists."""
    first = next((item for item in value if isinstance(item, dict)), None) if isinstance(value, list) else value
    return isinstance(first, dict) and bool({"role", "from"} & {*first})


def messages_of(value: Any, column: str) -> list[Message]:
    """Messages of a column: a list of them, JSON of one, one message, or a struct of lists as Arrow has sequences."""
    if isinstance(value, str):
        value = from_json(value, f"column {column}")
    if isinstance(value, dict):
        value = from_struct(value, column) if any(isinstance(part, list) for part in turns_of(value)) else [value]
    if not isinstance(value, list):
        raise BadRow(f"column {column}: found {kind(value)}, expected a list of messages")
    return [message_of(item, f"column {column}, message {number}") for number, item in enumerate(value, 1)]


def turns_of(struct: dict) -> list[Any]:
    return [struct.get(name) for name in ("role", "from")]


def from_json(text: str, place: str) -> Any:
    try:
        return parsed(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{place}: found a text that is not JSON, expected a list") from error


def parsed(text: str) -> Any:
    """JSON within a text, lone surrogates that it escapes replaced."""
    return mended(json.loads(text, strict=False))[0]


def from_struct(struct: dict[str, Any], column: str) -> list[dict]:
    """``{"role": [a, b], "content": [c, d]}`` as a list of messages."""
    lists = {name: values for name, values in struct.items() if values is not None}
    lengths = {len(values) if isinstance(values, list) else -1 for values in lists.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise BadRow(f"column {column}: found an object whose lists differ in length, expected a list of messages")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def message_of(item: Any, place: str) -> Message:
    """One message; ``content`` is absent where it is null."""
    if not isinstance(item, dict):
        raise BadRow(f"{place}: found {kind(item)}, expected an object with role and content")
    given = {name: value for name, value in item.items() if value is not None}
    word = given.pop("role") if "role" in given else given.pop("from", None)
    if not isinstance(word, str):
        raise BadRow(f"{place}: found {kind(word)} as role, expected a text such as user or assistant")
    content = given.pop("content") if "content" in given else given.pop("value", None)
    message: Message = {"role": ROLES.get(word.strip().lower(), word)}
    call = call_of(content) if word in CALLS else None
    if call:
        given["tool_calls"] = [call]
    elif content is not None:
        message["content"] = text_of(content, place)
    if "tool_calls" in given:
        given["tool_calls"] = calls_of(given["tool_calls"], place)
        if not given["tool_calls"]:
            del given["tool_calls"]
    return message | given


def call_of(content: Any) -> dict | None:
    """ShareGPT's ``{"name": …, "arguments": …}`` as a tool call; None where the text is another."""
    try:
        call = parsed(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        return None
    named = isinstance(call, dict) and isinstance(call.get("name"), str)
    return {"type": "function", "function": call} if named else None


def calls_of(value: Any, place: str) -> list[Any]:
    """Tool calls; arguments that are JSON in a text, as OpenAI has them, become the object that templates expect."""
    calls = from_json(value, f"{place}, tool_calls") if isinstance(value, str) else value
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(f"{place}: found {kind(calls)} as tool_calls, expected a list of objects")
    return [with_arguments(call) for call in calls]


def with_arguments(call: dict) -> dict:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = parsed(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def tools_of(value: Any) -> list[dict] | None:
    """Tools of a row: a list of objects, JSON of one, or a list of JSON texts; none where there is nothing."""
    tools = from_json(value, "column tools") if isinstance(value, str) and value.strip() else value
    if isinstance(tools, list):
        tools = [from_json(tool, "column tools") if isinstance(tool, str) else tool for tool in tools]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow(f"column tools: found {kind(tools)}, expected a list of objects")
    return tools or None


def text_of(value: Any, place: str) -> str:
    """A value as text: numbers as they are written, the text parts of a list joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Decimal | date | time):
        return str(value)
    if isinstance(value, list):
        return "".join(part_of(part, place) for part in value)
    raise BadRow(f"{place}: found {kind(value)}, expected a text")


def part_of(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS:
        text = part.get("text")
        return "" if text is None else text_of(text, place)
    found = f"a part of type {part.get('type')!r}" if isinstance(part, dict) else f"{kind(part)} as a part"
    raise BadRow(f"{place}: found {found}, expected texts; images and sound cannot be learned from")


def with_content(message: Message) -> Message:
    """A message without content has an empty one, so that no template writes the word None."""
    if "content" in message:
        return message
    return {"role": message["role"], "content": "", **message}


def mended(value: Any) -> tuple[Any, int]:
    """A value whose lone surrogates, which no tokenizer takes, are U+FFFD; and how many there were."""
    if isinstance(value, str):
        return SURROGATE.subn("\ufffd", value)
    if isinstance(value, list):
        parts = [mended(part) for part in value]
        return [part for part, _ in parts], sum(count for _, count in parts)
    if isinstance(value, dict):
        items = [(mended(name), mended(part)) for name, part in value.items()]
        return {name[0]: part[0] for name, part in items}, sum(name[1] + part[1] for name, part in items)
    return value, 0
