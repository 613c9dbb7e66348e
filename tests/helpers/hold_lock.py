"""Started by tests: lock the folder of a run, fork a child that outlives this process, and print both process ids.

python -m tests.helpers.hold_lock FOLDER
"""

import os
import sys
import time
from pathlib import Path

from irlfast.runs.output import lock

if __name__ == "__main__":
    lock(Path(sys.argv[1]))
    child = os.fork()  # as a sampler or a data loader is
    if child:
        print(os.getpid(), child, flush=True)
    time.sleep(600)
