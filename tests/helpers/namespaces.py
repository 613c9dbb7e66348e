"""Machines of one's own: namespaces of network, mounts and host name, which a bridge connects.

Each is as a machine of a cluster often is: its hosts file says that its own name is 127.0.1.1, as
Debian has it, and it has a ``docker0`` whose address is that of every other machine's ``docker0``.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.helpers.runs import ROOT

TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount", "hostname")
TRIAL = "ip link add bridge type bridge && ip link add port type veth peer name eth0 && mount -t tmpfs none /mnt"
# As ssh is called by mpirun, by pdsh and by DeepSpeed; the first word that is no option is the machine.
SSH = """#!/bin/sh
while :; do case $1 in -o) shift 2 ;; -*) shift ;; *) break ;; esac; done
holder=$(cat "{folder}/$1") || exit 255
shift
exec nsenter --target="$holder" --net --mount --uts -- sh -c "$*"
"""


class Machine(NamedTuple):
    """A set of namespaces, which the process ``holder`` keeps."""

    name: str
    address: str
    holder: int

    @property
    def enter(self) -> list[str]:
        """The words before a command that has to run on this machine."""
        return ["nsenter", f"--target={self.holder}", "--net", "--mount", "--uts", "--", "env", f"--chdir={ROOT}"]

    def do(self, *commands: str) -> None:
        for command in commands:
            subprocess.run([*self.enter, *command.split()], check=True, capture_output=True)

    def processes(self) -> list[int]:
        """The ids of the processes that were started on this machine."""
        found, own = [], os.readlink(f"/proc/{self.holder}/ns/net")
        for pid in psutil.pids():
            with contextlib.suppress(OSError):
                if pid != self.holder and os.readlink(f"/proc/{pid}/ns/net") == own:
                    found.append(pid)
        return found

    def kill(self) -> None:
        """Kill all processes of this machine at once."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def why_not() -> str:
    """Why no namespaces can be made here; an empty text if they can."""
    if missing := [name for name in TOOLS if not shutil.which(name)]:
        return f"{', '.join(missing)} are not here (Debian: iproute2, util-linux)"
    trial = ["unshare", "--net", "--mount", "--uts", "sh", "-c", TRIAL]
    done = subprocess.run(trial, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""


@contextlib.contextmanager
def machines(folder: Path, count: int) -> Iterator[list[Machine]]:
    """Within the context there are ``count`` machines. ``folder`` gets an ``ssh`` that reaches them by their names.

    Their processes are killed at the end, and so nothing is left of them.
    """
    held = [held_namespaces("--net")]
    try:
        switch = Machine("switch", "", held[0].pid)
        switch.do("ip link add bridge type bridge", "ip link set bridge up")
        made = []
        for number in range(count):
            held.append(held_namespaces("--net", "--mount", "--uts"))
            machine = Machine(f"node{number}", f"10.77.0.{number + 1}", held[-1].pid)
            plug_in(switch, machine)
            made.append(machine)
        for machine in made:
            names = [f"{'127.0.1.1' if each == machine else each.address} {each.name}" for each in made]
            (folder / f"hosts-{machine.name}").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
            machine.do(f"mount --bind {folder}/hosts-{machine.name} /etc/hosts")
            (folder / machine.name).write_text(str(machine.holder))
        (folder / "ssh").write_text(SSH.format(folder=folder))
        (folder / "ssh").chmod(0o755)
        yield made
        for machine in made:
            machine.kill()
    finally:
        for process in held:
            process.kill()
            process.wait()


def held_namespaces(*kinds: str) -> subprocess.Popen:
    """A process in new namespaces, which are there. It ends with this one."""
    process = subprocess.Popen(["unshare", *kinds, "setpriv", "--pdeathsig=KILL", "sleep", "infinity"])
    while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
        assert process.poll() is None
        time.sleep(0.01)
    return process


def plug_in(switch: Machine, machine: Machine) -> None:
    """Connect a machine with the switch."""
    port = f"port-{machine.name}"
    switch.do(
        f"ip link add {port} type veth peer name eth0 netns {machine.holder}", f"ip link set {port} master bridge up"
    )
    machine.do(
        f"hostname {machine.name}",
        "ip link set lo up",
        "ip link add docker0 type bridge",
        "ip address add 172.17.0.1/16 dev docker0",
        "ip link set docker0 up",
        f"ip address add {machine.address}/24 dev eth0",
        "ip link set eth0 up",
    )
