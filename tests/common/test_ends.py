"""How the processes of a run end: when one fails, is killed or stopped, or when their launcher is gone."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from irlfast.common import command, ranks, watchdog
from tests.helpers.runs import ROOT, TORCHRUN, Forked, as_torchrun
from tests.helpers.tiers import first_then_full, full, slow

SECONDS = 30  # in which all have ended
SENTENCES = {
    "refused at the start": (2, "the start is refused"),
    "refused": (2, "the data are refused"),
    "InputError": (2, "the rows are refused"),
    "ValueError": (1, "ValueError: a mistake"),
}


def steps(folder: Path, how: str, rank: int = 1, stall_timeout: float = 0) -> list[str]:
    return ["-m", "tests.helpers.ending", str(folder), how, str(rank), str(stall_timeout)]


def started(folder: Path, count: int = 2) -> list[psutil.Process]:
    """The processes that write their ids into the folder, when all have."""
    paths = [folder / f"process-{rank}" for rank in range(count)]
    wait_until(lambda: all(path.exists() and path.read_text() for path in paths))
    return [psutil.Process(int(path.read_text())) for path in paths]


def wait_until(true) -> None:
    until = time.monotonic() + 120
    while not true():
        assert time.monotonic() < until, "they do not start"
        time.sleep(0.02)


def outcome(folder: Path, how: str, rank: int = 1, stall_timeout: float = 0, count: int = 2):
    """The exit codes of processes in steps, and what they printed; all of them end within SECONDS."""
    run = Forked(steps(folder, how, rank, stall_timeout), count)
    try:
        started(folder, count)
        until = time.monotonic() + SECONDS + stall_timeout
        for process in run.processes:
            process.join(until - time.monotonic())
        codes = [process.exitcode for process in run.processes]
    finally:
        for process in run.processes:
            process.kill()
    return codes, Path(run.folder.name, "err").read_text()


@pytest.mark.parametrize(
    ("how", "rank"),
    [
        ("InputError", 1),
        *[
            pytest.param(how, rank, marks=full if (how, rank) in (("refused", 1), ("ValueError", 0)) else slow)
            for how in SENTENCES
            for rank in (0, 1)
            if (how, rank) != ("InputError", 1)
        ],
    ],
)
def test_when_a_process_fails_all_end_with_its_exit_code_and_its_sentence_is_the_last(tmp_path, how, rank):
    codes, err = outcome(tmp_path / "run", how, rank)
    code, sentence = SENTENCES[how]
    assert codes == [code, code]
    assert err.splitlines()[-1] == f"irlfast{', process 1' if rank else ''}: {sentence}"
    assert err.count("irlfast") - err.count("irlfast/") == 1
    assert err.count("Traceback") == (code == 1)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=slow)])
def test_when_a_process_is_killed_the_others_end_and_say_which(tmp_path, rank):
    codes, err = outcome(tmp_path / "run", "SIGKILL", rank, count=3)
    assert codes[rank] == -signal.SIGKILL
    assert {codes[other] for other in range(3) if other != rank} == {1}
    who = "process 1" if rank else "process 0, or its launcher,"
    assert err.splitlines()[-1].endswith(f"{who} ended without a word (killed?); the same command resumes")
    assert "Traceback" not in err


@pytest.mark.parametrize(("how", "left"), [("hang", 124), pytest.param("SIGSTOP", -signal.SIGKILL, marks=full)])
def test_a_process_that_hangs_or_is_stopped_in_a_step_ends_all_with_their_stacks(tmp_path, how, left):
    codes, err = outcome(tmp_path / "run", how, stall_timeout=10)
    assert {*codes} == {124, left}
    assert ": stage-00: nothing has moved for stall_timeout, 10 seconds; stacks are in " in err.splitlines()[-1]
    stacks = [path.read_text() for path in sorted((tmp_path / "run").glob("stall-*.log"))]
    assert len(stacks) == (2 if how == "hang" else 1)
    assert "all_reduce" in stacks[0]
    assert how != "hang" or "in end\n    time.sleep(3600)" in stacks[1]


def test_a_process_that_never_comes_is_named_when_its_time_is_over(tmp_path, monkeypatch):
    for name, value in as_torchrun(2)[0].items():
        monkeypatch.setenv(name, value)
    store = ranks.Store(10.0)
    early, late = (watchdog.Watch(tmp_path, 0.0, None, looks=looks) for looks in (1199, 1200))
    assert watchdog.gone_process(early, store) == ""
    assert watchdog.gone_process(late, store) == "process 1 has not come within 600 seconds"


@full
@pytest.mark.parametrize("how", ["slow", "takes long"])
def test_long_work_of_one_process_ends_nothing(tmp_path, how):
    codes, err = outcome(tmp_path / "run", how, 0, stall_timeout=8, count=1 if how == "takes long" else 2)
    assert {*codes} == {0}
    warned = "a download: nothing has moved for stall_timeout, 8 seconds; it goes on, as this may take long"
    assert (warned in err) == (how == "takes long")


@pytest.mark.parametrize("launched", first_then_full([True, False]))
def test_processes_end_with_their_launcher_and_one_that_a_shell_started_outlives_the_shell(tmp_path, launched):
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    shell = ["sh", "-c", f"{shlex.join([sys.executable, *steps(tmp_path / 'run', 'none')])} & wait"]
    command = [*TORCHRUN, *steps(tmp_path / "run", "none")] if launched else shell
    with (tmp_path / "err").open("w") as err:
        launcher = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=err, stderr=err, start_new_session=True)
    processes = started(tmp_path / "run", 2 if launched else 1)
    wait_until((tmp_path / "run" / "steps").exists)
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(processes, timeout=SECONDS if launched else 3)
    for process in alive:
        process.kill()
    assert len(alive) == (not launched)
    last = (tmp_path / "err").read_text().splitlines()[-1:]
    assert not launched or last == [
        f"irlfast: the launcher, process {launcher.pid}, has ended; the same command resumes"
    ]


def test_a_broken_connection_that_nothing_explains_is_one_sentence(monkeypatch):
    """Processes of another machine, without an agent that knows them."""
    ended = []
    monkeypatch.setattr(command, "EXPLAINED_WITHIN", 0.0)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "end", lambda *given: ended.append(given) or given[0])

    def job():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Read error: Connection reset by peer\nframe #0: …")

    assert command.run_command(job) == 1
    [(code, sentence)] = ended  # without a stack
    assert code == 1 and "another process is gone" in sentence and "Connection reset by peer" in sentence
    assert "frame" not in sentence and sentence.endswith("the same command resumes")
