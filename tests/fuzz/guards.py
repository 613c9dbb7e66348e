"""Guards while an input is read: no code of the input may run, and a refusal must be readable."""

import atexit
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from irlfast.common.files import LONGEST_MESSAGE, InputError

WORK = Path(tempfile.mkdtemp(prefix="irlfast-fuzz-"))  # the folder of this process
atexit.register(shutil.rmtree, WORK, ignore_errors=True)
CANARY = WORK / "canary"  # what the code in hostile inputs would write
PROCESS_EVENTS = {"os.system", "os.exec", "os.posix_spawn", "os.forkpty", "subprocess.Popen", "pty.spawn"}
WATCHED = {*PROCESS_EVENTS, "socket.connect", "exec"}
OUTCOMES: Counter[str] = Counter()  # accepted and refused inputs of this process
SEEN: list[str] = []  # events of Python's audit hook since the last input began


class CodeRan(Exception):
    """Raised after an input whose code ran, or that started a process or a connection."""


def watch(event: str, arguments: tuple) -> None:
    """Note the audit events that no input may cause. https://docs.python.org/3/library/audit_events.html lists them."""
    if event not in WATCHED:
        return
    if event != "exec":
        SEEN.append(f"{event} {arguments!r:.200}")
    elif (name := getattr(arguments[0], "co_filename", "")).startswith(str(WORK)):
        SEEN.append(f"exec of {name}")


sys.addaudithook(watch)


def guarded(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return ``check`` with a :class:`CodeRan` after an input whose code has run."""
    folder = os.getcwd()

    def run(drawn: Any) -> None:
        SEEN.clear()
        try:
            check(drawn)
        finally:
            os.chdir(folder)
            if CANARY.exists():
                CANARY.unlink()
                raise CodeRan("the canary was written")
            if SEEN:
                raise CodeRan("; ".join(SEEN))

    return run


def fresh_folder() -> Path:
    """Return an empty folder; the one of the input before is deleted."""
    folder = WORK / "input"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    return folder


def refusal(call: Callable[..., Any], *arguments: Any, names: Collection[str] = ()) -> str:
    """Return the message of the InputError that a call raises, or an empty text; any other error goes on.

    The message must be one line of at most LONGEST_MESSAGE characters, and hold one of the ``names``.
    """
    try:
        call(*arguments)
    except InputError as error:
        message = str(error)
        OUTCOMES["refused"] += 1
        assert "\n" not in message and "\r" not in message, f"a refusal of several lines: {message!r}"
        assert len(message) <= LONGEST_MESSAGE + 3, f"a refusal of {len(message)} characters"
        assert not names or any(name in message for name in names), f"a refusal without a name: {message!r}"
        return message
    OUTCOMES["accepted"] += 1
    return ""
