"""Seconds until all processes of a run have ended: ``python -m benchmarks.ends``.

Two processes, which torchrun starts, take steps that wait for each other (:mod:`tests.helpers.ending`). One of them
fails, is killed or stopped, or torchrun is killed. The time begins at that moment, and ends when neither of the two
processes is left. ``stall_timeout`` is 20 seconds.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.conftest import write_result
from tests.common.test_ends import started, wait_until
from tests.helpers.runs import ROOT, TORCHRUN

STALL_TIMEOUT = 20
CASES = [
    *[(f"process {rank} raises an InputError", "InputError", rank) for rank in (0, 1)],
    *[(f"process {rank} raises another error", "ValueError", rank) for rank in (0, 1)],
    *[(f"process {rank} is killed (SIGKILL)", "SIGKILL", rank) for rank in (0, 1)],
    ("torchrun is killed (SIGKILL)", "none", 0),
    *[(f"process {rank} is stopped (SIGSTOP)", "SIGSTOP", rank) for rank in (0, 1)],
    ("process 1 hangs", "hang", 1),
]


def seconds(folder: Path, how: str, rank: int) -> tuple[float, str]:
    """Return the time until both processes have ended, and the last line that one of them printed."""
    arguments = ["-m", "tests.helpers.ending", str(folder), how, str(rank), str(STALL_TIMEOUT)]
    with (folder.parent / "err").open("w") as err:
        launcher = subprocess.Popen(
            [*TORCHRUN, *arguments], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=err
        )
    processes = started(folder)
    wait_until((folder / "steps").exists)
    begun = time.monotonic()
    if how == "none":
        launcher.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes)
    passed = time.monotonic() - begun
    launcher.wait()
    lines = (folder.parent / "err").read_text().splitlines()
    return passed, next((line for line in reversed(lines) if line.startswith("irlfast")), "")


def main() -> None:
    cases = CASES[:2] if "--quick" in sys.argv[1:] else CASES
    rows = []
    print("| what happens | seconds | last line |\n| --- | --- | --- |")
    for label, how, rank in cases:
        with tempfile.TemporaryDirectory() as folder:
            passed, line = seconds(Path(folder) / "run", how, rank)
        print(f"| {label} | {passed:.1f} | {line} |", flush=True)
        rows.append({"what": label, "seconds": passed, "last line": line})
    print(write_result("ends", {"rows": rows}))


if __name__ == "__main__":
    main()
