"""A checkpoint is written beside training: a thread writes copies of the state while the next steps are taken.

At most one checkpoint is in work: the next one waits for it. The threads of several processes meet in the store, and
are in no collective. What keeps a checkpoint from being written is raised in the main thread, by :func:`check` before
the next step, or by :func:`finish`.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

import psutil
import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.messages import log
from irlfast.common.movement import at_length
from irlfast.common.stop import Preempted

Files = Iterable[tuple[str, dict[str, Tensor]]]  # names of files, and what they hold
ROOM = 0.5  # of the free host memory, which a copy may take: the next steps may need more than is in use now
LONG = 1.0  # seconds of a wait that is worth a line
ALIGNED = 64  # bytes: where a tensor begins in a buffer


@dataclasses.dataclass
class Saving:
    """How a phase writes its checkpoints, and the one that is in work."""

    phase: str
    beside: bool  # async_save; False, too, once host memory had no room for a copy
    tried: bool = False  # whether it is known that a copy has room
    step: int = 0  # of the last checkpoint
    written: Future[None] | None = None  # the end of its writing


@contextlib.contextmanager
def saving_beside(phase: str, wanted: bool) -> Iterator[Saving]:
    """Give the state of a phase's checkpoints. The end of the context waits for the one in work, but not at Ctrl-C."""
    saving = Saving(phase, wanted)
    try:
        yield saving
    except Preempted:
        finish(saving)
        raise
    except Exception:
        with contextlib.suppress(Exception):  # what has ended the phase is what is told
            finish(saving)
        raise
    finish(saving)


def begin(saving: Saving, step: int, files: Files, write: Callable[[Files], None]) -> None:
    """Let a thread ``write`` copies of the files of a checkpoint; without room for them, write the files at once."""
    if saving.beside and not saving.tried:
        files = [*files]
        saving.tried, saving.beside = True, has_room(saving.phase, files)
    if not saving.beside:
        write(files)
        return
    copies = [(name, copied(tensors)) for name, tensors in files]
    ready = torch.cuda.Event() if dist.device().type == "cuda" else None
    if ready:
        ready.record()
    written: Future[None] = Future()

    def work() -> None:
        try:
            if ready:
                ready.synchronize()
            write(copies)
        except BaseException as error:
            written.set_exception(error)
        else:
            written.set_result(None)

    threading.Thread(target=work, name="checkpoint", daemon=True).start()
    saving.step, saving.written = step, written


def check(saving: Saving) -> None:
    """Raise the error of the last checkpoint, if there is one by now."""
    if saving.written and saving.written.done():
        saving.written.result()


def finish(saving: Saving) -> None:
    """Wait until the last checkpoint, all processes' parts of it, is on the disk; raise what keeps it from there."""
    begun = time.monotonic()
    if saving.written:
        with at_length(f"{saving.phase}, writing a checkpoint"):
            saving.written.result()
    saving.written = None
    if (seconds := time.monotonic() - begun) > LONG:
        log(f"{saving.phase} waited {seconds:.1f} s for its checkpoint of step {saving.step:,}")


def has_room(phase: str, files: Files) -> bool:
    """Return whether copies of the files have room in host memory; say so if not. Each process has its share of it."""
    needed = sum(values.nbytes for _, tensors in files for values in tensors.values())
    free = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size()))
    if needed <= ROOM * free:
        return True
    log(
        f"{phase}: training waits while a checkpoint is written: its copy would take {needed / 2**30:,.1f} GiB of "
        f"{free / 2**30:,.1f} GiB of free host memory (async_save)"
    )
    return False


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors into one buffer of host memory. A GPU's copies come after the kernels that are launched by now."""
    lengths = [-(-values.nbytes // ALIGNED) * ALIGNED for values in tensors.values()]
    buffer = torch.empty(sum(lengths), dtype=torch.uint8, pin_memory=dist.device().type == "cuda")
    copies = {}
    for (name, values), part in zip(tensors.items(), buffer.split(lengths), strict=True):
        copies[name] = part[: values.nbytes].view(values.dtype).view(values.shape)
        copies[name].copy_(values.detach(), non_blocking=True)
    return copies
