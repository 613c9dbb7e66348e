"""A local server that speaks OpenAI's protocol. A script, which is a function, decides what each request gets."""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple


class Response(NamedTuple):
    status: int
    body: Any  # a dictionary, which is sent as JSON, or bytes, which are sent as they are
    headers: Mapping[str, str] = MappingProxyType({})


def completion(text: str | None, finish: str = "stop", refusal: str | None = None, counted: bool = True) -> Response:
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    body: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return Response(200, body | ({"usage": usage} if counted else {}))


def failure(status: int, message: str = "No. Not now.", **headers: str) -> Response:
    """The client tries again at once, unless a header says otherwise."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status, {"error": {"message": message}}, given or {"retry-after-ms": "1"})


class Server(ThreadingHTTPServer):
    def __init__(self, script: Callable[[dict], Response]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.requests: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def die(self) -> None:
        """Refuse all connections from now on."""
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        request |= {"path": self.path, "key": self.headers["Authorization"]}
        self.server.requests.append(request)
        status, body, headers = self.server.script(request)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        given = {"Content-Length": str(len(data)), "Content-Type": "application/json"}
        for name, value in (given | {**headers}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def handle(self) -> None:
        with suppress(OSError):  # the client has not waited for a slow answer
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(script: Callable[[dict], Response]) -> Iterator[Server]:
    with Server(script) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()  # or, after a test that raised, the thread would try to accept without end


# ---------------------------------------------------------------- scripts of a judge


def parts_of(request: dict) -> tuple[str, str, str, str]:
    """The mark, the prompt and the two answers of a request."""
    match = re.match(
        r"\[(\w+): the user's prompt\]\n(.*)\n\[\1: answer 1\]\n(.*)\n\[\1: answer 2\]\n(.*)\n\[\1: end\]",
        request["messages"][-1]["content"],
        re.DOTALL,
    )
    assert match
    return match.groups()


def says(choice: str, mark: str) -> Response:
    return completion(f"Both are short.\nVerdict {mark}: {choice}")


def prefers_longer(request: dict) -> Response:
    mark, _, first, second = parts_of(request)
    return says("tie" if len(first) == len(second) else "1" if len(first) > len(second) else "2", mark)
