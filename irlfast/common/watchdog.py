"""A thread that ends this process when its work has lost its sense, whatever the other threads wait for.

It looks twice per second:

- The launcher (torchrun, deepspeed, srun) has ended. Its processes would train on, and nobody would know.
- Another process has failed, has ended without a word, or was asked to stop.
- Nothing has moved for ``stall_timeout`` seconds (:mod:`irlfast.common.movement`).

Time is counted in looks: a process that was stopped as a whole, as by the suspend of a machine, has not looked.
"""

import contextlib
import dataclasses
import os
import sys
import threading
import time
import traceback
from collections.abc import Hashable
from pathlib import Path

import psutil

from irlfast.common import ranks, stop
from irlfast.common.movement import MOVEMENT
from irlfast.common.presence import Presence

PERIOD = 0.5  # seconds between two looks
BEAT = 5.0  # seconds between two heartbeats of a process
SILENCE = 120.0  # seconds without a heartbeat, after which a process or its machine counts as gone
STALLED = 124  # exit code: nothing moved, as timeout(1) has it
SHELLS = ("sh", "ash", "bash", "csh", "dash", "fish", "ksh", "tcsh", "zsh")
FRAMES = 6  # of a stack that is printed


@dataclasses.dataclass
class Still:
    """For how many seconds a value has been the same."""

    value: Hashable = None
    seconds: float = 0.0

    def look(self, value: Hashable) -> float:
        self.seconds = self.seconds + PERIOD if value == self.value else 0.0
        self.value = value
        return self.seconds


@dataclasses.dataclass
class Watch:
    """The knowledge of the thread."""

    output: Path
    stall_timeout: float  # seconds; 0: no limit
    launcher: int | None  # its process id
    looks: int = 0
    own: Still = dataclasses.field(default_factory=Still)
    neighbour: Still = dataclasses.field(default_factory=Still)
    presence: Presence = dataclasses.field(default_factory=Presence)


def start(output: Path, stall_timeout: float) -> None:
    """Watch this process until it ends, and join the others of its run. Stacks are written into ``output``."""
    watch = Watch(output, stall_timeout, launcher())
    threading.Thread(target=run, args=(watch,), name="watchdog", daemon=True).start()
    ranks.join()


def launcher() -> int | None:
    """Return the process that started this one as a part of a run; None if a person or a shell started it.

    A process that a person started may outlive its shell, by nohup, say.
    """
    parent = psutil.Process().parent()
    return None if "RANK" not in os.environ or parent is None or parent.name() in SHELLS else parent.pid


def run(watch: Watch) -> None:
    while True:
        look_at_launcher(watch)
        if ranks.STORE:
            look_at_others(watch, ranks.STORE)
        if watch.stall_timeout:
            look_at_this_process(watch)
        watch.looks += 1
        time.sleep(PERIOD)


def look_at_launcher(watch: Watch) -> None:
    if watch.launcher and os.getppid() != watch.launcher:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            ranks.say(f"the launcher, process {watch.launcher}, has ended; the same command resumes", is_last=True)
        os._exit(ranks.FAILED)


def look_at_others(watch: Watch, store: ranks.Store) -> None:
    """End this process if another one has failed or is gone, and ask it to stop if another one was asked.

    A process that is ending already is left alone: Python aborts it (exit code 134) if it finds this thread in the
    store's C++ code.
    """
    import torch.distributed

    if ranks.ENDING.locked():
        return
    try:
        failure = store.failure()
        if failure and failure.said_by != ranks.rank():
            if failure.code == STALLED:
                note_stacks(watch, failure.sentence)
            ranks.end_from_thread(failure.code, failure.sentence)
        if not failure and (gone := gone_process(watch, store)):
            ranks.end_from_thread(ranks.FAILED, f"{gone}; the same command resumes")
        if not stop.asked() and store.get("asked to stop"):
            stop.ask()
    except torch.distributed.DistError:
        if ranks.STORE is store:  # this process has not left
            time.sleep(PERIOD)
            look_at_launcher(watch)  # which may have served the store
            if speaks_for_first(store):
                ranks.say(f"process 0, or its launcher, {ranks.LOST}; the same command resumes", is_last=True)
            os._exit(ranks.FAILED)


def speaks_for_first(store: ranks.Store) -> bool:
    """Return whether it is this process that says that process 0 is gone: the first one on another machine, if any."""
    machines = {number: member.machine for number, member in sorted(store.known.items())}
    away = [number for number, machine in machines.items() if machine != machines.get(0)]
    return ranks.rank() == (away[0] if away else 1)


def gone_process(watch: Watch, store: ranks.Store) -> str:
    """Return words for a process that has ended, has not come, or gives no sign of life; an empty text if none is."""
    away = watch.presence.gone(store)
    if away and not store.count("left") and not store.failure():
        ranks.GONE.add(away)
    if (dead := ranks.lost(store)) and not store.count("left"):  # the work of all is done once one has left
        return dead
    if watch.looks * PERIOD >= ranks.JOINED_WITHIN and (absent := store.absent()):
        return f"process {absent[0]} has not come within {ranks.JOINED_WITHIN:g} seconds"
    if not watch.stall_timeout:
        return ""
    if watch.looks % int(BEAT / PERIOD) == 0:
        store.set(f"beat/{ranks.rank()}", str(watch.looks))
    neighbour = (ranks.rank() + 1) % ranks.world_size()
    beat, limit = store.get(f"beat/{neighbour}"), min(SILENCE, watch.stall_timeout + BEAT)
    if watch.neighbour.look(beat) < limit or beat is None:
        return ""
    return f"process {neighbour} has given no sign of life for {limit:g} seconds (stopped, or its machine is gone)"


def look_at_this_process(watch: Watch) -> None:
    """Warn if nothing has moved for ``stall_timeout`` seconds. End this process if its work is in small units."""
    seconds = watch.own.look((MOVEMENT.count, MOVEMENT.doing))
    if seconds < watch.stall_timeout or MOVEMENT.when_still == "ignore":
        return
    watch.own.seconds = 0.0
    sentence = f"{MOVEMENT.doing}: nothing has moved for stall_timeout, {watch.stall_timeout:g} seconds"
    stack, log = main_stack(), note_stacks(watch, sentence)
    if MOVEMENT.when_still == "end":
        ranks.end_from_thread(STALLED, f"{sentence}; stacks are in {log}; the same command resumes", stack)
    ranks.say(f"warning: {sentence}; it goes on, as this may take long; stacks are in {log}", stack)


def main_stack() -> str:
    """Return the innermost frames of the main thread, as a traceback shows them."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return "".join(traceback.format_stack(frame)[-FRAMES:])


def note_stacks(watch: Watch, sentence: str) -> Path:
    """Append the stacks of all threads to ``stall-RANK.log``, and return its path."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = [f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {ranks.rank()}, {os.getpid()}: {sentence}\n"]
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        lines += [f"thread {names.get(ident, ident)}:\n", *traceback.format_stack(frame)]
    path = watch.output / f"stall-{ranks.rank()}.log"
    with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as log:  # a full disk may be the cause
        log.writelines(lines)
    return path
