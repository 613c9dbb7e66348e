"""Chat templates in Jinja that write fixed texts around contents which they do not look into.

For such a template the texts around the contents depend on the roles of the turns alone: they are rendered once for
each sequence of roles. A template is such a one if this is proven by a walk over its syntax. Each expression is of one
of four kinds: the messages, a message, a text with a content in it, or a value without any content. A text may only be
written, joined to other texts, or trimmed before it is joined. It never decides a condition, and no function, macro or
other filter takes it. What the walk does not know is no proof.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols

from irlfast.data.rows import Message

VALUE, TEXT, MESSAGE, MESSAGES = "value", "text", "message", "messages"
JOINED = {VALUE, TEXT}
TYPE_TESTS = {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence"}  # the same for every text
OF_LOOP = {"index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0", "cycle"}
BANNED = {"loop", "random", "lipsum", "self", "caller", "varargs", "kwargs"}
METHODS = {*dir(dict), *dir(list)}
MARK = "\ufdd6{}\ufdd7"  # stands for the content of a turn
LEFT, RIGHT = "\x1e", "\x1f"  # white space beside the mark, which a template that trims contents takes away
MARKS = re.compile(f"({LEFT}?\ufdd6[0-9]+\ufdd7{RIGHT}?)")
MOST = 256  # sequences of roles that are kept
MOST_WALKS = 8
KEYS = {"role", "content", "weight"}


class Around(NamedTuple):
    """The texts that a template writes around the contents of a sequence of roles."""

    text: str  # with ``%s`` for each content, as the operator ``%`` reads it
    turns: list[tuple[int, bool]]  # for each content, its turn, and whether the template trims it


class FixedTexts(NamedTuple):
    """The texts of a template around contents, for each sequence of roles; None where it does not render them."""

    known: dict[tuple, Around | None]


class NotProven(Exception):
    """Raised where a template does something that the walk does not know, or that depends on a content."""


def has_fixed_texts(template: str) -> bool:
    """Return whether it is proven that a template writes fixed texts around contents that it does not look into."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    try:
        tree = environment.parse(template)
        kinds: dict[str, str] = {"messages": MESSAGES}
        for _ in range(MOST_WALKS):
            before = {**kinds}
            walk(tree.body, kinds)
            if kinds == before:  # else a name may have got its kind below its first use
                return True
    except (NotProven, jinja2.TemplateError, RecursionError):
        pass
    return False


def write_contents(
    fixed: FixedTexts, messages: Sequence[Message], generation: bool, render: Callable[[list[Message]], str]
) -> str | None:
    """Return what the template makes of messages; None if they have more than roles and texts, or are refused.

    ``render`` renders messages by Jinja, and may raise any error.
    """
    contents = []
    for message in messages:
        content = message.get("content")
        if type(content) is not str or not KEYS.issuperset(message):
            return None
        contents.append(content)
    roles = tuple([message.get("role") for message in messages])
    key = (generation, roles)
    if key not in fixed.known:
        if len(fixed.known) >= MOST:
            fixed.known.clear()
        fixed.known[key] = find_texts(roles, render)
    around = fixed.known[key]
    return None if around is None else fill(around, contents)


def fill(around: Around, contents: Sequence[str]) -> str:
    return around.text % tuple([contents[at].strip() if trimmed else contents[at] for at, trimmed in around.turns])


def find_texts(roles: Sequence[Any], render: Callable[[list[Message]], str]) -> Around | None:
    """Render marks in the place of contents, without and with white space beside them; None if that is refused."""
    marks = [MARK.format(turn) for turn in range(len(roles))]
    spaced = [LEFT + mark + RIGHT for mark in marks]
    try:
        bare, wide = (
            render([{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)])
            for contents in (marks, spaced)
        )
    except Exception:  # a template is a program, which may raise anything; the row meets the error itself
        return None
    parts = MARKS.split(wide)
    turns = [(marks.index(part.strip()), part == part.strip()) for part in parts[1::2]]
    around = Around("%s".join(part.replace("%", "%%") for part in parts[::2]), turns)
    is_same = fill(around, marks) == bare and fill(around, spaced) == wide
    return around if is_same and LEFT not in bare and RIGHT not in bare else None


# ---------------------------------------------------------------- the walk


def walk(statements: Sequence[nodes.Node], kinds: dict[str, str]) -> None:
    for node in statements:
        if isinstance(node, nodes.Output):
            for part in node.nodes:
                expect(JOINED, part, kinds)
        elif isinstance(node, nodes.If):
            expect({VALUE}, node.test, kinds)
            walk([*node.body, *node.elif_, *node.else_], kinds)
        elif isinstance(node, nodes.For) and not node.recursive:
            items = expect({VALUE, MESSAGES}, node.iter, kinds)
            assign(node.target, MESSAGE if items == MESSAGES else VALUE, kinds)
            if node.test:
                expect({VALUE}, node.test, kinds)
            walk([*node.body, *node.else_], kinds)
        elif isinstance(node, nodes.Assign):
            assign(node.target, kind_of(node.node, kinds), kinds)
        elif not isinstance(node, nodes.TemplateData | nodes.Break | nodes.Continue):
            raise NotProven


def assign(target: nodes.Node, kind: str, kinds: dict[str, str]) -> None:
    if isinstance(target, nodes.NSRef) and kind == VALUE:
        return
    if not isinstance(target, nodes.Name):
        raise NotProven
    known = kinds.setdefault(target.name, kind)
    if known != kind:
        if {known, kind} != JOINED:
            raise NotProven
        kinds[target.name] = TEXT


def expect(allowed: set[str], node: nodes.Node, kinds: dict[str, str]) -> str:
    kind = kind_of(node, kinds)
    if kind not in allowed:
        raise NotProven
    return kind


def kind_of(node: nodes.Node, kinds: dict[str, str]) -> str:
    """Return the kind of an expression."""
    for types, find in EXPRESSIONS:
        if isinstance(node, types):
            return find(node, kinds)
    raise NotProven


def kind_of_name(node: nodes.Name, kinds: dict[str, str]) -> str:
    if node.name in BANNED:
        raise NotProven
    return kinds.get(node.name, VALUE)


def kind_of_part(node: nodes.Getattr | nodes.Getitem, kinds: dict[str, str]) -> str:
    """Return the kind of ``node.attr`` or ``node[arg]``: a message's content is a text, its role is a value."""
    key = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
    if isinstance(node.node, nodes.Name) and node.node.name == "loop" and key in OF_LOOP:
        return VALUE
    whole = kind_of(node.node, kinds)
    if whole == MESSAGES and isinstance(node, nodes.Getitem):
        for part in [node.arg] if not isinstance(node.arg, nodes.Slice) else node.arg.iter_child_nodes():
            expect({VALUE}, part, kinds)
        return MESSAGES if isinstance(node.arg, nodes.Slice) else MESSAGE
    if whole == MESSAGE and isinstance(key, str) and key not in METHODS:
        return TEXT if key == "content" else VALUE
    if isinstance(node, nodes.Getitem):
        expect({VALUE}, node.arg, kinds)
    return needs_value(whole)


def needs_value(kind: str) -> str:
    if kind != VALUE:
        raise NotProven
    return VALUE


def arguments(node: nodes.Filter | nodes.Call | nodes.Test, kinds: dict[str, str]) -> bool:
    """Return whether there are arguments, each of which must be a value."""
    given = [part for part in (*node.args, *node.kwargs, node.dyn_args, node.dyn_kwargs) if part is not None]
    for part in given:
        expect({VALUE}, part, kinds)
    return bool(given)


def is_part(node: nodes.Node | None) -> bool:
    """Return whether a text is a content as it is: ``m.content`` or ``m['content']``."""
    return isinstance(node, nodes.Getattr | nodes.Getitem)


def kind_of_filter(node: nodes.Filter, kinds: dict[str, str]) -> str:
    if node.node is None or node.name in BANNED:
        raise NotProven
    kind, alone = kind_of(node.node, kinds), not arguments(node, kinds)
    if alone and node.name == "trim" and kind == TEXT and is_part(node.node):
        return TEXT
    if alone and node.name in ("length", "count") and kind == MESSAGES:
        return VALUE
    return needs_value(kind)


def kind_of_call(node: nodes.Call, kinds: dict[str, str]) -> str:
    called, alone = node.node, not arguments(node, kinds)
    if alone and isinstance(called, nodes.Getattr) and called.attr == "strip":
        kind = kind_of(called.node, kinds)
        return TEXT if kind == TEXT and is_part(called.node) else needs_value(kind)
    return expect({VALUE}, called, kinds)


def kind_of_test(node: nodes.Test, kinds: dict[str, str]) -> str:
    kind = kind_of(node.node, kinds)
    return VALUE if not arguments(node, kinds) and node.name in TYPE_TESTS else needs_value(kind)


def kind_of_choice(node: nodes.CondExpr, kinds: dict[str, str]) -> str:
    expect({VALUE}, node.test, kinds)
    return joined(nodes.Concat([node.expr1, *([node.expr2] if node.expr2 else [])]), kinds)


def joined(node: nodes.Node, kinds: dict[str, str]) -> str:
    found = {expect(JOINED, part, kinds) for part in node.iter_child_nodes()}
    return TEXT if TEXT in found else VALUE


def values(node: nodes.Node, kinds: dict[str, str]) -> str:
    """Return ``VALUE`` if every part of an expression is one."""
    for part in node.iter_child_nodes():
        expect({VALUE}, part, kinds)
    return VALUE


EXPRESSIONS: tuple[tuple[type | tuple[type, ...], Callable[..., str]], ...] = (
    (nodes.TemplateData, lambda node, kinds: VALUE),
    (nodes.Const, lambda node, kinds: VALUE),
    (nodes.Name, kind_of_name),
    ((nodes.Getattr, nodes.Getitem), kind_of_part),
    (nodes.Filter, kind_of_filter),
    (nodes.Call, kind_of_call),
    (nodes.Test, kind_of_test),
    (nodes.CondExpr, kind_of_choice),
    ((nodes.Add, nodes.Concat), joined),
    ((nodes.BinExpr, nodes.UnaryExpr, nodes.Compare, nodes.Operand, nodes.Literal, nodes.Pair, nodes.Keyword), values),
    (nodes.Slice, values),
)
