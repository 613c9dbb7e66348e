"""``irlfast watch`` shows a run while it goes on, to this machine alone, and never touches the run's files."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from irlfast import watch
from irlfast.common.files import InputError
from irlfast.reports.page import report_text
from irlfast.watch import LiveReport, make_server, state_of
from tests.helpers.killable import hear_signals
from tests.helpers.pages import CHROMIUM, chromium
from tests.helpers.runs import ROOT


@pytest.fixture
def copied(finished, tmp_path):
    """Copy a finished run without its weights and its report."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("*.safetensors", "samples", "report.html"))
    return folder


@pytest.fixture
def served(copied, monkeypatch):
    monkeypatch.setattr(watch, "REST", 0)
    with make_server(copied, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield copied, server.server_address[1]
        server.shutdown()
        thread.join()


def ask(port: int, path: str = "/report", method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text, dict(response.getheaders())


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_the_report_is_the_one_that_report_writes_and_new_only_when_a_file_has_changed(served):
    folder, port = served
    before = files(folder)
    status, text, headers = ask(port)
    assert (status, text) == (200, report_text(folder))
    assert ask(port, If_None_Match=headers["ETag"])[:2] == (304, "")
    assert files(folder) == before
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"phase": "stage-01", "step": 5, "loss": 1.5}\n{"phase": "sta')  # and half a row
    status, text, later = ask(port, If_None_Match=headers["ETag"])
    assert (status, later["ETag"] != headers["ETag"]) == (200, True)
    assert "metrics.jsonl: 1 unreadable line left out." in text


def test_only_get_of_two_pages_under_this_machines_names_is_answered(served):
    folder, port = served
    for host in ("127.0.0.1", f"127.0.0.1:{port}", "localhost", "localhost:9999", "LOCALHOST"):
        assert ask(port, "/", Host=host)[0] == 200
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "",
        "127.0.0.2",
        "0.0.0.0",
        "[::1]",
        "[",
    ):
        assert ask(port, "/", Host=host)[0] == 421
        assert ask(port, "/report", Host=host)[0] == 421
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"):
        assert ask(port, "/", method)[0] == 501
    paths = (
        "/report/",
        "/config.yaml",
        "/../config.yaml",
        "/%2e%2e/config.yaml",
        f"/{folder}/config.yaml",
        "/?x",
    )
    for path in paths:
        status, text, _ = ask(port, path)
        assert status == 404
        assert "dataset_name" not in text


def test_the_server_listens_on_the_loopback_alone_and_a_port_that_is_taken_is_one_sentence(served):
    folder, port = served
    with make_server(folder, 0) as other:
        assert other.server_address[0] == "127.0.0.1"
    for taken in (port, 99999):
        with pytest.raises(InputError, match=f"--port: {taken} cannot be had"):
            make_server(folder, taken)


def test_a_run_that_has_written_nothing_and_a_run_that_has_no_metrics_are_shown(tmp_path, copied, monkeypatch):
    monkeypatch.setattr(watch, "REST", 0)
    empty = tmp_path / "empty <b>"
    empty.mkdir()
    live = LiveReport(empty)
    state, text = live.latest()
    assert "There is no report yet: " in text
    assert "empty &lt;b&gt;: no config.yaml" in text
    shutil.copy(copied / "config.yaml", empty)
    later, text = live.latest()
    assert later != state
    assert "metrics.jsonl is missing." in text


def test_the_report_of_every_half_written_file_is_shown(copied, monkeypatch):
    monkeypatch.setattr(watch, "REST", 0)
    live = LiveReport(copied)
    names = sorted(path for path in copied.rglob("*") if path.suffix in watch.ENDINGS and path.name != "config.yaml")
    small = [path for path in names if "final" not in path.parts or path.name == "policy.json"]
    assert len(small) > 10
    for path in small[:: max(1, len(small) // 5)]:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert "</html>" in live.latest()[1], path
        path.write_bytes(whole)


def test_a_report_that_takes_long_is_made_seldom(copied, monkeypatch):
    monkeypatch.setattr(watch, "report_text", lambda folder: str(len(made.append(folder) or made)))
    made: list[Path] = []
    live = LiveReport(copied)
    assert live.latest()[1] == "1"
    assert live.due <= time.monotonic() + watch.MOST_REST
    live.due += 3600
    (copied / "metrics.jsonl").touch()
    assert live.latest()[1] == "1"
    live.due = 0.0
    assert live.latest()[1] == "2"
    assert live.latest()[1] == "2"  # as nothing has changed


def test_every_file_that_the_report_reads_changes_the_state(copied):
    before = state_of(copied)
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "starts.jsonl",
        "data.json",
        "final/policy.json",
        "stage-01/eval.json",
    ):
        os.utime(copied / name, ns=(0, len(name)))
        after = state_of(copied)
        assert after != before, name
        before = after


def test_ctrl_c_ends_the_command_without_an_error(copied):
    command = [sys.executable, "-m", "irlfast.watch", str(copied)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes, preexec_fn=hear_signals) as process:
        assert process.stdout
        line = process.stdout.readline()
        port = int(line.partition("http://127.0.0.1:")[2].partition("/")[0])
        assert ask(port, "/")[0] == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip(), err) == (0, "", "")


def test_a_folder_that_is_not_there_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["watch", "/nowhere/run"])
    assert watch.main() == 2
    assert capsys.readouterr().err == "irlfast: output_dir /nowhere/run: no such folder; expected that of a run\n"


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no Chromium at {CHROMIUM}")
def test_the_browser_gets_a_new_report_and_keeps_its_place_its_search_and_what_was_opened(served):
    folder, port = served
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 900, "height": 600})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.goto(f"http://127.0.0.1:{port}/")
        report = page.frame_locator("iframe").last
        report.locator(".chart svg").first.wait_for()
        assert page.locator("#state").inner_text() == "live"
        report.locator("#samples-search").press_sequentially("5")
        found = report.locator("#samples-status").inner_text()
        report.locator("details").first.evaluate("each => each.open = !each.open")
        opened = report.locator("details").first.evaluate("each => each.open")
        page.frames[-1].evaluate("scrollTo(0, 777)")
        with (folder / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"phase": "stage-01", "step": 5, "loss": 1.5, "seconds": 1.0}) + "\n{half")
        page.frame_locator("iframe").first.get_by_text("metrics.jsonl: 1 unreadable line left out.").wait_for(
            state="attached"
        )
        page.locator("iframe").nth(1).wait_for(state="detached")
        assert report.locator("#samples-search").input_value() == "5"
        assert report.locator("#samples-status").inner_text() == found
        assert report.locator("details").first.evaluate("each => each.open") == opened
        assert page.frames[-1].evaluate("scrollY") == 777
        assert errors == []
