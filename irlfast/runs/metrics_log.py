"""Metrics of a run: metrics.jsonl, and the trackers that ``report_to`` names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irlfast.common import dist
from irlfast.common.logs import append_row, mend, read_log, rewrite
from irlfast.common.messages import first_sentence, log
from irlfast.config import Config
from irlfast.runs.trackers import Tracker, start_trackers

SAMPLES = 8  # held-out prompts whose answers are shown
SAMPLE_COLUMNS = ("prompt", "expert", "answer")


class MetricsLog:
    """Writes rows of metrics. Only the main process writes anything.

    The x-axis of trackers counts the optimiser steps of the whole run. A curve is named by the kind of its phase:
    ``sft/loss``, ``reward/loss``, ``irft/loss`` (or the run's other method), and ``eval/nll`` for held-out data.
    """

    def __init__(self, output: Path, config: Config) -> None:
        self.path = output / "metrics.jsonl"
        self.method = config.method
        self.trackers: list[Tracker] = []
        self.known: dict[str, dict[str, float]] = {}  # phase -> metrics that all its rows have
        self.earlier_steps = 0  # optimiser steps of the phases before the present one
        self.step = 0  # optimiser steps of the run until the last row
        if dist.is_main():
            self.step = self.earlier_steps = count_steps(mend(self.path, is_logged))
            self.trackers = start_trackers(output, config)

    def start_phase(self, phase: str, step: int) -> list[dict[str, Any]]:
        """Start a phase, or resume it after ``step``. Return its rows so far; the main process alone may call this.

        Rows that a killed run wrote after its last checkpoint are deleted.
        """
        rows = mend(self.path, is_logged)
        kept = [row for row in rows if row["phase"] != phase or row["step"] <= step]
        if len(kept) < len(rows):
            rewrite(self.path, kept)
        self.earlier_steps = count_steps([row for row in kept if row["phase"] != phase])
        self.step = self.earlier_steps + step
        self.tell("go_back", self.step)
        return [row for row in kept if row["phase"] == phase]

    def rows(self, phase: str) -> list[dict[str, Any]]:
        """Return the rows of a phase."""
        return [row for row in read_log(self.path, is_logged)[0] if row["phase"] == phase]

    def write(self, row: dict[str, Any]) -> None:
        """Append a row of metrics, which has its ``phase`` and ``step``, with what is ``known`` of the phase."""
        if not dist.is_main():
            return
        row = row | self.known.get(row["phase"], {})
        append_row(self.path, row)
        self.step = self.earlier_steps + row["step"]
        metrics = {name: value for name, value in row.items() if name not in ("step", "stage")}
        self.track(kind_of(row["phase"], self.method), metrics)

    def write_held_out(
        self, metrics: dict[str, Any], answers: Sequence[dict[str, str]] = (), kind: str = "eval"
    ) -> None:
        """Show held-out metrics, and a few of the policy's answers beside the expert's, after the last logged step."""
        self.track(kind, metrics)
        rows = [[row[name] for name in SAMPLE_COLUMNS] for row in answers[:SAMPLES]]
        if rows:
            self.tell("show", [SAMPLE_COLUMNS, *rows], self.step)

    def track(self, kind: str, metrics: dict[str, Any]) -> None:
        """Send the numbers among ``metrics`` to the trackers, at the last logged step."""
        numbers = {f"{kind}/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
        self.tell("log", numbers, self.step)

    def tell(self, function: str, *arguments: Any) -> None:
        """Call a function of every tracker. A tracker that fails is told no more: no run ends for the sake of one."""
        for tracker in [*self.trackers]:
            try:
                getattr(tracker, function)(*arguments)
            except Exception as error:  # whatever its package raises
                self.trackers.remove(tracker)
                log(f"warning: {tracker.name} gets no more metrics, as it failed ({first_sentence(error)})")


def kind_of(phase: str, method: str) -> str:
    """Return ``sft`` for a phase of SFT, ``reward`` for one of a reward model, else the method."""
    last = phase.rpartition("/")[2].partition("-")[0]  # sft-nll is SFT's, and reward-01 a reward's
    return last if last in ("sft", "reward") else method


def is_logged(row: dict[str, Any]) -> bool:
    """Return whether a row of metrics.jsonl has what every row has."""
    return isinstance(row.get("phase"), str) and type(row.get("step")) is int


def count_steps(rows: list[dict[str, Any]]) -> int:
    """Return the sum of the last steps of all phases."""
    return sum({row["phase"]: row["step"] for row in rows}.values())
