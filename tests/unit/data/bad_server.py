"""A real HTTP server on this machine that misbehaves on purpose."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class BadServer(ThreadingHTTPServer):
    """Serves the files of a folder.

    Attributes:
        faults: For each file name, what happens to the next requests, one after the other: a status to answer,
            ("die", n) to hang up after n bytes of the body, ("stall", s) to wait s seconds inside it, or
            ("say", bytes) to serve something else.
        ranges: Whether parts of files can be asked for.
        requests: (name, Range header or empty) of every request.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[Any]] = defaultdict(list)
        self.ranges = True
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.requests)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: BadServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name, asked = self.path.rsplit("/", 1)[-1], self.headers.get("Range", "")
        self.server.requests.append((name, asked))
        faults = self.server.faults[name]
        fault = faults.pop(0) if faults else None
        path = self.server.folder / self.path.lstrip("/")
        if isinstance(fault, int):
            return self._answer(fault, b"no")
        if not path.is_file():
            return self._answer(404, b"no")
        content = fault[1] if isinstance(fault, tuple) and fault[0] == "say" else path.read_bytes()
        if asked and self.server.ranges:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            if begin >= len(content):
                return self._answer(416, b"no")
            return self._answer(
                206, content[begin:], f"bytes {begin}-{len(content) - 1}/{len(content)}", fault
            )
        return self._answer(200, content, "", fault)

    def do_HEAD(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        self.send_response(200 if path.is_file() else 404)
        self.send_header("Content-Length", str(path.stat().st_size) if path.is_file() else "0")
        self.end_headers()

    def _answer(self, status: int, body: bytes, content_range: str = "", fault: Any = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if isinstance(fault, tuple) and fault[0] in ("die", "stall"):
            n_bytes = fault[1] if fault[0] == "die" else len(body) // 2
            self.wfile.write(body[:n_bytes])
            self.wfile.flush()
            if fault[0] == "die":
                time.sleep(0.3)  # a client forgets what it has not read yet when the connection breaks
                self.close_connection = True
                return
            time.sleep(fault[1])
            body = body[n_bytes:]
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@contextmanager
def serving(folder: Path) -> Iterator[BadServer]:
    """A server for the length of a test."""
    server = BadServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
