"""Try a chat template in a child process before this process renders it, and bound the time of each row.

A template is a program that comes with a model. Jinja's sandbox keeps it from the system, but not from running for ever
or from taking all memory: ``{{ 9 ** 9 ** 9 }}``. Such a program would not even react to Ctrl-C. Nested loops over a
row's text, which end soon for short texts, do react to a signal.
"""

import contextlib
import itertools
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from irlfast.common.files import InputError
from irlfast.data.rows import Message

SECONDS = 5  # of CPU time
ROOM = 2**28  # bytes of memory
LONGEST = 10**6  # characters of a short conversation
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "a", "description": "a", "parameters": {"type": "object"}}}
]
USER, ASSISTANT, SYSTEM, TOOL = ({"role": role, "content": "a"} for role in ("user", "assistant", "system", "tool"))
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "a", "arguments": {}}}]}
CONVERSATIONS: list[list[Message]] = [
    [USER],
    [SYSTEM, USER, ASSISTANT],
    [USER, ASSISTANT, USER, ASSISTANT],
    [USER, CALL, TOOL],
]
TRIED: set[str] = set()  # the templates that this process has tried


def check_cost(key: str, template: Any, render: Callable[..., str]) -> None:
    """Check that short conversations take at most ``SECONDS`` and ``ROOM``, and no text is longer than ``LONGEST``.

    ``render`` takes messages, tools, and whether an answer is to be generated; it may raise any error. ``template``
    tells which templates are the same; each is tried once.

    Raises:
        InputError: a conversation takes more; the message names the ``key``.
    """
    if str(template) in TRIED:
        return
    child = os.fork()
    if not child:
        run_in_child(render)
    status = os.waitpid(child, 0)[1]
    if status:
        raise InputError(
            f"{key}: a short conversation takes more than {SECONDS} s of CPU time, {ROOM // 2**20} MiB of memory or "
            f"{LONGEST:,} characters; expected a template that only writes a conversation"
        )
    TRIED.add(str(template))


@contextlib.contextmanager
def within_seconds() -> Iterator[None]:
    """Raise a TimeoutError when the context takes more than ``SECONDS`` of CPU time; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGVTALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def raise_timeout(number: int, frame: object) -> None:
    raise TimeoutError(f"it takes more than {SECONDS} s of CPU time")


def run_in_child(render: Callable[..., str]) -> None:
    """End this process with 0, with 1 if a conversation takes too much, or by a signal if they take too long."""
    most = psutil.Process().memory_info().vms + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        given = itertools.product(CONVERSATIONS, (None, TOOLS), (False, True))
        os._exit(int(any(takes_too_much(render, *each) for each in given)))
    finally:
        os._exit(1)


def takes_too_much(render: Callable[..., str], *given: Any) -> bool:
    try:
        return len(render(*given)) > LONGEST
    except Exception as error:  # the caller meets any error but this one itself
        return isinstance(error.__cause__ or error, MemoryError)
