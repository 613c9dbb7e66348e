"""The record that every part of a run is given."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from irlfast.config import Config
from irlfast.data.encoding import Encoder
from irlfast.data.store import Example, Rows
from irlfast.runs.metrics_log import MetricsLog


class Run(NamedTuple):
    config: Config
    output: Path  # output_dir
    initial: Path | str  # the policy that the run starts from: a folder, or a name on the hub
    encoder: Encoder
    train: list[Example]
    held_out: list[Example]
    metrics_log: MetricsLog
    rows: Rows | None  # the rows of data/rows.jsonl that the examples were made from; None where no reward reads them
    prompts: Sequence[Example] = ()  # without answers; the policy answers them beside those of the demonstrations
