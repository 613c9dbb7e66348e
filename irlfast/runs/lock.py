"""One run at a time in a folder: a lock file that names its owner and has a heartbeat.

The operating system's lock of the file decides on one machine, and wherever the file system has locks. A file system
that machines share may have none, or one per machine. There the heartbeat decides: the owner writes its file anew every
few seconds. A process that finds the file of another machine reads it until it changes, or until its owner is dead.
"""

import atexit
import dataclasses
import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

from irlfast.common import ranks
from irlfast.common.files import InputError
from irlfast.common.messages import log

BEAT = 5.0  # seconds between two heartbeats
DEAD = 30.0  # seconds without a heartbeat, after which an owner on another machine is dead
SETTLED = 2.0  # seconds in which two processes that lock at the same time see each other, where there are no locks
LENGTH = 1000  # bytes of the file: a heartbeat overwrites all of it at once


class Owner(NamedTuple):
    """Who has a folder, as its lock file says."""

    process: ranks.Member
    started: float  # seconds since the epoch
    beat: int  # grows

    def name(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        age = max(0.0, time.time() - self.started) / 60
        host = self.process.machine.split()[0]
        return f"process {self.process.pid} on {host}, started {began} ({age:,.0f} minutes ago),"


@dataclasses.dataclass
class Lock:
    """A lock that this process holds."""

    path: Path
    file: int  # its descriptor. Another one must not be closed: the system's lock would go with it.
    owner: Owner
    released: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.heart = threading.Thread(target=keep, args=(self,), name="lock", daemon=True)


LOCKS: dict[Path, Lock] = {}  # of this process, by the paths of their files


def lock(output: Path) -> None:
    """Lock ``output`` against other runs until this process ends, even if it is killed.

    Raises:
        InputError: another process has the lock; the message says which, on which machine, and since when.
    """
    path = output.resolve() / ".lock"
    if path in LOCKS:
        return
    output.mkdir(parents=True, exist_ok=True)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{path}: {error.strerror}; expected a file that this user can write") from error
    settled = try_lock(output, file)
    if (owner := read(file)) and lives(output, file, owner):
        refuse(output, file)
    held = Lock(path, file, Owner(ranks.this_process(), time.time(), 0))
    write(file, held.owner)
    if not settled:
        time.sleep(SETTLED)
        if not is_own(held):
            refuse(output, file)
    LOCKS[path] = held
    held.heart.start()


def try_lock(output: Path, file: int) -> bool:
    """Ask the system for its lock of a file; return whether the file system has locks.

    Raises:
        InputError: another process has it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a forked child of a killed run would keep flock's
    except (BlockingIOError, PermissionError):
        refuse(output, file)
    except OSError as error:
        log(f"warning: output_dir {output}: its file system has no locks ({error.strerror}); heartbeats decide")
        return False
    return True


def refuse(output: Path, file: int) -> NoReturn:
    owner = read(file)
    os.close(file)
    name = owner.name() if owner else "another process"
    raise InputError(f"output_dir {output}: {name} is running in it; expected another folder")


def lives(output: Path, file: int, owner: Owner) -> bool:
    """Return whether the process that a lock file names still runs, on this machine or on another one."""
    if owner.process.machine == ranks.machine():
        return owner.process.pid != os.getpid() and ranks.is_alive(owner.process)
    log(f"output_dir {output}: {owner.name()} has not said that it ended; waiting {DEAD:g} seconds for its heartbeat")
    until = time.monotonic() + DEAD
    while time.monotonic() < until:
        time.sleep(min(1.0, BEAT))
        if (latest := read(file)) != owner:
            return latest is not None
    return False


def keep(held: Lock) -> None:
    """Write a heartbeat every few seconds. End this process if another one has taken its folder."""
    warned = False
    while not held.released.wait(BEAT):
        if not is_own(held):
            ranks.end_from_thread(2, f"output_dir {held.path.parent}: another process has taken it; this run ends")
        held.owner = held.owner._replace(beat=held.owner.beat + 1)
        try:
            write(held.file, held.owner)
        except OSError as error:
            if not warned:
                log(f"warning: {held.path}: no heartbeat ({error.strerror}); start no second run in its folder")
            warned = True


def is_own(held: Lock) -> bool:
    """Return whether a lock file, and the file that has its name now, still name this process."""
    replaced = held.path.exists() and not os.path.samestat(held.path.stat(), os.fstat(held.file))
    owner = read(held.file)
    return not replaced and (owner is None or owner.process == held.owner.process)


def release(path: Path) -> None:
    """Give a lock back: an empty file has no owner."""
    held = LOCKS.pop(path)
    held.released.set()
    held.heart.join(BEAT)
    if is_own(held):
        os.ftruncate(held.file, 0)
    os.close(held.file)


@atexit.register
def release_all() -> None:
    for path, held in [*LOCKS.items()]:
        if held.owner.process.pid == os.getpid():  # not a forked child
            release(path)


def read(file: int) -> Owner | None:
    """Return the owner that a lock file names; None if it names none."""
    try:
        process, started, beat = json.loads(os.pread(file, LENGTH, 0))
        return Owner(ranks.Member(*process), float(started), int(beat))
    except (ValueError, TypeError):  # released, damaged, or just being written
        return None


def write(file: int, owner: Owner) -> None:
    os.pwrite(file, json.dumps(owner).ljust(LENGTH).encode(), 0)
    os.ftruncate(file, LENGTH)
    os.fsync(file)
