"""Stop a process of a run at a named point, so that whoever started the run can kill it exactly there.

    python -m tests.helpers.fault_points PLAN irlfast.train KEY=VALUE...

``PLAN`` is JSON. With ``rank``, ``point``, ``when``, ``number`` and ``marker``, the process of this rank stops before
or after the call of this number, or with half of the file that the call has written. It writes its process id into the
file ``marker`` first. With ``record``, a folder, every process leaves the number of calls at each point there, and the
names that files and folders got, in their order.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

# What a call does, and where the product looks its function up.
POINTS = {
    "a name is given": ("os", "replace"),
    "a flush": ("os", "fsync"),
    "a line of MANIFEST": ("irlfast.common.artefacts", "note"),
    "a checkpoint": ("irlfast.engine.fit", "save_checkpoint"),
    "a checkpoint is written": ("irlfast.engine.checkpoint", "write_checkpoint"),  # in a thread
    "a part of a checkpoint": ("irlfast.engine.state", "save_tensors"),
    "a model": ("irlfast.engine.checkpoint", "save_pretrained"),
    "a folder is deleted": ("shutil", "rmtree"),
    "a file is deleted": ("os", "unlink"),
    "a step": ("irlfast.engine.fit", "train_step"),
    "a row of metrics": ("irlfast.runs.metrics_log", "append_row"),
    "processes wait": ("irlfast.common.dist", "barrier"),
}
RENAMED: list[str] = []
CALLS: Counter[str] = Counter()
COUNTING = threading.Lock()


def watch(point: str, plan: dict[str, Any]) -> None:
    """Count the calls at a point, and stop at the planned one."""
    module, name = POINTS[point]
    place = importlib.import_module(module)
    setattr(place, name, counted(getattr(place, name), point, plan))


def counted(function: Callable, point: str, plan: dict[str, Any]) -> Callable:
    def call(*given: Any, **options: Any) -> Any:
        with COUNTING:
            CALLS[point] += 1
            number = CALLS[point]
        here = plan.get("point") == point and plan["number"] == number
        if here and plan["when"] == "before":
            stop(plan["marker"])
        result = function(*given, **options)
        if point == "a name is given":
            RENAMED.extend(map(str, given[:2]))
        if here and plan["when"] == "half":
            os.truncate(given[1], os.path.getsize(given[1]) // 2)
        if here and plan["when"] != "before":
            stop(plan["marker"])
        return result

    return call


def stop(marker: str) -> None:
    handle = os.open(marker, os.O_WRONLY | os.O_CREAT)
    os.write(handle, str(os.getpid()).encode())
    os.close(handle)
    os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    plan, module, rank = json.loads(sys.argv[1]), sys.argv[2], os.environ.get("RANK", "0")
    tempfile.tempdir = None  # a forked process has it from another run
    tempfile.gettempdir()  # Python tries the folder by a file, which a kill would leave
    if "record" in plan or plan.get("rank") == int(rank):
        for point in POINTS:
            watch(point, plan)
    sys.argv = sys.argv[2:]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        if "record" in plan:
            with open(os.path.join(plan["record"], rank), "w") as file:
                json.dump({"calls": CALLS, "names": RENAMED}, file)


if __name__ == "__main__":
    main()
