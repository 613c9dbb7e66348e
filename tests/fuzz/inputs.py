"""Strategies that the targets share: hostile values, changed JSON, damaged bytes."""

import copy
import math
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.guards import CANARY

RUN = f"touch {CANARY}"  # a command of the shell whose effect the guards see
HOSTILE_TEXTS = (
    "auto",
    "nan",
    "-inf",
    "1e400",
    "true",
    "../x",
    "~nobody/x",
    "\0",
    "\ud800",
    "\x1b[2J",
    "a\nb",
    "\u2028",
    "\u202e",
    "</script><script>f()</script>",
    "<img src=x onerror=f()>",
    '" onload="f()',
    "{{ 7 * 7 }}",
    "{% for i in x %}",
    "%n%s",
    f"$({RUN})",
    f"!!python/object/apply:os.system ['{RUN}']",
    "__proto__",
    "1" * 5000,
    "x" * 10_000,
)
texts = st.text(max_size=20) | st.sampled_from(HOSTILE_TEXTS)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**12, 10**400, math.nan, math.inf, -0.0, 1e308])
    | st.floats()
    | texts
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))


@st.composite
def changed(draw: Any, value: Any, most: int = 3) -> Any:
    """Return a copy of a JSON value with one to ``most`` changes: a part is replaced, deleted, added or repeated."""
    root = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, most))):
        place, key = root, 0
        while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 3)):
            place = place[key]
            keys = sorted(place, key=str) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
        what = draw(st.sampled_from(["replace", "replace", "delete", "add"]))
        if what == "add" and isinstance(place[key], dict):
            place[key][draw(texts)] = draw(values)
        elif what == "add" and isinstance(place[key], list):
            place[key].append(draw(values))
        elif what == "delete" and place is not root:
            del place[key]
        else:
            place[key] = draw(values)
    return root[0]


@st.composite
def damaged(draw: Any, content: bytes, most: int = 4) -> bytes:
    """Return ``content`` after a few edits: bytes are replaced, inserted, cut out or repeated, or the end is lost."""
    for _ in range(draw(st.integers(0, most))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        what = draw(st.sampled_from(["replace", "insert", "cut", "repeat", "end"]))
        new = draw(st.binary(max_size=12))
        if what == "replace":
            content = content[:start] + new + content[start + len(new) :]
        elif what == "insert":
            content = content[:start] + new + content[start:]
        elif what == "cut":
            content = content[:start] + content[end:]
        elif what == "repeat":
            content = content[:end] + content[start:end] * draw(st.integers(1, 3)) + content[end:]
        else:
            content = content[:start]
    return content
