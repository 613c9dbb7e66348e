"""The tables of docs/keys.md, made from the schema: ``python -m tests.helpers.keys_page`` writes the page anew."""

import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from irlfast.config import inputs, schema
from irlfast.config.types import Dataset

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "keys.md"
HEAD = """# All keys

This page is made from `irlfast/config/inputs.py` and `schema.py`: `python -m tests.helpers.keys_page` writes it anew.

A configuration is flat YAML, and the command line overrides it: `key=value`, `--key value` or `--key=value`.
`irlfast train --help` shows the same keys. Names are TRL's where TRL has one.
"""
BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}
NAMES = {
    Dataset: "mapping",
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    type(None): "none",
}


def sections() -> list[tuple[str, list[str]]]:
    """The keys under each heading: the comments that stand alone between the fields of the schema."""
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (inputs, schema)]
    fields = "".join(source[source.index("\nclass ") :] for source in sources)
    found: list[tuple[str, list[str]]] = []
    for comment, name in re.findall(r"^    (?:# (.+)|(\w+): .* = key\()", fields, re.M):
        if comment:
            found.append((comment, []))
        else:
            found[-1][1].append(name)
    return found


def kind(annotation: Any) -> str:
    """A type in words: the values of a Literal, the bounds of a number, the alternatives of a union."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is Annotated:
        bounds = [
            text.format(f"{getattr(constraint, name):g}")
            for field in arguments[1:]
            for constraint in getattr(field, "metadata", ())
            for name, text in BOUNDS.items()
            if hasattr(constraint, name)
        ]
        return f"{kind(arguments[0])} {' and '.join(bounds)}"
    if origin in (Union, types.UnionType):
        return " or ".join(kind(part) for part in arguments if part is not type(None))
    if origin is list:
        return f"list of {kind(arguments[0])}"
    if origin is dict:
        return "mapping"
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


def default(value: Any) -> str:
    if value is None:
        return "none"
    shown = str(value).lower() if isinstance(value, bool) else str(value) if str(value).isprintable() else repr(value)
    return f"`{shown}`".replace("|", "\\|")


def page() -> str:
    hints = get_type_hints(schema.Config, include_extras=True)
    described = schema.Config.__pydantic_fields__  # type: ignore[attr-defined]
    lines = [HEAD]
    for heading, names in sections():
        lines += [f"## {heading}\n", "| key | what it is | values | default |", "| --- | --- | --- | --- |"]
        for name in names:
            text = str(described[name].description).replace("|", "\\|").replace("~", "\\~")
            values = kind(hints[name]).replace("|", "\\|")
            lines.append(f"| `{name}` | {text} | {values} | {default(described[name].default)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
