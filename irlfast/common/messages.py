"""The messages of a run on stderr: lines, and the progress of a phase."""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.common.movement import moved
from irlfast.common.printable import printable, write_line
from irlfast.common.time_left import CLOCK, duration


def log(message: str) -> None:
    """Print one line from the main process. A progress display stays below it."""
    if dist.is_main():
        write_line(printable(message))


@functools.cache
def log_once(message: str) -> None:
    log(message)


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message, on one line."""
    return " ".join(str(error).split()).split(". ")[0]


@contextlib.contextmanager
def explain_errors(what: str) -> Iterator[None]:
    """Turn any error of a library that reads a foreign file into an InputError: ``what``, and the error's reason.

    A damaged file makes Transformers, PEFT and others raise errors of any class.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} ({first_sentence(error) or type(error).__name__})") from error


class Progress:
    """The progress of a phase: a live display on a terminal, otherwise lines with the time and the metrics.

    Both tell about how long the whole run will still take. Two lines are at least ``seconds`` apart, except the last
    one. Only the main process shows anything.
    """

    def __init__(self, phase: str, total: int | None, unit: str, done: int = 0, seconds: float = 0.0) -> None:
        self.phase, self.total, self.unit, self.seconds = printable(phase), total, unit, seconds
        self.done = self.first = done
        self.metrics = ""
        self.begun = self.last_line = time.monotonic()
        if not seconds:
            self.last_line = 0.0
        console = Console(stderr=True, highlight=False)
        is_terminal = sys.stderr.isatty() and not console.is_dumb_terminal
        self.prints_lines = dist.is_main() and not is_terminal
        self.live: Live | None = None
        if dist.is_main() and is_terminal:
            self.live = Live(self, console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
            self.print_line()

    def advance(self, count: int = 1) -> None:
        self.done += count
        moved()

    def show(self, metrics: str = "") -> None:
        self.metrics = metrics
        now = time.monotonic()
        if self.prints_lines and (now - self.last_line >= self.seconds or self.done == self.total):
            self.last_line = now
            self.print_line()

    def print_line(self) -> None:
        parts = [f"{self.phase}: {self.unit} {self.count()}", self.metrics, self.time_left()]
        line = ", ".join(filter(None, parts))
        write_line(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    def count(self) -> str:
        return f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"

    def time_left(self) -> str:
        """Return words for the time until the whole run ends; none where it is not known."""
        seconds = CLOCK.left()
        return f"about {duration(seconds)} left in the whole run" if seconds else ""

    def __rich__(self) -> Group:
        """Draw the live display: the phase with its bar, its metrics, and the times left."""
        passed, done = time.monotonic() - self.begun, self.done - self.first
        times = [f"{duration(passed)} in this phase"]
        if self.total and done:
            times = [f"about {duration(passed / done * (self.total - self.done))} left in this phase"]
        whole = self.time_left()
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self.total, completed=self.done, width=32)
        head.add_row(Text(self.phase, style="bold"), bar, Text(f"{self.unit} {self.count()}"))
        times += [whole] if whole else []
        return Group(head, Text(self.metrics), Text(", ".join(times), style="dim"))
