"""The one shape of every row, whatever its convention: a conversation with the answer to learn."""

from typing import Any, NamedTuple

from irlfast.common.files import InputError

Message = dict[str, Any]  # role, content, and every other key that the chat template may read


class BadRow(InputError):
    """A row that cannot be read as a demonstration; ``bad_rows`` says what happens to it."""


class LeftOut(Exception):
    """A row that is read well but has nothing to learn; the message is the reason, as ``with label false``."""


class Demonstration(NamedTuple):
    """A conversation, the expert's answer to it, and perhaps an answer that people liked less.

    A prompt that is one text is a conversation of one user turn. Earlier assistant turns in ``prompt`` are context;
    with ``learn_turns: all`` SFT learns them too, but for those with ``weight`` 0.
    """

    prompt: list[Message]
    answer: Message | None  # the assistant's turn to learn; None where the row is a prompt alone
    rejected: Message | None = None  # an assistant's turn in reply to the same prompt
    tools: list[dict[str, Any]] | None = None  # tools that the chat template writes
    where: str = ""  # "file, line 3": for messages
    row: dict[str, Any] = {}  # noqa: RUF012  the row as it was read, for reward functions
