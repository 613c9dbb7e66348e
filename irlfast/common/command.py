"""The end of a command: an exit code, and one sentence about what went wrong."""

import contextlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator

from irlfast.common import launch, ranks, stop
from irlfast.common.files import LOST, InputError, free_bytes, home_path

# What the errors of a disk say, and what it means: safetensors and torch raise errors of their own, not OSError.
UNWRITABLE = {
    "No space left": "is full",
    "Disk quota exceeded": "is full: the quota is used up",
    "Read-only file system": "is read-only",
    "Input/output error": "has failed (input/output error)",
    LOST: "has lost a part of what was written",
    "StreamWriter": "is full or has failed",
    "unexpected pos": "is full or has failed",
}
EXPLAINED_WITHIN = 10.0  # seconds in which the watchdog sees why a connection broke
# Where torch keeps compiled code that it runs later. Its own place in /tmp has a name that another user can take first.
COMPILED = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "irlfast", "inductor")


def run_command(job: Callable[[], None]) -> int:
    """Run ``job`` and return an exit code.

    The codes: 0 done, 1 any error, 2 bad input or an unwritable folder, 75 asked to stop (:mod:`irlfast.common.stop`),
    130 interrupted. An error that is not the user's is printed with its traceback, in which secrets are redacted. With
    several processes all return the code of the first that fails.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", COMPILED)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # where the run says one sentence, torch prints stacks
    with stop.listening():
        try:
            launch.take_place()
            job()
        except stop.Preempted as reached:
            return ranks.end(stop.PREEMPTED, f"{reached}; {stop.RESUMES}")
        except (Exception, KeyboardInterrupt) as error:
            if came_of_interrupt(error):
                return ranks.end(130, f"interrupted; {stop.RESUMES}")
            if stop.asked():  # what waits for a process that has left fails
                return ranks.end(stop.PREEMPTED, f"preempted ({error}); {stop.RESUMES}")
            if isinstance(error, InputError):
                return ranks.end(2, str(error))
            if ranks.world_size() > 1 and ranks.is_loss(error):
                time.sleep(EXPLAINED_WITHIN)  # the watchdog ends this process meanwhile, if it knows who is gone
                said = str(error).partition("\n")[0]
                return ranks.end(1, f"another process is gone, or did not answer in time ({said}); {stop.RESUMES}")
            return ranks.end(1, f"{type(error).__name__}: {error}", traceback.format_exc())
    return 0


def came_of_interrupt(error: BaseException | None) -> bool:
    """Return whether an error is an interrupt, or came of one: what a library tidies up then may fail in turn."""
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


@contextlib.contextmanager
def writing_to(path: str, key: str = "") -> Iterator[None]:
    """Turn the errors of a disk that is full, read-only or failing into an InputError that names the ``path``."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        what = next((meaning for sign, meaning in UNWRITABLE.items() if sign in str(error)), "")
        if not what:
            raise
        free = [f"{free_bytes(home_path(place)) / 1e9:.1f} GB" for place in (path, tempfile.gettempdir())]
        room = f"; {free[0]} are free there, and {free[1]} for temporary files" if "full" in what else ""
        raise InputError(f"{key} {path}: its disk {what}{room}; the same command resumes".lstrip()) from error
