"""Started by tests: lock the folder of a run, fork a child that outlives this process, and print both process ids.

python -m tests.helpers.hold_lock FOLDER [without]

``without`` is for a file system without locks.
"""

import errno
import fcntl
import os
import sys
import time
from pathlib import Path

from irlfast.common.command import run_command
from irlfast.runs.lock import lock


def no_lock(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def command() -> None:
    lock(Path(sys.argv[1]))
    child = os.fork()  # as a sampler or a data loader is
    if child:
        print(os.getpid(), child, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    if sys.argv[2:] == ["without"]:
        fcntl.lockf = no_lock
    sys.exit(run_command(command))
