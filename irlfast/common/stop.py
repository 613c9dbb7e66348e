"""Stopping when asked: SIGTERM and SIGUSR1, which schedulers send before they take a machine away (preemption).

A thread hears the signals: the main thread may wait for a GPU or for other processes, and Python runs the handler of a
signal only when such a wait is over. A process that is asked leaves at once, because the files of a run are whole at
any moment. Work that is worth finishing is done within :func:`held`: the process leaves after that work, or when the
grace is over. With several processes, one that is asked asks the others (:mod:`irlfast.common.watchdog`).
"""

import contextlib
import dataclasses
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from irlfast.common import ranks

PREEMPTED = 75  # exit code, EX_TEMPFAIL of sysexits.h: the same command may succeed later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ECHO = 2.0  # seconds in which a SIGTERM is the same one again: from a launcher, and from whoever asked the launcher
RESUMES = "the same command resumes"


class Preempted(BaseException):
    """Raised to leave, because the process was asked to. The message says what was reached."""


@dataclasses.dataclass
class Request:
    """Whether this process was asked to stop, and whether it may leave at once."""

    grace: float = 120.0  # seconds
    held: bool = False
    asked: threading.Event = dataclasses.field(default_factory=threading.Event)
    pipe: int | None = None  # numbers of signals that are written to it are heard; None: nobody listens


REQUEST = Request()


def asked(within: float = 0.0) -> bool:
    """Return whether this process was asked to stop, or is ``within`` so many seconds."""
    return REQUEST.asked.wait(within) if within else REQUEST.asked.is_set()


def ask() -> None:
    """Ask this process to stop, as a signal does."""
    if REQUEST.pipe is not None:
        os.write(REQUEST.pipe, bytes([signal.SIGUSR1]))


def grant(seconds: float) -> None:
    """Set how long work within :func:`held` may take after the process was asked to stop."""
    REQUEST.grace = seconds


@contextlib.contextmanager
def held(end: str) -> Iterator[None]:
    """Let the work in this context end before the process leaves. Long work looks at :func:`asked`, and ends early.

    All processes of a run hold the same work, and wait for each other before it ends.

    Raises:
        Preempted: the process was asked to stop meanwhile; the message names the ``end`` that was reached.
    """
    REQUEST.held = True
    try:
        yield
    finally:
        REQUEST.held = False
    if asked():
        raise Preempted(f"preempted after {end}")


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within the context, hear the signals."""
    reader, REQUEST.pipe = os.pipe()
    os.set_blocking(REQUEST.pipe, False)
    before = {number: signal.signal(number, go_on) for number in SIGNALS}
    signal.set_wakeup_fd(
        REQUEST.pipe, warn_on_full_buffer=False
    )  # C code writes the number of each signal to it at once
    threading.Thread(target=hear, args=(reader,), name="stop", daemon=True).start()
    try:
        yield
    finally:
        if not asked():  # else the thread stays, for the case that the end of the process takes too long
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(REQUEST.pipe)
            REQUEST.pipe = None


def go_on(number: int, frame: object) -> None:
    """Handle a signal in the main thread, where nothing is left to do."""


def leave_before_listening(number: int, frame: object) -> None:
    """Handle a signal that comes while the command's libraries are still imported."""
    os.write(2, f"irlfast: preempted while it started; {RESUMES}\n".encode())
    os._exit(PREEMPTED)


def forget() -> None:
    """End a forked child at the signals again: its parent would hear them from the pipe that both have."""
    if REQUEST.pipe is not None:
        REQUEST.pipe = None
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=forget)


def hear(reader: int) -> None:
    """Wait for the signals. Leave if nothing is held, when the grace is over, and at a second SIGTERM."""
    first_term: float | None = None
    deadline: float | None = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reader], [], [], left)[0]:
            leave(f"preempted; what takes longer than preemption_grace ({REQUEST.grace:g} seconds) is not kept")
        numbers, now = os.read(reader, 64), time.monotonic()
        if not numbers:
            os.close(reader)
            return
        if signal.SIGTERM in numbers:
            if first_term is not None and now > first_term + ECHO:
                leave("preempted again; what was begun is not kept")
            first_term = now if first_term is None else first_term
        if deadline is None and set(numbers) & {*SIGNALS}:
            deadline = now + REQUEST.grace
            REQUEST.asked.set()  # before the look at `held`: who ends that looks at `asked`
            if not REQUEST.held:
                ranks.end_from_thread(PREEMPTED, f"preempted; all that was finished is kept; {RESUMES}")
            ranks.ask_to_stop()


def leave(why: str) -> NoReturn:
    """Leave without what is held, and say so. Where nothing is held, the main thread has said why, and is leaving."""
    if not REQUEST.held:
        os._exit(PREEMPTED)
    ranks.end_from_thread(PREEMPTED, f"{why}; {RESUMES}")
