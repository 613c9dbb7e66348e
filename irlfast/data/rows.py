"""The record that every row becomes: ``Demonstration``, a conversation with the answer to learn; and its two errors."""

from typing import Any, NamedTuple

from irlfast.common.files import InputError

Message = dict[str, Any]  # role, content, and every other key that the chat template may read


class BadRow(InputError):
    """Raised for a row that cannot be read as a demonstration; the key ``bad_rows`` decides what happens to the row."""


class LeftOut(Exception):
    """Raised for a readable row that has nothing to learn; the message is the reason, such as ``with label false``."""


class Demonstration(NamedTuple):
    """A conversation, the expert's answer to it, and perhaps an answer that people liked less.

    A prompt of one text is a conversation of one user turn. Earlier assistant turns in ``prompt`` are context. With
    ``learn_turns: all`` SFT learns these turns too, except those with ``weight`` 0.
    """

    prompt: list[Message]
    answer: Message | None  # the assistant's turn to learn; None where the row is a prompt alone
    rejected: Message | None = None  # an assistant's turn in reply to the same prompt
    tools: list[dict[str, Any]] | None = None  # tools that the chat template writes
    where: str = ""  # "file, line 3", for error messages
    row: dict[str, Any] = {}  # noqa: RUF012  the row as it was read, for reward functions
