"""An account of a source: the line that a run prints, and the rows left out, for ``data/dropped.jsonl``."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 5  # rows kept of each reason for leaving rows out


@dataclass
class Reading:
    """Counts of one source, which grow while its rows are read."""

    name: str
    rows: int = 0
    conventions: Counter[str] = field(default_factory=Counter)  # rows read as each
    ignored: Counter[str] = field(default_factory=Counter)  # columns with a value that the convention does not use
    left_out: Counter[str] = field(default_factory=Counter)  # rows, by reason
    notes: Counter[str] = field(default_factory=Counter)  # what was changed, as "lone surrogates replaced"
    dropped: list[dict[str, Any]] = field(default_factory=list)

    def leave_out(self, where: str, reason: str, message: str, row: Any) -> None:
        """Count a row under a reason, and keep the first rows of each as examples."""
        self.left_out[reason] += 1
        if self.left_out[reason] <= EXAMPLES:
            self.dropped.append({"where": where, "reason": message, "row": row})


def describe(reading: Reading) -> str:
    """One line, as ``train.jsonl: 812 rows read as messages; columns ignored: id; left out: 3 with label false``."""
    several = len(reading.conventions) > 1
    read_as = [f"{name} ({count:,})" if several else name for name, count in reading.conventions.items()]
    rows = f"{reading.rows:,} row{'s' * (reading.rows != 1)} read"
    parts = [f"{rows} as {', '.join(read_as)}" if read_as else rows]
    if reading.ignored:
        parts.append("columns ignored: " + ", ".join(reading.ignored))
    if reading.left_out:
        parts.append("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in reading.left_out.items()))
    parts += [f"{note}: {count:,}" for note, count in reading.notes.items()]
    return f"{reading.name}: " + "; ".join(parts)


def dropped_rows(readings: list[Reading]) -> Iterator[dict[str, Any]]:
    """Rows for ``data/dropped.jsonl``: source, place, reason and the row, with nothing that JSON cannot hold."""
    for reading in readings:
        for row in reading.dropped:
            yield {"source": reading.name, **json.loads(json.dumps(row, default=str))}
