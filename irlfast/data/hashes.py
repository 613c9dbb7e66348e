"""A set of hashes that takes 8 bytes for each: a Python set takes 70, which a million rows would feel."""

from collections.abc import Sequence

import numpy as np

NEWEST = 2**15  # hashes in the small set before they go to the array


class Hashes:
    """A set of 64-bit integers: most are sorted in an array, the newest are in a small set."""

    def __init__(self) -> None:
        self.sorted = np.zeros(0, np.int64)
        self.newest: set[int] = set()

    def known(self, numbers: Sequence[int]) -> set[int]:
        """Return those of ``numbers`` that are in the set."""
        each = np.array(numbers, np.int64)
        is_old = self.sorted.searchsorted(each, "left") < self.sorted.searchsorted(each, "right")
        return self.newest.intersection(numbers).union(each[is_old].tolist())

    def add(self, numbers: Sequence[int]) -> None:
        """Add numbers that are not in the set yet."""
        self.newest.update(numbers)
        if len(self.newest) > NEWEST:
            newest = np.fromiter(self.newest, np.int64, len(self.newest))
            self.sorted = np.concatenate([self.sorted, newest])
            self.sorted.sort(kind="stable")
            self.newest.clear()
