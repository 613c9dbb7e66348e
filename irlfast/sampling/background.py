"""Sampling in the background: a thread of the main process has vLLM answer while the main thread trains.

The thread only hands token ids to vLLM and keeps the answers, shard by shard. It runs no model, because torch's default
type and random state belong to all threads. What it has not answered, for whatever reason, the next sampling answers.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

from irlfast.common.messages import first_sentence, log
from irlfast.common.movement import at_length


@dataclasses.dataclass
class Work:
    """The work of the thread."""

    folder: Path  # where its first answers are kept
    do: Callable[[], int]  # returns how many answers it kept
    thread: threading.Thread | None = None
    begun: float = 0.0
    kept: int = 0
    seconds: float = 0.0
    error: BaseException | None = None


AT_WORK: list[Work] = []  # one at most


def begin_work(folder: Path, do: Callable[[], int]) -> None:
    """Start the thread."""
    assert not AT_WORK
    work = Work(folder, do, begun=time.monotonic())
    work.thread = threading.Thread(target=run, args=(work,), name="sampling", daemon=True)
    AT_WORK.append(work)
    work.thread.start()


def run(work: Work) -> None:
    try:
        work.kept = work.do()
    except BaseException as error:  # whatever ends it, the next sampling meets it again, or answers what is left
        work.error = error
    work.seconds = time.monotonic() - work.begun


def end_work() -> dict[Path, float]:
    """Wait until the thread has ended, if there is one, and log what it did. Return its folder, and the seconds."""
    if not AT_WORK:
        return {}
    work, begun = AT_WORK.pop(), time.monotonic()
    assert work.thread
    label = f"{work.folder.parent.name}/{work.folder.name}"
    with at_length(f"waiting for {label}"):
        work.thread.join()
    waited = time.monotonic() - begun
    if work.error:
        why = first_sentence(work.error) or type(work.error).__name__
        log(f"warning: {label}: sampling beside training ended ({why}); what is left is sampled now")
    else:
        log(f"{label}: {work.kept:,} answers in {work.seconds:.1f} s beside training, and {waited:.1f} s of waiting")
    return {work.folder: waited}
