"""The log of a run: metrics.jsonl, and TensorBoard or W&B beside it where ``report_to`` asks for them."""

import json
import sys
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
