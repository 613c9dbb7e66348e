"""Examples in files, mapped into memory by every process; and the rows that they came from.

Token ids are int32, 4 bytes each, where a list of ints takes 36: an ``array("i")``, or a ``memoryview`` of one or of a
mapped file. Both are sequences of ints that compare by value with each other, but never with a list.
"""

import hashlib
import itertools
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from irlfast.common.files import write

TokenIds = array | memoryview  # int32
NONE = array("i")


class Example(NamedTuple):
    """A demonstration as the model sees it."""

    prompt_ids: TokenIds
    answer_ids: TokenIds
    rejected_ids: TokenIds | None = None
    earlier: TokenIds = NONE  # positions in the prompt that hold earlier answers to learn
    row: int = -1  # its place in data/rows.jsonl


def pieces_of(examples: Sequence[Example]) -> list[TokenIds]:
    """The four sequences of every example in turn; a rejected answer that is none has no token."""
    return [ids for x in examples for ids in (x.prompt_ids, x.answer_ids, x.rejected_ids or NONE, x.earlier)]


def examples_of(tokens: memoryview, lengths: Sequence[int], rows: Sequence[int]) -> list[Example]:
    """Examples whose sequences are views of ``tokens``, as long as ``lengths`` says."""
    pieces = (tokens[end - n : end] for n, end in zip(lengths, itertools.accumulate(lengths), strict=True))
    found = zip(*[pieces] * 4, rows, strict=True)
    return [Example(prompt, answer, rejected or None, earlier, row) for prompt, answer, rejected, earlier, row in found]


def save_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write ``tokens``, ``lengths`` and ``rows``, int32, as safetensors."""
    from safetensors.numpy import save_file

    pieces = pieces_of(examples)
    flat = {
        "tokens": np.concatenate([np.asarray(NONE), *pieces]),
        "lengths": np.array([len(piece) for piece in pieces], dtype=np.int32),
        "rows": np.array([example.row for example in examples], dtype=np.int32),
    }
    write(path, lambda temporary: save_file(flat, temporary))


def load_examples(path: Path) -> list[Example]:
    """Examples whose token ids stay in the file: mapped into memory, in pages that all processes share."""
    from safetensors.torch import load_file

    flat = load_file(path)
    return examples_of(flat["tokens"].numpy().data, flat["lengths"].tolist(), flat["rows"].tolist())


def fingerprint(*sets: Sequence[Example]) -> str:
    """A hash of token ids: a run resumes only on the data that it began with."""
    digest = hashlib.sha256()
    for piece in itertools.chain(*map(pieces_of, sets)):
        digest.update(len(piece).to_bytes(4, "little"))
        digest.update(piece)
    return digest.hexdigest()[:16]


class Rows:
    """Rows of a JSON-lines file by their number; the file stays on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts: list[int] | None = None

    def __getitem__(self, number: int) -> dict[str, Any]:
        with self.path.open("rb") as lines:
            if self.starts is None:
                self.starts = [0, *itertools.accumulate(map(len, lines))]
            lines.seek(self.starts[number])
            return json.loads(lines.readline())
