"""Helpers that make demonstrations of one question, and their examples."""

from collections import Counter
from typing import Any

from irlfast.config import Config
from irlfast.data.counts import SetCounts
from irlfast.data.encoding import Encoder, encode
from irlfast.data.rows import Demonstration
from irlfast.data.sets import collect_examples
from irlfast.data.store import Examples


def pair(prompt: str, answer: str, rejected: str | None = None) -> Demonstration:
    """Return a question with its answer, and perhaps a rejected answer."""
    answers: Any = (None if text is None else {"role": "assistant", "content": text} for text in (answer, rejected))
    return Demonstration([{"role": "user", "content": prompt}], *answers)


def examples_of(rows: list[Demonstration], encoder: Encoder, config: Config) -> tuple[Examples, Counter[str]]:
    counts = SetCounts()
    return collect_examples(encode(rows, encoder, config, counts), None, 0), counts.counts
