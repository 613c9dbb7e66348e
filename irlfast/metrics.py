"""The log of a run: metrics.jsonl, and TensorBoard or W&B beside it where ``report_to`` asks for them."""

import functools
import json
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from tqdm import tqdm

from irlfast import dist
from irlfast.config import Config
from irlfast.files import read_jsonl, write_jsonl


def say(message: str) -> None:
    """Print one line, by one process, without breaking a progress bar."""
    if dist.is_main():
        tqdm.write(message, file=sys.stderr)


@functools.cache
def say_once(message: str) -> None:
    say(message)


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

    def tell(self, figures: str = "") -> None:
        self.bar.set_postfix_str(figures, refresh=False)
        now = time.monotonic()
        if self.lines and (now - self.told >= self.seconds or self.done == self.total):
            self.told = now
            whole = "" if self.total is None else f"/{self.total:,}"
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.phase}: {self.unit} {self.done:,}{whole}"
            print(f"{line}, {figures}" if figures else line, file=sys.stderr, flush=True)


class Log:
    """Writes rows of figures. Only the main process's writes anything."""

    def __init__(self, output: Path, config: Config) -> None:
        self.path = output / "metrics.jsonl"
        self.steps = 0  # over all phases: the x-axis of TensorBoard and W&B
        self.tensorboard: Any = None
        self.wandb: Any = None
        if not dist.is_main():
            return
        if "tensorboard" in config.report_to:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(output / "tensorboard"))
        if "wandb" in config.report_to:
            import wandb

            # The same id on every start, so that a resumed run goes on in its own curves.
            own = f"{output.name}-{zlib.crc32(str(output.resolve()).encode()):08x}"
            self.wandb = wandb.init(project="irlfast", name=output.name, id=own, resume="allow", dir=str(output))

    def begin(self, phase: str, step: int) -> None:
        """A phase starts after ``step``: rows that a killed run wrote beyond its last checkpoint go."""
        if dist.is_main() and self.path.exists():
            rows = [row for _, row in read_jsonl(self.path) if row["phase"] != phase or row["step"] <= step]
            write_jsonl(self.path, rows)
            self.steps = len({(row["phase"], row["step"]) for row in rows})

    def write(self, row: dict[str, Any]) -> None:
        if not dist.is_main():
            return
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        self.steps += 1
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, self.steps)
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log(numbers, step=self.steps)
