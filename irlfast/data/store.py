"""Examples as views of one array of token ids, their files, which every process maps into memory, and their rows.

Token ids are int32, 4 bytes per token; a list of ints takes 36. They are an ``array("i")``, or a ``memoryview`` of an
array or of a mapped file. Both are sequences of ints that compare by value with each other, but never with a list.
"""

import bisect
import itertools
import json
import mmap
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

from irlfast.common.files import check_written

TokenIds = array | memoryview  # int32
EMPTY = array("i")
CHUNK = 1024  # examples that are made or written together
T = TypeVar("T")


class Example(NamedTuple):
    """A demonstration as the model sees it."""

    prompt_ids: TokenIds
    answer_ids: TokenIds
    rejected_ids: TokenIds | None = None
    earlier: TokenIds = EMPTY  # positions in the prompt that hold earlier answers to learn
    row: int = -1  # the number of the row in data/rows.jsonl


class Examples(Sequence[Example]):
    """Examples whose sequences lie in one array, one after the other. Each example is made when it is asked for.

    A slice, or an array of numbers or of truth values, selects examples without a copy of their token ids.
    """

    def __init__(self, tokens: memoryview, starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> None:
        self.tokens = tokens  # int32
        self.starts = starts  # [n] int64, where each example begins in ``tokens``
        self.lengths = lengths  # [n, 4] int32, of its prompt, answer, rejected answer and ``earlier``
        self.rows = rows  # [n] int32

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, which: int) -> Example: ...
    @overload
    def __getitem__(self, which: slice | np.ndarray) -> "Examples": ...
    def __getitem__(self, which: int | slice | np.ndarray) -> "Example | Examples":
        if isinstance(which, slice | np.ndarray):
            return Examples(self.tokens, self.starts[which], self.lengths[which], self.rows[which])
        return view(self.tokens, int(self.starts[which]), self.lengths[which].tolist(), int(self.rows[which]))

    def __iter__(self) -> Iterator[Example]:
        for part in self.chunks():
            for start, lengths, row in zip(
                part.starts.tolist(), part.lengths.tolist(), part.rows.tolist(), strict=True
            ):
                yield view(self.tokens, start, lengths, row)

    def chunks(self) -> Iterator["Examples"]:
        """Return parts of the examples. The pages of a mapped file that a part has read leave the memory after it."""
        for first in range(0, len(self), CHUNK):
            yield self[first : first + CHUNK]
            if isinstance(self.tokens.obj, mmap.mmap):
                self.tokens.obj.madvise(mmap.MADV_DONTNEED)

    def sequences(self) -> list[memoryview]:
        """Return all four sequences of each example as one view."""
        bounds = zip(self.starts.tolist(), (self.starts + self.lengths.sum(1)).tolist(), strict=True)
        return [self.tokens[start:end] for start, end in bounds]


def view(tokens: memoryview, start: int, lengths: Sequence[int], row: int) -> Example:
    """Make the example whose sequences, of these lengths, begin at ``start``. An empty rejected answer is none."""
    answer = start + lengths[0]
    rejected = answer + lengths[1]
    earlier = rejected + lengths[2]
    return Example(
        tokens[start:answer],
        tokens[answer:rejected],
        tokens[rejected:earlier] or None,
        tokens[earlier : earlier + lengths[3]],
        row,
    )


def make_examples(tokens: memoryview, lengths: np.ndarray, rows: np.ndarray) -> Examples:
    """Make examples that follow each other in ``tokens``; ``lengths`` has those of four sequences per example."""
    each = lengths.reshape(-1, 4)
    totals = each.sum(1, dtype=np.int64)
    return Examples(tokens, totals.cumsum() - totals, each, rows)


NONE = make_examples(memoryview(EMPTY), np.zeros(0, np.int32), np.zeros(0, np.int32))


class Mapped(Sequence[T]):
    """``make`` of the items at the same place in sequences of the same length, made each time that it is asked for."""

    def __init__(self, make: Callable[..., T], *sequences: Sequence[Any] | np.ndarray) -> None:
        lengths = [*map(len, sequences)]
        if min(lengths) < max(lengths):
            raise ValueError(f"sequences: found the lengths {lengths}, expected the same")
        self.make, self.sequences = make, sequences

    def __len__(self) -> int:
        return len(self.sequences[0])

    @overload
    def __getitem__(self, which: int) -> T: ...
    @overload
    def __getitem__(self, which: slice) -> "Mapped[T]": ...
    def __getitem__(self, which: int | slice) -> "T | Mapped[T]":
        if isinstance(which, slice):
            return Mapped(self.make, *(each[which] for each in self.sequences))
        return self.make(*[each[which] for each in self.sequences])

    def __iter__(self) -> Iterator[T]:
        return map(self.make, *self.sequences)


def where(conditions: Iterable[bool]) -> array:
    """Return the places of the conditions that hold, int32."""
    return array("i", (place for place, holds in enumerate(conditions) if holds))


def cut(values: Any, lengths: np.ndarray) -> Mapped:
    """Return views of ``values``, an array or a sequence, with these ``lengths`` [n], one after the other."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    lengths.cumsum(out=offsets[1:])
    return Mapped(lambda start, end: values[start:end], offsets[:-1], offsets[1:])


def joined(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """Return the items of several sequences, those of the first one first."""
    ends = [*itertools.accumulate(map(len, parts))]

    def item(number: int) -> T:
        part = bisect.bisect_right(ends, number)
        return parts[part][number - ends[part]]  # counted from the part's end

    return Mapped(item, range(ends[-1])) if len(parts) > 1 else parts[0]


# ---------------------------------------------------------------- files


def save_examples(path: Path, examples: Examples) -> None:
    """Write ``lengths``, ``rows`` and ``tokens``, int32, as safetensors; memory holds few of the tokens at a time."""
    lengths, rows = (np.ascontiguousarray(each, dtype="<i4") for each in (examples.lengths, examples.rows))
    sizes = {"lengths": lengths.size, "rows": rows.size, "tokens": int(lengths.sum(dtype=np.int64))}
    ends = [4 * end for end in itertools.accumulate(sizes.values())]
    header = {
        name: {"dtype": "I32", "shape": [size], "data_offsets": [end - 4 * size, end]}
        for (name, size), end in zip(sizes.items(), ends, strict=True)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(lengths.data)
        file.write(rows.data)
        for part in examples.chunks():
            file.write(b"".join(part.sequences()))
    check_written(path, 8 + len(text) + ends[-1])


def load_examples(path: Path) -> Examples:
    """Load examples whose token ids stay in the file, which is mapped into memory pages that all processes share."""
    from safetensors.torch import load_file

    flat = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    return make_examples(flat["tokens"].data, flat["lengths"], flat["rows"])


class Rows:
    """Read rows of a JSON-lines file by their number; the file stays on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts: array | None = None

    def __getitem__(self, number: int) -> dict[str, Any]:
        with self.path.open("rb") as lines:
            if self.starts is None:
                self.starts = array("q", itertools.accumulate(map(len, lines), initial=0))
            lines.seek(self.starts[number])
            return json.loads(lines.readline())
