"""Started by test_ends.py, once per process: steps that wait for each other, and an early end of one of the processes.

python -m tests.helpers.ending FOLDER HOW RANK STALL_TIMEOUT
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from irlfast.common import dist, watchdog
from irlfast.common.command import run_command
from irlfast.common.files import InputError
from irlfast.common.movement import at_length, in_small_units, moved
from irlfast.engine.process_group import destroy_process_group, init_process_group
from irlfast.runs.lock import lock
from irlfast.startup.prepare import quiet

FOLDER, HOW, STALL_TIMEOUT = Path(sys.argv[1]), sys.argv[2], float(sys.argv[4])
ENDS = dist.rank() == int(sys.argv[3])
STEPS = 10_000


def command() -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"process-{dist.rank()}").write_text(str(os.getpid()))
    if HOW == "refused at the start" and ENDS:
        raise InputError("the start is refused")
    watchdog.start(FOLDER, STALL_TIMEOUT)
    if dist.is_main():
        lock(FOLDER)
    if HOW == "refused" and ENDS:
        raise InputError("the data are refused")
    quiet()
    init_process_group(STALL_TIMEOUT)
    if HOW == "slow":
        dist.on_main(time.sleep, STALL_TIMEOUT + 3)
    with in_small_units("stage-00"):
        for step in range(STEPS if HOW not in ("slow", "takes long") else 10):
            if step == 5:
                (FOLDER / "steps").touch()
                if ENDS:
                    end()
            total = dist.all_reduce(torch.ones(1))
            assert total == dist.world_size()
            time.sleep(0.02)
            moved()
    destroy_process_group()


def end() -> None:
    if HOW == "InputError":
        raise InputError("the rows are refused")
    if HOW == "ValueError":
        raise ValueError("a mistake")
    if HOW in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, HOW))
    if HOW == "hang":
        time.sleep(3600)
    if HOW == "takes long":
        with at_length("a download"):
            time.sleep(STALL_TIMEOUT + 3)


if __name__ == "__main__":
    sys.exit(run_command(command))
