"""How a run was started: ``starts.jsonl`` has a line for the first start and for each that resumed the run."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import irlfast
from irlfast.common import dist
from irlfast.common.logs import append_row, mend
from irlfast.common.messages import log
from irlfast.common.secrets import redacted

PACKAGES = ("torch", "transformers", "deepspeed", "triton", "peft", "vllm")


def note_start(output: Path, changes: Sequence[str] = ()) -> None:
    """Append the present start of a run, and the changes of its configuration. See :func:`present_start`.

    Another number of processes than at the start before is said: the run takes the same steps, equal to rounding.
    """
    path, start = output / "starts.jsonl", present_start() | {"changes": [*changes]}
    earlier = mend(path, lambda row: isinstance(row.get("command"), str))
    before = earlier[-1].get("processes") if earlier else start["processes"]
    if before != start["processes"]:
        log(f"{output} continues with processes: {before} -> {start['processes']} (the same steps, to rounding)")
    append_row(path, start)


def present_start() -> dict[str, Any]:
    """Return the time and the command of this start, the device, the number of processes, and versions."""
    cuda = torch.cuda.is_available()
    return {
        "time": datetime.datetime.now().isoformat(" ", "seconds"),
        "command": shlex.join(redacted(sys.orig_argv)),
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "processes": dist.world_size(),
        "versions": {"irlfast": irlfast.__version__, "python": platform.python_version(), **installed()},
    }


def installed() -> dict[str, str]:
    """Return the versions of the packages that decide what a run computes, where they are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
