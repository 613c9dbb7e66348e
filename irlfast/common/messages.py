"""What a run tells on stderr: lines, and how far a phase is."""

import functools
import sys
import time

from tqdm import tqdm

from irlfast.common import dist


def log(message: str) -> None:
    """Print one line, by one process, without breaking a progress bar."""
    if dist.is_main():
        tqdm.write(message, file=sys.stderr)


@functools.cache
def log_once(message: str) -> None:
    log(message)


class Progress:
    """How far a phase is: a bar where stderr is a terminal, else a line with the time and the figures it is told.

    ``seconds`` must lie between two such lines, but for the last one. The main process alone shows anything.
    """

    def __init__(self, phase: str, total: int | None, unit: str, done: int = 0, seconds: float = 0.0) -> None:
        terminal = sys.stderr.isatty()
        shown = dist.is_main() and terminal
        self.bar = tqdm(total=total, initial=done, desc=phase, unit=unit, disable=not shown)
        self.lines = dist.is_main() and not terminal
        self.phase, self.total, self.unit, self.done, self.seconds = phase, total, unit, done, seconds
        self.told = time.monotonic() if seconds else 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, count: int = 1) -> None:
        self.done += count
        self.bar.update(count)

    def tell(self, metrics: str = "") -> None:
        self.bar.set_postfix_str(metrics, refresh=False)
        now = time.monotonic()
        if self.lines and (now - self.told >= self.seconds or self.done == self.total):
            self.told = now
            whole = "" if self.total is None else f"/{self.total:,}"
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.phase}: {self.unit} {self.done:,}{whole}"
            print(f"{line}, {metrics}" if metrics else line, file=sys.stderr, flush=True)
