"""The processes of a run: they wait for each other without a time limit, and when one ends early, all end.

They talk through torch's store, which torchrun serves, or else the main process. They join it before any data is read,
long before torch.distributed's process group exists, so that an early failure reaches all.

The end: the first process that fails says so in the store. The others fall silent. Then it prints its sentence, and all
leave with its exit code. Until then none leaves, since the first that does makes torchrun terminate the others.
"""

import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import psutil

from irlfast.common.files import InputError
from irlfast.common.movement import waiting
from irlfast.common.printable import printable, write_line

if TYPE_CHECKING:
    from torch.distributed import TCPStore

JOINED_WITHIN = 600.0  # seconds in which the process that serves the store must start
ANSWERED_WITHIN = 8.0  # seconds in which the others must answer when this process ends
FAILED = 1  # exit code: another process is gone, or an error that is not the user's
LONGEST_POLL = 0.25  # seconds
KEPT = "\n\t"  # characters of a stack
LOST = "ended without a word (killed?)"


class Failure(NamedTuple):
    """Why all processes end."""

    said_by: int  # the rank of the process that prints the sentence: the first that failed
    code: int  # the exit code of all
    sentence: str


class Member(NamedTuple):
    """A process, as others find it."""

    machine: str
    pid: int
    created: float  # seconds since the epoch: another process may get the same id later


class Store:
    """This process's connection to the store, and the beginning of all names that this start of the processes has."""

    def __init__(self, within: float) -> None:
        self.tcp = connect(within)
        self.prefix = f"irlfast/{agree_on_start(self.tcp, within) if has_agent_store() else 0}/"
        self.meetings: Counter[str] = Counter()  # that this process has been to, of each series
        self.known: dict[int, Member] = {}  # by rank
        self.set(f"member/{rank()}", json.dumps(this_process()))

    def set(self, name: str, text: str) -> None:
        self.tcp.set(self.prefix + name, text)

    def get(self, name: str) -> str | None:
        """Return a text; None if it is not there yet."""
        return self.tcp.get(self.prefix + name).decode() if self.tcp.check([self.prefix + name]) else None

    def first(self, name: str, text: str) -> str:
        """Write a text, unless there is one under this name already. Return the text that is there then."""
        return self.tcp.compare_set(self.prefix + name, "", text).decode()

    def count(self, name: str, more: int = 0) -> int:
        """Return a number, which begins at 0, after adding ``more`` to it."""
        return self.tcp.add(self.prefix + name, more)

    def delete(self, name: str) -> None:
        self.tcp.delete_key(self.prefix + name)

    def meet(self, series: str) -> None:
        """Wait until all processes are at the next meeting of a series, to which one thread of each process goes."""
        self.meetings[series] += 1
        number, pause = self.meetings[series], 0.001
        if self.count(f"{series}/{number}", 1) == world_size():
            self.delete(f"{series}/{number - 1}")  # all have gone on from there to here
        while self.count(f"{series}/{number}") < world_size():
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL)

    def member(self, number: int) -> Member | None:
        """Return the process of a rank; None until it has joined."""
        if number not in self.known and (text := self.get(f"member/{number}")):
            self.known[number] = Member(*json.loads(text))
        return self.known.get(number)

    def absent(self) -> list[int]:
        """Return the ranks of the processes that have not joined."""
        return [number for number in range(world_size()) if self.member(number) is None]

    def failure(self) -> Failure | None:
        text = self.get("failure")
        return Failure(*json.loads(text)) if text else None


STORE: Store | None = None  # None: this process is alone, has not joined yet, or has left
LEFT = False
GONE: set[Member] = set()  # processes of other machines that are known to have ended
ENDING = threading.Lock()  # the thread that ends this process holds it


def connect(within: float) -> "TCPStore":
    """Connect to the store, which the main process serves where torchrun does not.

    Raises:
        InputError: nothing says where the store is, or nothing serves it.
    """
    from torch.distributed import DistNetworkError, TCPStore

    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal():
        raise InputError(
            f"MASTER_ADDR, MASTER_PORT: found {address!r}, {port!r}; expected where {world_size()} processes meet"
        )
    serves = rank() == 0 and not has_agent_store()
    patience = datetime.timedelta(seconds=within)
    try:
        # multi_tenant: all stores that this process opens share the server.
        return TCPStore(address, int(port), None, serves, patience, wait_for_workers=False, multi_tenant=True)
    except DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise InputError(f"MASTER_PORT: {port} is in use on this machine; expected a free port") from error
        raise InputError(f"MASTER_ADDR, MASTER_PORT: process 0 does not answer at {address}:{port}") from error


def has_agent_store() -> bool:
    """Return whether torchrun serves the store: then it outlives the processes, and has the values of earlier ones."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agree_on_start(tcp: "TCPStore", within: float) -> str:
    """Wait until all processes are here, and return a name for this start of them; ``--max-restarts`` has more.

    Each process counts how often its rank has come. Process 0 proposes all these numbers as the name, until all
    processes have agreed to one: each does, if its own number is in the name. TORCHELASTIC_RESTART_COUNT is no such
    name: the machine of the process that failed counts a restart, and the others do not
    (https://github.com/pytorch/pytorch/issues/135712).

    Raises:
        InputError: a process has not come in time.
    """
    own, until = tcp.add(f"irlfast/came/{rank()}", 1), time.monotonic() + within
    proposed = agreed = ""
    while time.monotonic() < until:
        if rank() == 0:
            came = [tcp.add(f"irlfast/came/{number}", 0) for number in range(world_size())]
            if proposed != (proposed := ".".join(map(str, came))):
                tcp.set("irlfast/start", proposed)
        elif tcp.check(["irlfast/start"]):
            proposed = tcp.get("irlfast/start").decode()
        numbers = proposed.split(".")
        if len(numbers) == world_size() and numbers[rank()] == str(own):
            more, agreed = int(agreed != proposed), proposed
            if tcp.add(f"irlfast/agreed/{proposed}", more) == world_size():
                return proposed
        time.sleep(0.02)
    raise InputError(f"torchrun: not all of {world_size()} processes have come within {within:g} seconds")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


# ---------------------------------------------------------------- a process


def this_process() -> Member:
    return Member(machine(), os.getpid(), psutil.Process().create_time())


def machine() -> str:
    """Return a name for where process ids mean the same: a machine since it was booted, or a container on it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # only Linux has these
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def lost(store: Store) -> str:
    """Return words for a process that is known to have ended without a word; an empty text if there is none."""
    for number in range(world_size()):
        member = store.member(number)
        if member and has_ended(member):
            place = "" if member.machine == machine() else f", on {member.machine.split()[0]},"
            return f"process {number}{place} {LOST}"
    return ""


def has_ended(member: Member) -> bool:
    """Return whether a process is known to have ended; elsewhere only :mod:`irlfast.common.presence` sees it."""
    return member in GONE or (member.machine == machine() and not is_alive(member))


def is_alive(member: Member) -> bool:
    """Return whether a process of this machine still runs; one that its parent has not asked after does not."""
    try:
        process = psutil.Process(member.pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - member.created) < 1.0
    except psutil.NoSuchProcess:
        return False


# ---------------------------------------------------------------- together


def join(within: float = JOINED_WITHIN) -> None:
    """Join the other processes, if there are any.

    Raises:
        InputError: nothing serves the store.
    """
    global STORE
    if world_size() > 1 and not STORE:
        STORE = Store(within)


def meet() -> None:
    """Wait until all processes are here, however long that takes: one may sample, read or write for hours.

    A collective would end with an error after its time limit. If a process ends instead of coming, the watchdog ends
    this one.
    """
    if STORE:
        with waiting():
            STORE.meet("meeting")


def meet_beside(series: str) -> None:
    """Wait as :func:`meet` does, in a thread of each process, while their main threads go on and may meet."""
    if STORE:
        STORE.meet(series)


def ask_to_stop() -> None:
    """Ask the other processes to stop, too."""
    if not STORE:
        return
    from torch.distributed import DistError

    with contextlib.suppress(DistError):  # the process that serves the store has left already
        STORE.set("asked to stop", "yes")


def leave() -> None:
    """Part from the other processes, when all have done their work. From here on each ends by itself."""
    global STORE, LEFT
    if not STORE:
        return
    store, STORE, LEFT = STORE, None, True
    store.count("left", 1)
    if rank() == 0:  # which may serve the store: the others do not look at it any more
        wait_for(lambda: store.count("left") == world_size())


# ---------------------------------------------------------------- the end


def end_from_thread(code: int, sentence: str, stack: str = "") -> NoReturn:
    """End this process from a thread beside the main one, as :func:`end` does. No thread prints after the sentence."""
    os._exit(end(code, sentence, stack, is_last=True))


def end(code: int, sentence: str, stack: str = "", is_last: bool = False) -> int:
    """Say why this process ends, below a ``stack``, and return the exit code. ``is_last`` is that of :func:`say`.

    If there are other processes, they end, too. If one of them has failed before, this process is silent and returns
    the exit code of that one. If one has ended without a word before, that is what this process says.
    """
    if world_size() == 1 or LEFT:
        say(sentence, stack, is_last)
        return code
    from torch.distributed import DistError

    if not ENDING.acquire(blocking=False):
        time.sleep(4 * ANSWERED_WITHIN)  # the other thread ends the process
        return code
    cause, when = Failure(rank(), code, sentence), time.time()
    without_store = contextlib.suppress(DistError, InputError)  # each ends by itself then
    with without_store:
        join(ANSWERED_WITHIN)
        if gone := lost(connected()):  # that is why: torchrun asks the others to stop, connections break
            cause, stack = Failure(rank(), FAILED, f"{gone}; the same command resumes"), ""
        cause = Failure(*json.loads(connected().first("failure", json.dumps(cause))))
    if cause.said_by != rank():
        silence()
        with without_store:
            follow(connected(), cause.said_by)
        return cause.code
    with without_store:
        hear_all(connected())
    say(cause.sentence, stack, is_last)
    note_for_torchrun(printable(cause.sentence), when)
    with without_store:
        connected().set("said", "")
        wait_for(lambda: not others(connected(), "gone"))  # this process may serve the store
    return cause.code


def follow(store: Store, first: int) -> None:
    """Wait until the process that failed first has said why, and has ended: torchrun takes what ends first for it."""
    store.set(f"silent/{rank()}", "")
    wait_for(lambda: store.get("said") is not None)
    cause = store.member(first)
    store.set(f"gone/{rank()}", "")
    if rank() == 0:  # which may serve the store
        wait_for(lambda: not others(store, "gone", but=first))
    if cause and cause.machine == machine():
        wait_for(lambda: not is_alive(cause))


def hear_all(store: Store) -> None:
    """Wait until the other processes are silent. Kill those of this machine that do not answer: they are stopped."""
    wait_for(lambda: not others(store, "silent"))
    for number in others(store, "silent"):
        member = store.member(number)
        if member and member.machine == machine():
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)


def others(store: Store, answer: str, but: int | None = None) -> list[int]:
    """Return the ranks of the other processes that have not given an ``answer``, as far as they are known to live."""
    waits = []
    for number in range(world_size()):
        member = store.member(number)
        dead = member and has_ended(member)
        if number not in (rank(), but) and not dead and store.get(f"{answer}/{number}") is None:
            waits.append(number)
    return waits


def connected() -> Store:
    if not STORE:
        raise InputError("the store of the run is gone")
    return STORE


def wait_for(done: Callable[[], bool]) -> None:
    """Wait until something is done, but no longer than ANSWERED_WITHIN: one of the processes may be stopped."""
    until = time.monotonic() + ANSWERED_WITHIN
    while not done() and time.monotonic() < until:
        time.sleep(0.02)


def say(sentence: str, stack: str = "", is_last: bool = False) -> None:
    """Print one line to stderr, below a stack. The line names the process, if it is not the main one.

    After a line that ``is_last``, no thread of this process prints any more. If nobody reads stderr, nothing is said.
    """
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a live display hides it
    who = f", process {rank()}" if rank() else ""
    line = printable(f"irlfast{who}: {sentence}")
    stream = sys.stderr
    with contextlib.suppress(OSError):
        if is_last:
            stream = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors=sys.stderr.errors)
            silence()
        write_line(f"{show_cursor}{printable(stack, keep=KEPT)}{line}", stream)


def silence() -> None:
    """Print nothing any more, whichever library would."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def note_for_torchrun(sentence: str, when: float) -> None:
    """Give torchrun the sentence for its summary, which it prints last: its root cause is what failed first."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"message": sentence, "extraInfo": {"py_callstack": sentence, "timestamp": str(int(when) - 1)}}
        Path(path).write_text(json.dumps({"message": about}), encoding="utf-8")


def is_loss(error: BaseException) -> bool:
    """Return whether an error says no more than that another process is gone, or that waiting for it took too long."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo/transport" in str(error)
