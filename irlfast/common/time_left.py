"""The time left for a whole run, estimated from the speeds that this process has measured so far."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A part of a run. Parts of one kind take about equally long per unit of work."""

    name: str
    kind: str
    work: float  # answers to sample and score, or sequences to train on


class Speed(NamedTuple):
    seconds: float
    work: float  # that took these seconds


def seconds_left(parts: Sequence[Part], done: Sequence[float], speeds: Mapping[str, Speed]) -> float | None:
    """Estimate the seconds that the rest of all parts takes; None before any speed is measured.

    ``done`` is the work that is done of each part. A kind without a speed is taken to have the mean of the others.
    """
    total = sum(speed.work for speed in speeds.values())
    if not total:
        return None
    mean = Speed(sum(speed.seconds for speed in speeds.values()), total)
    left = 0.0
    for part, work in zip(parts, done, strict=True):
        speed = speeds.get(part.kind, mean)
        left += max(0.0, part.work - work) * speed.seconds / speed.work
    return left


class Clock:
    """Follows this process's run through its parts, which are in order, and measures the speed of each kind.

    A part that trains comes after a part that samples and scores its answers. Its first step compiles on a GPU, so that
    this step counts only until there is another.
    """

    def __init__(self) -> None:
        self.plan([], 0)

    def plan(self, parts: Sequence[Part], at: int) -> None:
        """Begin a run of these parts at the part number ``at``: the parts before it are done already."""
        self.parts = parts
        self.speeds: dict[str, Speed] = {}
        self.begin(at, 0.0)

    def begin(self, at: int, done: float) -> None:
        self.at, self.begun, self.done = at, done, done
        self.since = self.reported = time.monotonic()
        self.warming_up = True

    def answer(self, count: float) -> None:
        """Count answers that were sampled."""
        self.done += count

    def train(self, name: str, share: float) -> None:
        """Note that the part ``name`` is trained up to ``share``. All parts before it are done then."""
        index = next((i for i, part in enumerate(self.parts) if i >= self.at and part.name == name), None)
        if index is None:  # no part of the plan: the step of SFT that a dry run measures
            return
        work = share * self.parts[index].work
        if index > self.at or work < self.done:  # a new part, or the same one again after it ran out of memory
            if index == self.at + 1:
                self.done = self.parts[self.at].work
            self.speeds = self.measured()
            self.begin(index, work)
        elif self.warming_up and self.done > self.begun:
            self.since, self.begun, self.warming_up = self.reported, self.done, False
        self.done, self.reported = work, time.monotonic()

    def finish(self) -> None:
        """Go on to the next part; the present one may have ended early."""
        self.speeds = self.measured()
        self.begin(self.at + 1, 0.0)

    def measured(self) -> dict[str, Speed]:
        """Return the speed of each kind so far, with the present part."""
        work = self.done - self.begun
        if self.at >= len(self.parts) or work <= 0:
            return self.speeds
        kind = self.parts[self.at].kind
        before = self.speeds.get(kind, Speed(0.0, 0.0))
        return self.speeds | {kind: Speed(before.seconds + time.monotonic() - self.since, before.work + work)}

    def left(self) -> float | None:
        """Estimate the seconds until the run ends; None where nothing is planned or measured."""
        done = [part.work if i < self.at else 0.0 for i, part in enumerate(self.parts)]
        if self.at < len(done):
            done[self.at] = self.done or self.guess()
        return seconds_left(self.parts, done, self.measured())

    def guess(self) -> float:
        """Return the work that the present part has probably done, by the speed of earlier parts of its kind."""
        speed = self.speeds.get(self.parts[self.at].kind)
        return (time.monotonic() - self.since) * speed.work / speed.seconds if speed and speed.seconds else 0.0


CLOCK = Clock()  # of the run of this process


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
