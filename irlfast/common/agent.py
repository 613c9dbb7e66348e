"""torchrun's agent, as ``irlfast train`` alone starts it: the processes of a run on this machine.

It hands signals on, and ends all processes when one fails. Unlike torchrun, it then has their exit code, and prints
nothing: they have said why they end.

    python -m irlfast.common.agent COUNT MODULE [ARGUMENT ...]
"""

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from irlfast.common.stop import PREEMPTED

SIGNALS = "SIGTERM,SIGINT,SIGQUIT,SIGUSR1"  # not SIGHUP, which nohup is to keep off
INTERRUPTED = 130


def main() -> int:
    """Run the processes and return the exit code of the first that failed."""
    count, *command = sys.argv[1:]
    logging.disable()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(count),
        run_id=f"irlfast-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        signals_to_handle=SIGNALS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", *command)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 1  # that of a killed process is below 0
    except SignalException as error:
        return INTERRUPTED if error.sigval == signal.SIGINT else PREEMPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
