"""A wandb server on this machine that accepts runs and drops them; a test can make it hang or disappear."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "a" * 40

_PROJECT = {"id": "project", "name": "p", "entity": {"id": "entity", "name": "e"}}
_ANSWERS = {
    "UpsertBucket": {
        "upsertBucket": {
            "bucket": {"id": "run", "name": "run", "displayName": "run", "config": "{}", "project": _PROJECT},
            "inserted": True,
        }
    },
    "Viewer": {"viewer": {"id": "viewer", "entity": "e", "flags": "{}", "teams": {"edges": []}}},
    "RunResumeStatus": {"model": {**_PROJECT, "bucket": None}},
    "CreateRunFiles": {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []}},
}


class WandbServer(ThreadingHTTPServer):
    """url: for WANDB_BASE_URL. requests: what was asked, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str] = []
        self._connections: list[socket.socket] = []
        self.hangs = False
        self.ending = threading.Event()

    def go_away(self) -> None:
        """Connections are cut, and refused from now on."""
        self.shutdown()
        self.server_close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: the client may be gone by the time of the answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = re.search(rb"(?:query|mutation) (\w+)", body) if self.path == "/graphql" else None
        name = asked[1].decode() if asked else self.path
        self.server.requests.append(name)
        if self.server.hangs:
            self.server.ending.wait(600)
        unknown = {"errors": [{"message": f"{name} is not served here"}]}
        answer = json.dumps(unknown if asked and name not in _ANSWERS else {"data": _ANSWERS.get(name, {})}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ending.set()
        server.go_away()
