"""A real Slurm of one node on the loopback: munged, slurmctld and slurmd, with a configuration of its own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.runs import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
SECONDS = 60.0  # in which the node is idle
CONFIGURATION = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=1,sched_interval=2
ReturnToService=2
KillWait=60
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """Why no Slurm can be started here; an empty text if one can."""
    missing = [name for name in (*DAEMONS, *COMMANDS) if not tool(name)]
    if missing:
        return f"{', '.join(missing)} are not here (Debian: slurmctld, slurmd, slurm-client, munge)"
    return "" if os.geteuid() == 0 else "slurmd starts the jobs of users, which takes root"


def tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Within the context, a Slurm runs. Yields the variables with which its commands find it."""
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True)
    ports = {"controller": free_port(), "node": free_port()}
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=socket.gethostname(), folder=folder, **ports))
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o400)
    own = {name: str(folder / "munge" / name) for name in ("socket", "pid-file", "log-file", "seed-file")}
    options = [f"--{name}={path}" for name, path in own.items()]
    variables = {"SLURM_CONF": str(configuration)}
    environment = os.environ | variables
    started = []
    try:
        for name, given in {
            "munged": ["--foreground", "--force", f"--key-file={folder / 'munge' / 'key'}", *options],
            "slurmctld": ["-D"],
            "slurmd": ["-D"],
        }.items():
            with (folder / f"{name}.out").open("w") as out:
                started.append(subprocess.Popen([tool(name), *given], env=environment, stdout=out, stderr=out))
            time.sleep(1)
        until = time.monotonic() + SECONDS
        while "idle" not in ask(["sinfo", "-h", "-o", "%T"], environment):
            assert time.monotonic() < until, "".join(path.read_text() for path in folder.glob("*.log"))
            time.sleep(0.5)
        yield variables
    finally:
        ask(["scancel", "--full", "--signal=KILL", "--user=root"], environment)
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def ask(command: list[str], environment: dict[str, str]) -> str:
    """Return the output of a command of Slurm."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120).stdout
