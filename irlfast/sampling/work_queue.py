"""The queue of shards that the workers of a run share, in the store that they meet in.

A worker is a process that samples: by its own model, or by the engine that it leads. It claims a shard when it has
room. So a worker whose answers are long claims fewer, and none waits for another until the queue is empty. A worker
whose engine dies gives its shards back. If the process itself dies, the whole run ends, and its rerun samples what is
missing.
"""

import collections
import itertools
import time
from typing import Protocol

from irlfast.common import ranks
from irlfast.common.files import InputError

NAMES = itertools.count()  # every process makes its queues in the same order
POLL = 0.01  # seconds


class WorkerLost(InputError):
    """Raised when what answers for a worker is gone, so that the other workers take its shards."""


class Counts(Protocol):
    """A store that all workers see."""

    def count(self, name: str, more: int = 0) -> int: ...
    def set(self, name: str, text: str) -> None: ...
    def get(self, name: str) -> str | None: ...


class LocalStore:
    """The store of a run of one process."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.texts: dict[str, str] = {}

    def count(self, name: str, more: int = 0) -> int:
        self.counts[name] += more
        return self.counts[name]

    def set(self, name: str, text: str) -> None:
        self.texts[name] = text

    def get(self, name: str) -> str | None:
        return self.texts.get(name)


class Queue:
    """A worker's view of the shards 0 to ``size`` - 1."""

    def __init__(self, store: Counts, name: str, size: int) -> None:
        self.store, self.name, self.size = store, name, size
        self.mine: set[int] = set()  # claimed by this worker, and not finished
        self.looked_at = 0  # shards that were given back, and that this worker has tried to claim

    def count(self, what: str, more: int = 0) -> int:
        return self.store.count(f"{self.name}/{what}", more)

    def claim(self) -> int | None:
        """Claim the next shard for this worker; return None if there is none to claim now."""
        number = self.next_returned()
        if number is None and self.count("claimed") < self.size:
            number = self.count("claimed", 1) - 1
        if number is None or number >= self.size:
            return None
        self.mine.add(number)
        return number

    def has_more(self) -> bool:
        """Return whether there seems to be a shard to claim: another worker may be faster."""
        return self.count("claimed") < self.size or self.looked_at < self.count("returned")

    def next_returned(self) -> int | None:
        while self.looked_at < self.count("returned"):
            place = f"returned/{self.looked_at}"
            self.looked_at += 1
            if self.count(f"{place}/claims", 1) == 1:  # this worker is the first
                while (text := self.store.get(f"{self.name}/{place}")) is None:
                    time.sleep(POLL)  # the worker that gives it back has not written its number yet
                return int(text)
        return None

    def finish(self, number: int) -> None:
        self.mine.remove(number)
        self.count("finished", 1)

    def give_back(self) -> None:
        """Give back what this worker has claimed and not finished."""
        for number in sorted(self.mine):
            place = self.count("returned", 1) - 1
            self.store.set(f"{self.name}/returned/{place}", str(number))
        self.mine.clear()

    def finished(self) -> int:
        """Return how many shards are finished, by any worker."""
        return self.count("finished")

    def leave(self) -> int:
        """Take no more shards. Return how many workers have left."""
        return self.count("left", 1)


def new_queue(size: int) -> Queue:
    """Return a queue of ``size`` shards. Every process of the run calls this, also one that does not sample."""
    return Queue(ranks.STORE or LocalStore(), f"queue/{next(NAMES)}", size)
