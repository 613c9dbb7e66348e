"""Messages as people write them, turned into one shape: ``role``, ``content`` as text, and the other keys unchanged."""

import json
import re
from datetime import date, time
from decimal import Decimal
from typing import Any

from irlfast.data.rows import BadRow, Message

ROLES = {  # names of roles in ShareGPT and similar data; another role stays as it is, and the template may refuse it
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
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's roles of turns whose text is a tool call
OTHER_CONTENT_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
SURROGATE = re.compile("[\ud800-\udfff]")
KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def describe_type(value: Any) -> str:
    """Name the type of a value as error messages do."""
    return KINDS.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def is_conversation(value: Any) -> bool:
    """Return whether a value holds messages: a list of messages, one message, or a struct of lists."""
    first = next((item for item in value if isinstance(item, dict)), None) if isinstance(value, list) else value
    return isinstance(first, dict) and bool({"role", "from"} & {*first})


def to_messages(value: Any, column: str) -> list[Message]:
    """Read the messages of a column.

    The column may hold a list of messages, the JSON text of such a list, one message, or a struct of lists, as Arrow
    stores sequences.
    """
    if isinstance(value, str):
        value = parse_column(value, f"column {column}")
    if isinstance(value, dict):
        is_struct_of_lists = isinstance(value.get("role"), list) or isinstance(value.get("from"), list)
        value = struct_to_messages(value, column) if is_struct_of_lists else [value]
    if not isinstance(value, list):
        raise BadRow(f"column {column}: found {describe_type(value)}, expected a list of messages")
    return [to_message(item, f"column {column}, message {number}") for number, item in enumerate(value, 1)]


def parse_column(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{place}: found a text that is not JSON, expected a list") from error


def parse_json(text: str) -> Any:
    """Parse JSON inside a text, and replace the lone surrogates that the JSON escapes."""
    return replace_surrogates(json.loads(text, strict=False))[0]


def struct_to_messages(struct: dict[str, Any], column: str) -> list[dict]:
    """Turn ``{"role": [a, b], "content": [c, d]}`` into a list of messages."""
    lists = {name: values for name, values in struct.items() if values is not None}
    lengths = {len(values) if isinstance(values, list) else -1 for values in lists.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise BadRow(f"column {column}: found an object whose lists differ in length, expected a list of messages")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def to_message(item: Any, place: str) -> Message:
    """Read one message. A null ``content`` becomes an absent one."""
    if not isinstance(item, dict):
        raise BadRow(f"{place}: found {describe_type(item)}, expected an object with role and content")
    given = {name: value for name, value in item.items() if value is not None}
    word = given.pop("role") if "role" in given else given.pop("from", None)
    if not isinstance(word, str):
        raise BadRow(f"{place}: found {describe_type(word)} as role, expected a text such as user or assistant")
    content = given.pop("content") if "content" in given else given.pop("value", None)
    message: Message = {"role": ROLES.get(word.strip().lower(), word)}
    call = to_tool_call(content) if word in CALL_ROLES else None
    if call:
        given["tool_calls"] = [call]
    elif content is not None:
        message["content"] = to_text(content, place)
    if "tool_calls" in given:
        given["tool_calls"] = to_tool_calls(given["tool_calls"], place)
        if not given["tool_calls"]:
            del given["tool_calls"]
    return message | given


def to_tool_call(content: Any) -> dict | None:
    """Turn ShareGPT's ``{"name": …, "arguments": …}`` into a tool call; return None for any other text."""
    try:
        call = parse_json(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        return None
    named = isinstance(call, dict) and isinstance(call.get("name"), str)
    return {"type": "function", "function": call} if named else None


def to_tool_calls(value: Any, place: str) -> list[Any]:
    """Read tool calls. OpenAI writes the arguments as a JSON text; templates expect an object."""
    calls = parse_column(value, f"{place}, tool_calls") if isinstance(value, str) else value
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(f"{place}: found {describe_type(calls)} as tool_calls, expected a list of objects")
    return [parse_arguments(call) for call in calls]


def parse_arguments(call: dict) -> dict:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = parse_json(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def to_tools(value: Any) -> list[dict] | None:
    """Read a row's tools: a list of objects, the JSON text of such a list, or a list of JSON texts."""
    tools = parse_column(value, "column tools") if isinstance(value, str) and value.strip() else value
    if isinstance(tools, list):
        tools = [parse_column(tool, "column tools") if isinstance(tool, str) else tool for tool in tools]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow(f"column tools: found {describe_type(tools)}, expected a list of objects")
    return tools or None


def to_text(value: Any, place: str) -> str:
    """Turn a value into text: numbers stay as written, and the text parts of a list are joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Decimal | date | time):
        return str(value)
    if isinstance(value, list):
        return "".join(part_to_text(part, place) for part in value)
    raise BadRow(f"{place}: found {describe_type(value)}, expected a text")


def part_to_text(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS:
        text = part.get("text")
        return "" if text is None else to_text(text, place)
    part_type = f"a part of type {part.get('type')!r}" if isinstance(part, dict) else f"{describe_type(part)} as a part"
    raise BadRow(f"{place}: found {part_type}, expected texts; images and sound cannot be learned from")


def fill_content(message: Message) -> Message:
    """Give a message without content an empty one, so that no template writes the word None."""
    if "content" in message:
        return message
    return {"role": message["role"], "content": "", **message}


def replace_surrogates(value: Any) -> tuple[Any, int]:
    """Replace lone surrogates, which no tokenizer takes, by U+FFFD. Return the new value and the number replaced."""
    return replace_each(value) if "\\ud" in repr(value) else (value, 0)  # repr escapes them


def replace_each(value: Any) -> tuple[Any, int]:
    if isinstance(value, str):
        return SURROGATE.subn("\ufffd", value)
    if isinstance(value, list):
        parts = [replace_each(part) for part in value]
        return [part for part, _ in parts], sum(count for _, count in parts)
    if isinstance(value, dict):
        names, name_count = replace_each([*value])
        parts, part_count = replace_each([*value.values()])
        return dict(zip(names, parts, strict=True)), name_count + part_count
    return value, 0
