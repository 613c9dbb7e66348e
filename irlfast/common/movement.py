"""The work of this process, and a count of its progress: the watchdog looks whether the count still grows.

Work in small units, such as the steps of training, is done within :func:`in_small_units`: a unit that takes longer than
``stall_timeout`` hangs. Anything else may take hours (a download, the start of vLLM, the writing of a large model), so
that the watchdog only warns. A process that waits for another one is not looked at: the other has a watchdog, too.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Literal

When = Literal["end", "warn", "ignore"]  # what the watchdog does when nothing moves


@dataclasses.dataclass
class Movement:
    doing: str = "the start"
    when_still: When = "warn"
    count: int = 0


MOVEMENT = Movement()  # of this process


def moved() -> None:
    """Note that this process got on: by a step, a batch, a shard of answers, a chunk of rows."""
    MOVEMENT.count += 1


@contextlib.contextmanager
def work(doing: str, when_still: When) -> Iterator[None]:
    before = MOVEMENT.when_still
    MOVEMENT.doing, MOVEMENT.when_still = doing, when_still
    moved()
    try:
        yield
    finally:
        MOVEMENT.doing, MOVEMENT.when_still = f"after {doing}", before
        moved()


def in_small_units(doing: str) -> contextlib.AbstractContextManager[None]:
    return work(doing, "end")


def at_length(doing: str) -> contextlib.AbstractContextManager[None]:
    """Within the context, take a time without a limit, also inside work in small units."""
    return work(doing, "warn")


def waiting() -> contextlib.AbstractContextManager[None]:
    return work("waiting for the other processes", "ignore")
