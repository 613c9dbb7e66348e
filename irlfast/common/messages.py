"""The messages of a run on stderr: lines, and the progress of a phase."""

import functools
import sys
import time

from tqdm import tqdm

from irlfast.common import dist


def log(message: str) -> None:
    """Print one line from the main process, without breaking a progress bar."""
    if dist.is_main():
        tqdm.write(message, file=sys.stderr)


@functools.cache
def log_once(message: str) -> None:
    log(message)


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message, on one line."""
    return " ".join(str(error).split()).split(". ")[0]


class Progress:
    """The progress of a phase: a bar on a terminal, otherwise lines with the time and the metrics.

    Two lines are at least ``seconds`` apart, except the last one. Only the main process shows anything.
    """

    def __init__(self, phase: str, total: int | None, unit: str, done: int = 0, seconds: float = 0.0) -> None:
        is_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=phase, unit=unit, disable=not (dist.is_main() and is_terminal))
        self.prints_lines = dist.is_main() and not is_terminal
        self.phase, self.total, self.unit, self.done, self.seconds = phase, total, unit, done, seconds
        self.last_line = time.monotonic() if seconds else 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, count: int = 1) -> None:
        self.done += count
        self.bar.update(count)

    def show(self, metrics: str = "") -> None:
        self.bar.set_postfix_str(metrics, refresh=False)
        now = time.monotonic()
        if self.prints_lines and (now - self.last_line >= self.seconds or self.done == self.total):
            self.last_line = now
            total = "" if self.total is None else f"/{self.total:,}"
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.phase}: {self.unit} {self.done:,}{total}"
            print(f"{line}, {metrics}" if metrics else line, file=sys.stderr, flush=True)
