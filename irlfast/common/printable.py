"""Texts that a terminal may show, whatever the data, file names and configurations hold that they come from."""

import unicodedata

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
