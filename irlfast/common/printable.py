"""Texts that a terminal may show, whatever the data, file names and configurations hold that they come from."""

import sys
import unicodedata
from typing import TextIO

from irlfast.common.secrets import redacted

UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's controls, formats (such as text direction), half characters
JOINERS = "\u200c\u200d"  # formats that emoji and many scripts need


def printable(text: object, keep: str = "") -> str:
    r"""Return a text with its control and format characters as escapes such as ``\x1b``, apart from those to ``keep``.

    Printed so, data cannot move a terminal's cursor, colour or reorder its text, or forge another message. Secrets are
    redacted.
    """
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in UNPRINTABLE and c not in JOINERS + keep else c
        for c in redacted(str(text))
    )


def write_line(text: str, stream: TextIO | None = None) -> None:
    """Write a text and the line's end at once, to stderr if no other stream is given.

    Python's own ``print`` writes to stderr twice per line, and another thread or process may print in between.
    """
    print(f"{text}\n", end="", file=stream or sys.stderr, flush=True)
