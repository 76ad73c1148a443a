"""A wandb server on this machine that keeps the history of its runs, line by line, as the real one does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "a" * 40

_PROJECT = {"id": "project", "name": "p", "entity": {"id": "entity", "name": "e"}}


class WandbStore(ThreadingHTTPServer):
    """url: for WANDB_BASE_URL. lines: run id -> line number of its history -> row. deleted: ids that are refused."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lines: dict[str, dict[int, dict[str, Any]]] = {}
        self.deleted: set[str] = set()
        self.uploads = 0

    def samples(self, run_id: str) -> list[int]:
        return [row["samples"] for _, row in sorted(self.lines[run_id].items())]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "mutation UpsertBucket" in query:
            bucket = {"id": "run", "name": variables["name"], "displayName": "run", "config": "{}", "project": _PROJECT}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "query RunResumeStatus" in query:
            return {"model": {**_PROJECT, "bucket": self._standing(variables["name"])}}
        if "mutation CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        return {}

    def _standing(self, run_id: str) -> dict[str, Any] | None:
        lines = self.lines.get(run_id)
        if not lines:
            return None
        last = json.dumps(lines[max(lines)])
        return {
            "id": "run", "name": run_id, "displayName": "run", "summaryMetrics": "{}", "config": "{}", "tags": [],
            "historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0, "wandbConfig": '{"t": 1}',
            "historyTail": json.dumps([last]), "eventsTail": "[]",
        }  # fmt: skip

    def handle_error(self, request: Any, client_address: Any) -> None:
        """wandb leaves connections open when it has said everything."""

    def stream(self, run_id: str, content: dict[str, Any]) -> None:
        history = content.get("files", {}).get("wandb-history.jsonl")
        if history is not None:
            self.uploads += 1
            lines = self.lines.setdefault(run_id, {})
            for number, line in enumerate(history["content"], start=history["offset"]):
                lines[number] = json.loads(line)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbStore

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer: dict[str, Any] = {}
        status = 200
        if self.path == "/graphql":
            asked = json.loads(body)
            variables = asked.get("variables") or {}
            if "mutation UpsertBucket" in asked["query"] and variables["name"] in self.server.deleted:
                reason = f"run p/{variables['name']} was previously created and deleted; try a new run name"
                status, answer = 409, {"errors": [{"message": reason}]}
            else:
                answer = {"data": self.server.answer(asked["query"], variables)}
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = _handle

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""


@contextmanager
def wandb_store() -> Iterator[WandbStore]:
    server = WandbStore()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
