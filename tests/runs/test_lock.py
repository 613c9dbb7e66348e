"""One run at a time in a folder, also where the file system has no locks or is that of another machine."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from irlfast.common import ranks
from irlfast.common.files import InputError
from irlfast.runs import lock as lock_module
from irlfast.runs.lock import LENGTH, Owner, lock, release
from tests.helpers.hold_lock import no_lock
from tests.helpers.runs import ROOT
from tests.helpers.tiers import first_then_full


@pytest.fixture
def quick(monkeypatch):
    """Heartbeats of a test, which need not wait for those of a slow file system."""
    monkeypatch.setattr(lock_module, "BEAT", 0.2)
    monkeypatch.setattr(lock_module, "DEAD", 2.0)
    monkeypatch.setattr(lock_module, "SETTLED", 0.5)


def started(folder, *how):
    """A process that locks the folder."""
    command = [sys.executable, "-m", "tests.helpers.hold_lock", str(folder), *how]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def elsewhere(beat: int) -> Owner:
    """An owner on another machine, which began two hours ago."""
    return Owner(ranks.Member("node7 boot namespace", 41, 5.0), time.time() - 7200, beat)


def write_by_other(path, owner: Owner) -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    lock_module.write(file, owner)
    os.close(file)


def test_an_owner_on_another_machine_lives_as_long_as_its_heart_beats(tmp_path, quick, capsys):
    path, ended = tmp_path / ".lock", threading.Event()

    def beat():
        number = 0
        while not ended.wait(0.3):
            write_by_other(path, elsewhere(number))
            number += 1

    write_by_other(path, elsewhere(0))
    heart = threading.Thread(target=beat)
    heart.start()
    with pytest.raises(InputError, match=r"process 41 on node7, started \S+ \S+ \(120 minutes ago\), is running in it"):
        lock(tmp_path)
    ended.set()
    heart.join()
    begun = time.monotonic()
    lock(tmp_path)
    assert time.monotonic() - begun >= lock_module.DEAD
    assert "has not said that it ended; waiting 2 seconds for its heartbeat" in capsys.readouterr().err
    release(path)
    assert path.read_text() == ""
    lock(tmp_path)  # who gave its lock back is not waited for
    assert not capsys.readouterr().err
    release(path)


def test_without_locks_of_the_system_a_living_owner_is_found_and_a_killed_one_is_not_waited_for(
    tmp_path, quick, monkeypatch
):
    monkeypatch.setattr(fcntl, "lockf", no_lock)
    holder = started(tmp_path, "without")
    owner, child = map(int, holder.stdout.readline().split())
    os.kill(child, signal.SIGKILL)
    with pytest.raises(InputError, match=rf"process {owner} on \S+, started .* is running in it"):
        lock(tmp_path)
    holder.kill()
    holder.wait()
    lock(tmp_path)
    release(tmp_path / ".lock")


def test_when_two_take_a_folder_without_locks_at_once_one_gets_it(tmp_path):
    holders = [started(tmp_path, "without") for _ in range(2)]
    lines = [holder.stdout.readline() for holder in holders]
    try:
        assert sum(map(bool, lines)) == 1
        [loser] = [holder for holder, line in zip(holders, lines, strict=True) if not line]
        assert loser.wait(60) == 2
        assert "is running in it; expected another folder" in loser.stderr.read().splitlines()[-1]
    finally:
        for holder, line in zip(holders, lines, strict=True):
            holder.kill()
            for child in line.split()[1:]:
                os.kill(int(child), signal.SIGKILL)


@pytest.mark.parametrize("how", first_then_full(["overwritten", "replaced"]))
def test_a_run_whose_folder_another_one_takes_ends(tmp_path, how):
    holder = started(tmp_path)
    _, child = map(int, holder.stdout.readline().split())
    if how == "replaced":
        (tmp_path / ".lock").unlink()
    write_by_other(tmp_path / ".lock", elsewhere(0))
    try:
        assert holder.wait(60) == 2
        assert (
            holder.stderr.readline() == f"irlfast: output_dir {tmp_path}: another process has taken it; this run ends\n"
        )
        assert (tmp_path / ".lock").stat().st_size == LENGTH  # the other's file is as it was
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("content", ["", "process 1 on a, started 2026-01-01,", "{}", "[[1],2,3]", "\0" * LENGTH])
def test_a_lock_file_that_names_no_owner_is_taken(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    lock(tmp_path)
    release(tmp_path / ".lock")
