"""The progress of a phase: a live display on a terminal, lines elsewhere; both tell the time left for the whole run."""

import os
import pty
import re
import subprocess
import sys

from tests.helpers.runs import ROOT

SCRIPT = """
from irlfast.common.messages import Progress, log
from irlfast.common.time_left import CLOCK, Part
import time
CLOCK.plan([Part("a", "answers", 0), Part("stage-00", "irft", 8), Part("b", "answers", 4)], 0)
CLOCK.train("stage-00", 0.0)
with Progress("stage-00", 4, "step") as progress:
    for step in range(1, 5):
        time.sleep(0.3)
        CLOCK.train("stage-00", step / 4)
        progress.advance()
        progress.show(f"loss 0.{step}  memory 1.00 GiB")
        if step == 2:
            log("a message\\x1b[2Jthat clears")
with Progress("a\\x1b[2Jb", None, "row", seconds=10.0) as progress:
    progress.advance(1234)
    progress.show()
CLOCK.plan([], 0)
print("the end", flush=True)
"""


def on_terminal() -> str:
    """Run the script with its stderr on a terminal, and return what came there."""
    reader, writer = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=writer, stdout=subprocess.PIPE, env=environment)
    os.close(writer)
    text = b""
    while piece := read(reader):
        text += piece
    assert child.communicate(timeout=60)[0] == b"the end\n"
    assert child.returncode == 0, text
    return text.decode()


def read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # how Linux says that no program has the terminal open
        return b""


def test_a_terminal_has_a_live_display_and_the_messages_stay_above_it():
    shown = on_terminal()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "\x1b[2J" not in shown
    assert "a message\\x1b[2Jthat clears" in plain
    for step in range(1, 5):
        assert re.search(rf"stage-00 [━╸╺ ]+ step {step}/4\r\nloss 0\.{step}  memory 1\.00 GiB\r\n", plain)
    assert re.search(r"about \d seconds left in this phase, about \d seconds left in the whole run", plain)
    assert re.search(
        r"stage-00: step 4/4, loss 0\.4  memory 1\.00 GiB, about 1 seconds left in the whole run\r\n", plain
    )
    assert "a\\x1b[2Jb: row 1,234" in plain


def test_a_file_gets_whole_lines(capsys):
    exec(SCRIPT, {})
    first, second, message, *rest = capsys.readouterr().err.splitlines()
    form = r"[-0-9]{10} [:0-9]{8} stage-00: step (\d)/4, loss 0\.\1  .*"
    steps = [re.fullmatch(form, line) for line in (first, second, *rest)]
    assert [match[1] for match in steps if match] == ["1", "2", "3", "4"]
    assert message == "a message\\x1b[2Jthat clears"
    assert re.search(r"loss 0\.2 .*, about \d seconds left in the whole run$", second)
    assert len(rest) == 2  # the rows are quicker than ten seconds
