"""A real HTTP server of a folder, plain as Python's own (no ranges), that counts requests and misbehaves on demand."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal


class FileServer:
    """A server of `folder` at `url` for the duration of a `with` block; afterwards no thread of it is left.

    plan: by file name, what happens to the next requests for it: "403" and "503" refuse, "cut" hangs up after half of
    the bytes, "hold" sends half of them and then nothing until `release` is set. When a plan is used up all is well.
    """

    def __init__(self, folder: Path) -> None:
        self.num_requests: Counter[str] = Counter()
        self.plan: dict[str, list[Literal["403", "503", "cut", "hold"]]] = defaultdict(list)
        self.holding = threading.Event()
        self.release = threading.Event()
        self._lock = threading.Lock()
        owner = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *arguments: object) -> None:
                super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

            def do_GET(self) -> None:
                owner._answer(self, folder)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # so that closing the server joins them
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, handler: SimpleHTTPRequestHandler, folder: Path) -> None:
        name = handler.path.rpartition("/")[2]
        with self._lock:
            self.num_requests[name] += 1
            trouble = self.plan[name].pop(0) if self.plan[name] else None
        if trouble is None:
            SimpleHTTPRequestHandler.do_GET(handler)
        elif trouble in ("403", "503"):
            handler.send_error(int(trouble))
        else:
            content = (folder / handler.path.lstrip("/")).read_bytes()
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[: len(content) // 2])
            handler.wfile.flush()
            if trouble == "hold":
                self.holding.set()
                self.release.wait()
            handler.close_connection = True
