"""Started by tests of launchers, once per process: the main process prints the places of all, in the order of ranks.

python -m tests.helpers.place FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch

from irlfast.common import dist, watchdog
from irlfast.common.command import run_command
from irlfast.engine.process_group import destroy_process_group, init_process_group
from irlfast.startup.prepare import quiet


def command() -> None:
    watchdog.start(Path(sys.argv[1]), 60.0)
    quiet()
    init_process_group(60.0)
    places = dist.all_gather_object([dist.rank(), dist.world_size(), int(os.environ["LOCAL_RANK"])])
    total = dist.all_reduce(torch.ones(1))
    if dist.is_main():
        print(json.dumps({"places": places, "sum": total.item()}))
    destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_command(command))
