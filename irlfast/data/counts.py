"""Counts of the rows of a source, which grow while rows are read, and of a set, which grow while rows are encoded.

A run prints them, and writes the first rows that were left out to ``data/dropped.jsonl``.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 5  # dropped rows kept as examples for each reason
MOST_DROPPED = 100  # dropped rows that a set keeps as examples
ENCODING_COUNTS = (
    "rows",
    "kept",
    "empty_answers",
    "duplicates",
    "cut_prompts",
    "cut_answers",
    "cut_at_end_token",
    "too_long",
)
KEPT = ("rows", "kept", "prompt_tokens", "answer_tokens", "tokenised_apart")  # counts that are no losses


@dataclass
class SourceCounts:
    """Counts of one source, which grow while its rows are read."""

    name: str
    rows: int = 0
    conventions: Counter[str] = field(default_factory=Counter)  # rows read by each convention
    ignored: Counter[str] = field(default_factory=Counter)  # columns with a value that the convention does not use
    left_out: Counter[str] = field(default_factory=Counter)  # rows left out, by reason
    notes: Counter[str] = field(default_factory=Counter)  # changes, such as "lone surrogates replaced"
    dropped: list[dict[str, Any]] = field(default_factory=list)  # examples of rows left out

    def leave_out(self, where: str, reason: str, message: str, row: Any) -> None:
        """Count a row under a reason, and keep the first rows of each reason as examples."""
        self.left_out[reason] += 1
        if self.left_out[reason] <= EXAMPLES:
            self.dropped.append({"where": where, "reason": message, "row": row})


@dataclass
class SetCounts:
    """Counts of the training set or the held-out set, which grow while its rows are encoded."""

    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(ENCODING_COUNTS, 0)))
    remarks: Counter[str] = field(default_factory=Counter)  # a sentence, and the number of rows that it holds for
    dropped: list[dict[str, Any]] = field(default_factory=list)  # examples of rows left out

    def leave_out(self, where: str, reason: str, row: Any) -> None:
        """Count a row under a reason, and keep the first rows left out as examples."""
        self.counts[reason] += 1
        if len(self.dropped) < MOST_DROPPED:
            self.dropped.append({"where": where, "reason": reason, "row": row})


def describe_source(source: SourceCounts) -> str:
    """Return one line: ``train.jsonl: 812 rows read as messages; columns ignored: id; left out: 3 …``."""
    several = len(source.conventions) > 1
    read_as = [f"{name} ({count:,})" if several else name for name, count in source.conventions.items()]
    rows = f"{source.rows:,} row{'s' * (source.rows != 1)} read"
    parts = [f"{rows} as {', '.join(read_as)}" if read_as else rows]
    if source.ignored:
        parts.append("columns ignored: " + ", ".join(source.ignored))
    if source.left_out:
        parts.append("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in source.left_out.items()))
    parts += [f"{note}: {count:,}" for note, count in source.notes.items()]
    return f"{source.name}: " + "; ".join(parts)


def describe_set(label: str, tally: SetCounts) -> list[str]:
    """Return lines of what is kept, cut and left out, such as ``held out: 40 of 42 rows, … (2 duplicates)``."""
    counts = tally.counts
    losses = [f"{counts[key]:,} {key.replace('_', ' ')}" for key in counts if key not in KEPT and counts[key]]
    first = (
        f"{label}: {counts['kept']:,} of {counts['rows']:,} rows, {counts['prompt_tokens']:,} prompt tokens, "
        f"{counts['answer_tokens']:,} answer tokens" + (f" ({', '.join(losses)})" if losses else "")
    )
    doubts = []
    if 0 < counts["kept"] <= counts["cut_answers"]:
        doubts.append(f"warning: {label}: every answer was cut; is max_length too low?")
    if 0 < counts["kept"] == counts["answer_tokens"]:
        doubts.append(f"warning: {label}: every answer is a single token")
    remarks = [f"{label}: {count:,} {remark}" for remark, count in tally.remarks.items() if count]
    return [first, *remarks, *doubts]


def dropped_rows(sources: list[SourceCounts]) -> Iterator[dict[str, Any]]:
    """Return the lines of ``data/dropped.jsonl``: source, place, reason and row, with values that JSON can hold."""
    for source in sources:
        for row in source.dropped:
            yield {"source": source.name, **json.loads(json.dumps(row, default=str))}
