"""What every step of a run needs to know."""

from pathlib import Path
from typing import NamedTuple

from irlfast.config import Config
from irlfast.data.encoding import Format
from irlfast.data.store import Example, Rows
from irlfast.runs.metrics_log import Log


class Run(NamedTuple):
    config: Config
    output: Path
    initial: Path | str  # the policy that it starts from
    form: Format
    train: list[Example]
    held_out: list[Example]
    log: Log
    rows: Rows | None  # what the examples were made from
