"""Trackers that show the metrics of a run: TensorBoard, W&B, Trackio and MLflow, each by its own package.

A resumed run continues its own curves: its name at the tracker follows from the path of its folder.
"""

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from irlfast.common.artefacts import set_aside
from irlfast.common.files import InputError
from irlfast.common.messages import first_sentence
from irlfast.common.secrets import redacted
from irlfast.config import Config, dump

STEP = "global_step"  # the name that Transformers gives W&B's x-axis
Cells = Sequence[Sequence[str]]  # the head of a table, then its rows


class Tracker(NamedTuple):
    """The functions of a tracker. A step is an optimiser step of the whole run."""

    name: str
    log: Callable[[dict[str, float], int], None]  # numbers by name, and the step
    show: Callable[[Cells, int], None]  # a table of held-out answers, and the step
    go_back: Callable[[int], None]  # forget what is after this step, where the tracker can


def start_trackers(output: Path, config: Config) -> list[Tracker]:
    """Start the trackers that ``report_to`` names.

    Raises:
        InputError: a tracker cannot start.
    """
    trackers = []
    for name in config.report_to:
        start, hint = TRACKERS[name]
        try:
            trackers.append(start(output, config))
        except Exception as error:  # whatever the package raises
            raise InputError(f"report_to: {name} cannot start ({first_sentence(error)}); {hint}") from error
    return trackers


def name_of(output: Path, name: str) -> str:
    """Return a name that no run in another folder has, and that a resumed run has again."""
    return f"{name}-{zlib.crc32(str(output.resolve()).encode()):08x}"


def start_tensorboard(output: Path, config: Config) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    folder = output / "tensorboard"
    if folder.exists() and not folder.is_dir():
        set_aside(folder, "is not a folder")
    open_writer = functools.partial(SummaryWriter, str(folder))
    writer = open_writer()
    writer.add_text("config", f"```yaml\n{dump(config)}```", 0)

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def show(cells: Cells, step: int) -> None:
        writer.add_text("eval/samples", markdown_table(cells), step)
        writer.flush()

    def go_back(step: int) -> None:
        nonlocal writer
        writer.close()
        writer = open_writer(purge_step=step + 1)

    return Tracker("tensorboard", log, show, go_back)


def start_wandb(output: Path, config: Config) -> Tracker:
    import wandb

    run = wandb.init(
        project=redacted(config.project) or os.environ.get("WANDB_PROJECT") or "irlfast",
        name=redacted(config.run_name or output.name),
        id=name_of(output, redacted(output.name)),
        config=redacted(dataclasses.asdict(config)),
        resume="allow",
        dir=str(output),
        settings=wandb.Settings(x_disable_meta=True),  # W&B would keep the command line, secrets included
    )
    run.define_metric(STEP)  # W&B's own steps never decrease, and a resumed run goes back to its last checkpoint
    run.define_metric("*", step_metric=STEP)

    def log(numbers: dict[str, float], step: int) -> None:
        run.log({**numbers, STEP: step})

    def show(cells: Cells, step: int) -> None:
        head, *rows = cells
        table = wandb.Table(columns=[*head], data=[[*row] for row in rows])
        run.log({"eval/samples": table, STEP: step})

    return Tracker("wandb", log, show, keep_all)


def start_trackio(output: Path, config: Config) -> Tracker:
    import trackio

    run = trackio.init(
        project=redacted(config.project) or os.environ.get("TRACKIO_PROJECT") or "irlfast",
        name=name_of(output, redacted(config.run_name or output.name)),
        config=redacted(dataclasses.asdict(config)),
        resume="allow",
        embed=False,
    )

    def log(numbers: dict[str, float], step: int) -> None:
        run.log(numbers, step=step)

    def show(cells: Cells, step: int) -> None:
        run.log({"eval/samples": trackio.Markdown(markdown_table(cells))}, step=step)

    return Tracker("trackio", log, show, keep_all)


def start_mlflow(output: Path, config: Config) -> Tracker:
    import mlflow

    own = name_of(output, "run")  # without the folder's name, which may have quotes
    project = redacted(config.project) or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "irlfast"
    experiment = mlflow.set_experiment(project)
    client = mlflow.MlflowClient()
    earlier = client.search_runs([experiment.experiment_id], f"tags.`irlfast.run` = '{own}'")
    if earlier or "MLFLOW_RUN_ID" in os.environ:
        run = mlflow.start_run(run_id=os.environ.get("MLFLOW_RUN_ID") or earlier[0].info.run_id)
    else:
        run = mlflow.start_run(run_name=redacted(config.run_name or output.name), tags={"irlfast.run": own})
        keys = [*redacted(dataclasses.asdict(config)).items()]
        for start in range(0, len(keys), 100):  # MLflow takes 100 keys at a time, and 6,000 characters of each
            mlflow.log_params({name: str(value)[:6000] for name, value in keys[start : start + 100]})
    run_id = run.info.run_id

    def log(numbers: dict[str, float], step: int) -> None:
        mlflow.log_metrics(numbers, step=step, run_id=run_id)

    def show(cells: Cells, step: int) -> None:
        client.log_text(run_id, markdown_table(cells), f"samples/step-{step:06d}.md")

    return Tracker("mlflow", log, show, keep_all)


def keep_all(step: int) -> None:
    """Leave the values that a killed run logged after its checkpoint. The resumed run logs these steps again."""


def markdown_table(cells: Cells) -> str:
    head, *rows = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


# By name: a function that starts the tracker, and what to do where it cannot start.
TRACKERS: dict[str, tuple[Callable[[Path, Config], Tracker], str]] = {
    "tensorboard": (start_tensorboard, "is output_dir writable?"),
    "wandb": (start_wandb, "`wandb login`, or WANDB_MODE=offline"),
    "trackio": (start_trackio, "is TRACKIO_DIR writable, and project a plain name?"),
    "mlflow": (start_mlflow, "does MLFLOW_TRACKING_URI name a server or a database that answers?"),
}
