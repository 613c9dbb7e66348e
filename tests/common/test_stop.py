"""A process that a scheduler asks to stop: it leaves at once, or after the work that is worth finishing, with 75."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.killable import hear_signals
from tests.helpers.runs import ROOT

SIGNALS = [signal.SIGTERM, signal.SIGUSR1]
IN_C = "import hashlib; hashlib.pbkdf2_hmac('sha512', b'', b'', 2**31 - 1)"  # minutes in which no Python code runs
BEGUN = "print('begun', flush=True)"
COMMAND = """
import multiprocessing, os, sys, time
from irlfast.common import stop
from irlfast.common.command import run_command
from irlfast.common.messages import log

def job():
    {job}

sys.exit(run_command(job))
"""


def start(*lines: str) -> subprocess.Popen:
    """Start a command of irlfast that runs these lines, and wait until one of them, BEGUN, has run."""
    program = COMMAND.format(job="\n    ".join(lines))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = subprocess.Popen([sys.executable, "-c", program], **pipes, cwd=ROOT, preexec_fn=hear_signals)
    assert command.stdout.readline() == "begun\n"
    return command


def held(*lines: str, grace: float = 60) -> list[str]:
    return [f"stop.grant({grace})", "with stop.held('the work'):", *(f"    {line}" for line in (BEGUN, *lines))]


def end(command: subprocess.Popen) -> tuple[int, str]:
    """The exit code, and what the command printed to stderr."""
    _, err = command.communicate(timeout=30)
    return command.returncode, err


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("waiting", ["time.sleep(60)", IN_C], ids=["in Python", "in C"])
def test_a_command_that_is_asked_to_stop_leaves_at_once_with_75_and_a_sentence(number, waiting):
    command = start(BEGUN, waiting)
    command.send_signal(number)
    assert end(command) == (75, "irlfast: preempted; all that was finished is kept; the same command resumes\n")


@pytest.mark.parametrize("held_before", [False, True] * 3)
def test_no_thread_prints_after_the_sentence(held_before):
    """A thread that prints lets the others run, so that about every second time one of them would print more."""
    chatter = "while True: log('a line of the run') or sum(range(10_000))"
    command = start(
        "sys.setswitchinterval(1e-6)",
        *(held(chatter, grace=0.1) if held_before else [BEGUN, chatter]),
    )
    select.select([command.stderr], [], [], 30)  # until there is a line
    command.send_signal(signal.SIGTERM)
    code, said = end(command)
    *lines, last = said.splitlines()
    assert (code, {*lines}, last.startswith("irlfast: preempted; ")) == (75, {"a line of the run"}, True)


@pytest.mark.parametrize("number", SIGNALS)
def test_work_that_is_held_ends_first_and_nothing_after_it_begins(number, tmp_path):
    lines = held("while not stop.asked(): time.sleep(0.01)", f"open({str(tmp_path / 'done')!r}, 'w')")
    command = start(*lines, f"open({str(tmp_path / 'next')!r}, 'w')")
    command.send_signal(number)
    assert end(command) == (75, "irlfast: preempted after the work; the same command resumes\n")
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


@pytest.mark.parametrize("grace", [0, 1])
def test_a_grace_that_is_over_ends_the_process_wherever_it_is_and_says_what_is_lost(grace):
    command = start(*held(IN_C, grace=grace))
    begun = time.monotonic()
    command.send_signal(signal.SIGTERM)
    why = f"preempted; what takes longer than preemption_grace ({grace} seconds) is not kept"
    assert end(command) == (75, f"irlfast: {why}; the same command resumes\n")
    assert time.monotonic() - begun >= grace


def test_a_second_sigterm_ends_the_process_and_the_echo_of_the_first_does_not():
    command = start(*held(IN_C))
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        command.send_signal(number)
    time.sleep(2.5)
    assert command.poll() is None
    command.send_signal(signal.SIGTERM)
    assert end(command) == (75, "irlfast: preempted again; what was begun is not kept; the same command resumes\n")


def test_an_error_that_another_process_causes_by_leaving_is_no_traceback():
    command = start(*held("while not stop.asked(): time.sleep(0.01)", "raise RuntimeError('peer closed it')"))
    command.send_signal(signal.SIGTERM)
    assert end(command) == (75, "irlfast: preempted (peer closed it); the same command resumes\n")


def test_a_signal_to_a_forked_child_does_not_reach_its_parent():
    lines = [
        BEGUN,
        "child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))",
        "child.start()",
        "time.sleep(0.2)",
        "child.terminate()",
        "child.join()",
        "print(child.exitcode, stop.asked(within=0.5), file=sys.stderr)",
    ]
    assert end(start(*lines)) == (0, "-15 False\n")


@pytest.mark.parametrize("work", [[BEGUN, "time.sleep(60)"], held("while not stop.asked(): time.sleep(0.01)")])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_whose_messages_nobody_reads_any_more_still_leaves(number, work):
    command = start(*work)
    command.stderr.close()  # as where `tee` was killed, or a connection to the machine was lost
    command.send_signal(number)
    assert command.wait(timeout=30) == 75


def test_a_refusal_that_nobody_reads_has_its_exit_code():
    command = start(
        BEGUN, "sys.stdin.readline()", "from irlfast.common.files import InputError", "raise InputError('no')"
    )
    command.stderr.close()
    command.stdin.close()
    assert command.wait(timeout=30) == 2


def test_a_command_that_is_interrupted_still_ends_with_130():
    command = start(BEGUN, "time.sleep(60)")
    command.send_signal(signal.SIGINT)
    assert end(command) == (130, "irlfast: interrupted; the same command resumes\n")


def test_after_a_command_the_signals_have_their_own_effects_again():
    before = signal.getsignal(signal.SIGTERM)
    from irlfast.common.command import run_command

    assert run_command(lambda: os.getpid()) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_an_interrupt_in_which_a_library_fails_to_tidy_up_ends_as_an_interrupt():
    tidy = "raise AttributeError('save_required')"  # as argparse does when it is interrupted
    command = start("try:", f"    {BEGUN}", "    time.sleep(60)", f"finally: {tidy}")
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=60)
    assert (command.returncode, err) == (130, "irlfast: interrupted; the same command resumes\n")
