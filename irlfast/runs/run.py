"""What every step of a run needs to know."""

from pathlib import Path
from typing import NamedTuple

from irlfast.config import Config
from irlfast.data.encoding import Encoder
from irlfast.data.store import Example, Rows
from irlfast.runs.metrics_log import MetricsLog


class Run(NamedTuple):
    config: Config
    output: Path
    initial: Path | str  # the policy that it starts from
    encoder: Encoder
    train: list[Example]
    held_out: list[Example]
    metrics_log: MetricsLog
    rows: Rows | None  # what the examples were made from
