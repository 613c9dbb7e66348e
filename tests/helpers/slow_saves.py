"""Started by tests: a command whose checkpoints are slow to write, until something happens to one of them.

    python -m tests.helpers.slow_saves PLAN irlfast.train KEY=VALUE...

``PLAN`` is JSON. The files of a checkpoint are written once ``steps`` more steps are taken, or training waits for them.
At the checkpoint of ``number``, counted from the start, this happens before, in the process of ``rank``:

- ``full``: the disk is full;
- a name of a signal: the process gets it. No step is taken until it is heard.

At its end each process appends to the file ``note``, if there is one, how many steps it took beside each checkpoint.
"""

import errno
import json
import math
import os
import runpy
import signal
import sys
import threading
import time
from typing import Any

from irlfast.common import stop
from irlfast.engine import checkpoint, fit, saving

PLAN: dict[str, Any] = {"steps": 1, "rank": 0} | json.loads(sys.argv[1])
train_step, save_files = fit.train_step, checkpoint.save_files
begin_saving, finish_saving = saving.begin, saving.finish
taken = checkpoints = 0
until = math.inf  # so many steps are taken before the checkpoint in work goes on
beside: list[int] = []
went_on, waits = threading.Event(), threading.Event()


def begin(*given: Any) -> None:
    global until
    went_on.clear()
    until = taken + PLAN["steps"]
    begin_saving(*given)


def finish(*given: Any) -> None:
    waits.set()
    finish_saving(*given)
    waits.clear()


def step(*given: Any) -> Any:
    global taken
    result = train_step(*given)
    taken += 1
    if taken >= until:
        went_on.wait(10)
    return result


def slow_files(*given: Any) -> None:
    global checkpoints, until
    begun, checkpoints = until - PLAN["steps"], checkpoints + 1
    while taken < until and not waits.is_set():
        time.sleep(0.001)
    beside.append(taken - begun)
    hit = checkpoints == PLAN.get("number") and int(os.environ.get("RANK", "0")) == PLAN["rank"]
    if hit and PLAN["what"] != "full":
        os.kill(os.getpid(), getattr(signal, PLAN["what"]))
        stop.asked(within=1.0)
    until = math.inf
    went_on.set()
    if hit and PLAN["what"] == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save_files(*given)


if __name__ == "__main__":
    fit.train_step, checkpoint.save_files = step, slow_files
    checkpoint.begin, checkpoint.finish, saving.finish = begin, finish, finish
    sys.argv = sys.argv[2:]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        if "note" in PLAN:
            with open(PLAN["note"], "a") as note:
                note.write(json.dumps(beside) + "\n")
