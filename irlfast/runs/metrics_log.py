"""The log of a run: metrics.jsonl, and TensorBoard or W&B beside it where ``report_to`` asks for them."""

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

STEP = "global_step"  # Transformers' name of W&B's x-axis
SAMPLES = 8  # held-out prompts whose answers are shown


class MetricsLog:
    """Writes rows of figures. Only the main process's writes anything.

    TensorBoard and W&B show them over the optimiser steps of the whole run, under the kind of the phase: ``sft/loss``,
    ``reward/loss``, ``irft/loss`` (or the run's other method), and ``eval/nll`` of what was held out.
    """

    def __init__(self, output: Path, config: Config) -> None:
        self.path = output / "metrics.jsonl"
        self.method = config.method
        self.before = self.steps_of(self.rows())  # optimiser steps of the phases before this one
        self.step = self.before
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

    def rows(self) -> list[dict[str, Any]]:
        return [row for _, row in read_jsonl(self.path)] if self.path.exists() else []

    def steps_of(self, rows: list[dict[str, Any]]) -> int:
        """The sum of the last steps of the phases in ``rows``."""
        return sum({row["phase"]: row["step"] for row in rows}.values())

    def begin(self, phase: str, step: int) -> None:
        """A phase starts after ``step``: rows that a killed run wrote beyond its last checkpoint go."""
        if not dist.is_main():
            return
        if self.path.exists():
            write_jsonl(self.path, [row for row in self.rows() if row["phase"] != phase or row["step"] <= step])
        self.before = self.steps_of([row for row in self.rows() if row["phase"] != phase])
        self.step = self.before + step
        if self.tensorboard:
            self.tensorboard.close()
            self.tensorboard = self.open_writer(purge_step=self.step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """A row of a phase's figures after its ``step``."""
        if not dist.is_main():
            return
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        self.step = self.before + row["step"]
        kind = {"sft": "sft", "reward": "reward"}.get(row["phase"].rpartition("/")[2], self.method)
        self.show(kind, {name: value for name, value in row.items() if name not in ("step", "stage")})

    def hold_out(self, metrics: dict[str, Any], answers: Sequence[dict[str, str]] = (), kind: str = "eval") -> None:
        """Held-out figures after the last step that was logged, and a few answers beside the expert's."""
        self.show(kind, metrics)
        names, rows = ["prompt", "expert", "answer"], answers[:SAMPLES]
        if self.tensorboard and rows:
            cells = [[row[name].replace("|", "\\|").replace("\n", "<br>") for name in names] for row in rows]
            table = "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * 3, *cells])
            self.tensorboard.add_text("eval/samples", table, self.step)
            self.tensorboard.flush()
        if self.wandb and rows:
            import wandb

            table = wandb.Table(columns=names, data=[[row[name] for name in names] for row in rows])
            self.wandb.log({"eval/samples": table, STEP: self.step})

    def show(self, kind: str, metrics: dict[str, Any]) -> None:
        """Figures after the last step that was logged, on TensorBoard and W&B."""
        numbers = {f"{kind}/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, self.step)
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log({**numbers, STEP: self.step})


def start_wandb(output: Path, config: Config) -> Any:
    """The run on W&B, the same on every start, so that a resumed run goes on in its own curves.

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
    run.define_metric(STEP)  # W&B's own steps only grow, and a resumed run goes back to its last checkpoint
    run.define_metric("*", step_metric=STEP)
    return run
