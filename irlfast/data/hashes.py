"""A set of hashes that takes 8 bytes for each: a Python set takes 70, which a million rows would feel."""

from array import array
from bisect import bisect_left

import numpy as np

NEWEST = 2**15  # hashes in the small set before they go to the array


class Hashes:
    """A set of 64-bit integers: most are sorted in an array, the newest are in a small set."""

    def __init__(self) -> None:
        self.sorted = array("q")
        self.newest: set[int] = set()

    def __contains__(self, number: int) -> bool:
        if number in self.newest:
            return True
        place = bisect_left(self.sorted, number)
        return place < len(self.sorted) and self.sorted[place] == number

    def add(self, number: int) -> None:
        self.newest.add(number)
        if len(self.newest) > NEWEST:
            both = np.concatenate([np.frombuffer(self.sorted, np.int64), np.fromiter(self.newest, np.int64)])
            both.sort(kind="stable")
            self.sorted = array("q", both.tobytes())
            self.newest.clear()
