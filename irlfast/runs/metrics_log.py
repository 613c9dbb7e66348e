"""Metrics of a run: metrics.jsonl, and TensorBoard or W&B as well where ``report_to`` asks for them."""

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irlfast.common import dist
from irlfast.common.files import InputError, read_jsonl, write_jsonl
from irlfast.config import Config, dump

STEP = "global_step"  # the name that Transformers gives W&B's x-axis
SAMPLES = 8  # held-out prompts whose answers are shown
SAMPLE_COLUMNS = ("prompt", "expert", "answer")


class MetricsLog:
    """Writes rows of metrics. Only the main process writes anything.

    The x-axis of TensorBoard and W&B counts the optimiser steps of the whole run. A curve is named by the kind of its
    phase: ``sft/loss``, ``reward/loss``, ``irft/loss`` (or the run's other method), and ``eval/nll`` for held-out data.
    """

    def __init__(self, output: Path, config: Config) -> None:
        self.path = output / "metrics.jsonl"
        self.method = config.method
        self.earlier_steps = count_steps(self.read())  # optimiser steps of the phases before the present one
        self.step = self.earlier_steps  # optimiser steps of the run until the last row
        self.tensorboard: Any = None
        self.wandb: Any = None
        if not dist.is_main():
            return
        if "tensorboard" in config.report_to:
            from torch.utils.tensorboard import SummaryWriter

            self.open_writer = functools.partial(SummaryWriter, str(output / "tensorboard"))
            self.tensorboard = self.open_writer()
            self.tensorboard.add_text("config", f"```yaml\n{dump(config)}```", 0)
        if "wandb" in config.report_to:
            self.wandb = start_wandb(output, config)

    def read(self) -> list[dict[str, Any]]:
        return [row for _, row in read_jsonl(self.path)] if self.path.exists() else []

    def start_phase(self, phase: str, step: int) -> None:
        """Start a phase, or resume it after ``step``: delete rows that a killed run wrote after its last checkpoint."""
        if not dist.is_main():
            return
        if self.path.exists():
            write_jsonl(self.path, [row for row in self.read() if row["phase"] != phase or row["step"] <= step])
        self.earlier_steps = count_steps([row for row in self.read() if row["phase"] != phase])
        self.step = self.earlier_steps + step
        if self.tensorboard:
            self.tensorboard.close()
            self.tensorboard = self.open_writer(purge_step=self.step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row of metrics, which has its ``phase`` and ``step``."""
        if not dist.is_main():
            return
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        self.step = self.earlier_steps + row["step"]
        last = row["phase"].rpartition("/")[2].partition("-")[0]  # sft-nll is SFT's, and reward-01 a reward's
        kind = last if last in ("sft", "reward") else self.method
        self.track(kind, {name: value for name, value in row.items() if name not in ("step", "stage")})

    def write_held_out(
        self, metrics: dict[str, Any], answers: Sequence[dict[str, str]] = (), kind: str = "eval"
    ) -> None:
        """Show held-out metrics, and a few of the policy's answers beside the expert's, after the last logged step."""
        self.track(kind, metrics)
        rows = [[row[name] for name in SAMPLE_COLUMNS] for row in answers[:SAMPLES]]
        if self.tensorboard and rows:
            self.tensorboard.add_text("eval/samples", markdown_table(SAMPLE_COLUMNS, rows), self.step)
            self.tensorboard.flush()
        if self.wandb and rows:
            import wandb

            table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows)
            self.wandb.log({"eval/samples": table, STEP: self.step})

    def track(self, kind: str, metrics: dict[str, Any]) -> None:
        """Send the numbers among ``metrics`` to TensorBoard and W&B, at the last logged step."""
        numbers = {f"{kind}/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, self.step)
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log({**numbers, STEP: self.step})


def count_steps(rows: list[dict[str, Any]]) -> int:
    """Return the sum of the last steps of all phases."""
    return sum({row["phase"]: row["step"] for row in rows}.values())


def markdown_table(columns: Sequence[str], rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *escaped])


def start_wandb(output: Path, config: Config) -> Any:
    """Start the run on W&B, or resume it: its id follows from ``output``, so a resumed run continues its own curves.

    Raises:
        InputError: W&B does not let it start.
    """
    import wandb

    try:
        run = wandb.init(
            project=config.project or os.environ.get("WANDB_PROJECT") or "irlfast",
            name=config.run_name or output.name,
            id=f"{output.name}-{zlib.crc32(str(output.resolve()).encode()):08x}",
            config=dataclasses.asdict(config),
            resume="allow",
            dir=str(output),
        )
    except wandb.Error as error:
        raise InputError(f"report_to: wandb cannot start ({error}); `wandb login`, or WANDB_MODE=offline") from error
    run.define_metric(STEP)  # W&B's own steps never decrease, and a resumed run goes back to its last checkpoint
    run.define_metric("*", step_metric=STEP)
    return run
