"""Files of examples, which every process maps into memory, and the file of the rows behind them.

Token ids are int32, 4 bytes per token; a list of ints takes 36. They are an ``array("i")``, or a ``memoryview`` of an
array or of a mapped file. Both are sequences of ints that compare by value with each other, but never with a list.
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
EMPTY = array("i")


class Example(NamedTuple):
    """A demonstration as the model sees it."""

    prompt_ids: TokenIds
    answer_ids: TokenIds
    rejected_ids: TokenIds | None = None
    earlier: TokenIds = EMPTY  # positions in the prompt that hold earlier answers to learn
    row: int = -1  # the number of the row in data/rows.jsonl


def sequences_of(examples: Sequence[Example]) -> list[TokenIds]:
    """Return the four sequences of every example in turn; a missing rejected answer is an empty sequence."""
    return [ids for x in examples for ids in (x.prompt_ids, x.answer_ids, x.rejected_ids or EMPTY, x.earlier)]


def make_examples(tokens: memoryview, lengths: Sequence[int], rows: Sequence[int]) -> list[Example]:
    """Cut ``tokens`` into views of the given ``lengths``, and make an example of every four views and a row."""
    views = [tokens[end - n : end] for n, end in zip(lengths, itertools.accumulate(lengths), strict=True)]
    examples = []
    for number, row in enumerate(rows):
        prompt, answer, rejected, earlier = views[4 * number : 4 * number + 4]
        examples.append(Example(prompt, answer, rejected or None, earlier, row))
    return examples


def save_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write ``tokens``, ``lengths`` and ``rows``, int32, as safetensors."""
    from safetensors.numpy import save_file

    sequences = sequences_of(examples)
    flat = {
        "tokens": np.concatenate([np.asarray(EMPTY), *sequences]),
        "lengths": np.array([len(ids) for ids in sequences], dtype=np.int32),
        "rows": np.array([example.row for example in examples], dtype=np.int32),
    }
    write(path, lambda temporary: save_file(flat, temporary))


def load_examples(path: Path) -> list[Example]:
    """Load examples whose token ids stay in the file, which is mapped into memory pages that all processes share."""
    from safetensors.torch import load_file

    flat = load_file(path)
    return make_examples(flat["tokens"].numpy().data, flat["lengths"].tolist(), flat["rows"].tolist())


def fingerprint(*sets: Sequence[Example]) -> str:
    """Hash the token ids of the sets: a run resumes only on the data that it began with."""
    digest = hashlib.sha256()
    for ids in itertools.chain(*map(sequences_of, sets)):
        digest.update(len(ids).to_bytes(4, "little"))
        digest.update(ids)
    return digest.hexdigest()[:16]


class Rows:
    """Read rows of a JSON-lines file by their number; the file stays on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts: list[int] | None = None

    def __getitem__(self, number: int) -> dict[str, Any]:
        with self.path.open("rb") as lines:
            if self.starts is None:
                self.starts = [0, *itertools.accumulate(map(len, lines))]
            lines.seek(self.starts[number])
            return json.loads(lines.readline())
