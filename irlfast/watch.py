"""Show a run while it goes on: ``irlfast watch OUTPUT_DIR``. Ctrl-C ends it.

The report of the run is served to this machine alone. It is made in memory, from the files that the run has written so
far, and made anew when they change. The page in the browser asks for news, and keeps its place and its filters.
"""

import argparse
import hashlib
import html
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from irlfast.common.command import run_command
from irlfast.common.files import InputError
from irlfast.common.printable import printable
from irlfast.reports.page import report_text
from irlfast.reports.render import read

HOST = "127.0.0.1"
NAMES = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?", re.IGNORECASE)  # a site may point its own name to this machine
PATTERNS = ("*", "*/*", "*/*/*")  # where the files are that the report shows
ENDINGS = (".json", ".jsonl", ".yaml")
REST = 9  # times the CPU seconds of a report, until the next one is made: a run on the same machine needs its cores
MOST_REST = 10.0  # seconds
# The report has a policy of its own, which is stricter about scripts.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class LiveReport:
    """The report of a run, as its files are now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self.state = self.text = ""
        self.due = 0.0

    def latest(self) -> tuple[str, str]:
        """Return the name of the files' state, and the report, which may be some seconds older than the files."""
        with self.lock:
            begun, state = time.thread_time(), state_of(self.folder)
            if state != self.state and time.monotonic() >= self.due:
                try:
                    self.text, self.state = report_text(self.folder), state
                except (InputError, OSError) as error:  # the run has not begun, or replaces a file at this moment
                    self.text, self.state = waiting(error), f"{state}-waiting"
                self.due = time.monotonic() + min(REST * (time.thread_time() - begun), MOST_REST)
            return self.state, self.text


def state_of(folder: Path) -> str:
    """Return a name for the present state of the files that the report shows."""
    state = hashlib.sha256()
    for path in sorted(path for pattern in PATTERNS for path in folder.glob(pattern) if path.suffix in ENDINGS):
        try:
            about = path.stat()
        except OSError:  # it was removed just now
            continue
        state.update(f"{path} {about.st_mtime_ns} {about.st_size}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()[:16]


def waiting(error: Exception) -> str:
    return f"<!doctype html><title>irlfast watch</title><p>There is no report yet: {html.escape(printable(error))}"


def make_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """Make a server of the report of the run in ``folder``; port 0 is any that is free.

    Raises:
        InputError: the port cannot be had.
    """
    live = LiveReport(folder)

    class Handler(BaseHTTPRequestHandler):
        """Answers GET of ``/``, the frame, and of ``/report``. Nothing in a request is a path of a file."""

        timeout = 30

        def do_GET(self) -> None:
            if not NAMES.fullmatch(self.headers.get("Host", "")):
                self.send_error(421)
            elif self.path == "/":
                self.answer(200, read("watch.html"))
            elif self.path == "/report":
                state, text = live.latest()
                tag = f'"{state}"'
                changed = self.headers.get("If-None-Match") != tag
                self.answer(200 if changed else 304, text if changed else "", ETag=tag)
            else:
                self.send_error(404)

        def answer(self, status: int, text: str, **headers: str) -> None:
            body = text.encode("utf-8")
            self.send_response(status)
            about = {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store"}
            about |= {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": POLICY}
            about |= {} if status == 304 else {"Content-Length": str(len(body))}
            for name, value in (about | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"--port: {port} cannot be had ({error}); expected a free port, 1 to 65535") from error


def command() -> None:
    parser = argparse.ArgumentParser(prog="irlfast watch", description="Show a run in the browser while it goes on.")
    parser.add_argument("output_dir", type=Path, help="the folder of a run, running or finished")
    parser.add_argument("--port", type=int, default=0, help="the port of this machine to serve at [any free one]")
    options = parser.parse_args()
    if not options.output_dir.is_dir():
        raise InputError(f"output_dir {options.output_dir}: no such folder; expected that of a run")
    with make_server(options.output_dir, options.port) as server:
        address = f"http://{HOST}:{server.server_address[1]}/"
        print(f"{printable(options.output_dir)}: {address} (this machine alone; Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main() -> int:
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
