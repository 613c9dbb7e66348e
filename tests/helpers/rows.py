"""Demonstrations of one question, and their token ids."""

from collections import Counter
from typing import Any

from irlfast.config import Config
from irlfast.data.encoding import Encoder, Tally, encode
from irlfast.data.rows import Demonstration
from irlfast.data.sets import collected
from irlfast.data.store import Example


def pair(prompt: str, answer: str, rejected: str | None = None) -> Demonstration:
    """A question with its answer, or answers."""
    answers: Any = (None if text is None else {"role": "assistant", "content": text} for text in (answer, rejected))
    return Demonstration([{"role": "user", "content": prompt}], *answers)


def examples_of(rows: list[Demonstration], encoder: Encoder, config: Config) -> tuple[list[Example], Counter[str]]:
    tally = Tally()
    return collected(encode(rows, encoder, config, tally), None, 0), tally.counts
