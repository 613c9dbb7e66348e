"""The end of a command: an exit code, and one sentence about what went wrong."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from irlfast.common.files import InputError, LocalError

# Texts of the errors for a full disk: safetensors and torch raise errors of their own, not OSError.
UNWRITABLE = ("No space left", "Disk quota exceeded", "Read-only file system", "StreamWriter", "unexpected pos")


def run_command(job: Callable[[], None]) -> int:
    """Run ``job`` and return an exit code: 0 done, 2 bad input or an unwritable folder, 130 interrupted."""
    try:
        job()
    except InputError as error:
        print_error(str(error), every_process=isinstance(error, LocalError))
        return 2
    except KeyboardInterrupt:
        print_error("interrupted; the same command resumes")
        return 130
    return 0


@contextlib.contextmanager
def writing_to(place: str) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into an InputError that names the ``place``."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not any(sign in str(error) for sign in UNWRITABLE):
            raise
        raise LocalError(f"{place}: its disk is full or read-only; the same command resumes") from error


def print_error(message: str, every_process: bool = False) -> None:
    """Print one line to stderr, by the main process or by every process."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or every_process:
        print(f"irlfast{', process ' + rank if rank != '0' else ''}: {message}", file=sys.stderr)
