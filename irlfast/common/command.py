"""How a command ends: what went wrong in one sentence, and an exit code."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from irlfast.common.files import InputError, LocalError

# safetensors and torch report a full disk by errors of their own, not as OSError
UNWRITABLE = ("No space left", "Disk quota exceeded", "Read-only file system", "StreamWriter", "unexpected pos")


def exit_code(job: Callable[[], None]) -> int:
    """Of a command that does ``job``: 0 done, 2 bad input or an unwritable folder, 130 interrupted."""
    try:
        job()
    except InputError as error:
        return fail(str(error), 2, local=isinstance(error, LocalError))
    except KeyboardInterrupt:
        return fail("interrupted; the same command resumes", 130)
    return 0


@contextlib.contextmanager
def writing_to(place: str) -> Iterator[None]:
    """Errors of a full or read-only disk become an InputError that names the ``place``."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not any(sign in str(error) for sign in UNWRITABLE):
            raise
        raise LocalError(f"{place}: its disk is full or read-only; the same command resumes") from error


def fail(message: str, code: int, local: bool = False) -> int:
    rank = os.environ.get("RANK", "0")
    if rank == "0" or local:
        print(f"irlfast{', process ' + rank if rank != '0' else ''}: {message}", file=sys.stderr)
    return code
