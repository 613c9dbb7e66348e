"""A folder that all processes of a run share: they read what the main process writes, on whichever machine they are."""

import socket
import time
import uuid
from pathlib import Path

from irlfast.common import ranks
from irlfast.common.files import InputError, temporary_name

SEEN_WITHIN = 20.0  # seconds in which a file of one machine must be visible on the others


def check_shared(output: Path) -> None:
    """Check, in every process, that all see the files that the main process writes into ``output``.

    The folder may not exist yet: then its nearest parent is tried. The processes talk through the store, as this check
    comes before their process group exists.

    Raises:
        InputError: some process does not see them; the message names it and its machine.
    """
    store = ranks.STORE
    if not store:
        return
    places = [output.absolute(), *output.absolute().parents]
    if ranks.rank() == 0:
        level = next(i for i, place in enumerate(places) if place.is_dir())
        probe = temporary_name(places[level] / f".irlfast-{uuid.uuid4().hex}")
        probe.touch()
        store.set("probe", f"{level} {probe.name} {socket.gethostname()}")
    ranks.meet()
    steps, name, machine = (store.get("probe") or "").split(" ")
    seen = int(steps) < len(places) and appears(places[int(steps)] / name)
    store.set(f"probe/{ranks.rank()}", "" if seen else f"{socket.gethostname()} as {output.absolute()}")
    ranks.meet()
    if ranks.rank() == 0:
        probe.unlink()
    for number in range(ranks.world_size()):
        if where := store.get(f"probe/{number}"):
            raise InputError(
                f"output_dir {output}: process {number}, on {where}, does not see what process 0 writes on {machine}; "
                "expected a folder that all machines share"
            )


def appears(path: Path) -> bool:
    """Return whether a file is there, or comes in time: a file system of a network may be late."""
    until = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True
