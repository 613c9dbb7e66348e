"""The record that every part of a run is given."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from irlfast.config import Config
from irlfast.data.encoding import Encoder
from irlfast.data.store import NONE, Examples, Rows
from irlfast.runs.metrics_log import MetricsLog


class Run(NamedTuple):
    config: Config
    output: Path  # output_dir
    initial: Path | str  # the policy that the run starts from: a folder, or a name on the hub
    encoder: Encoder
    train: Examples
    held_out: Examples
    metrics_log: MetricsLog
    rows: Rows | None  # the rows of data/rows.jsonl that the examples were made from; None where no reward reads them
    prompts: Examples = NONE  # without answers; the policy answers them beside those of the demonstrations
    check_room: Callable[[], None] = lambda: None  # is called by all processes before a phase trains
    # (stage, its early policy) -> None: is called by all processes once the policy can answer the next stage's prompts.
    ask_early: Callable[[int, Path], None] = lambda stage, policy: None
