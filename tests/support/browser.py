"""A real browser without a window, driven over its debugging pipe: no package needed but chromium itself."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_TIMEOUT_S = 240.0


@dataclass
class Visit:
    """The result of opening one page. complaints: of the console, the content security policy and exceptions.

    requested: every address that was asked for. found: the value of the expression.
    """

    complaints: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)
    found: Any = None
    screenshot: bytes = b""


class Browser:
    """The protocol: JSON messages, each ended by a zero byte; ours have numbers, answers have the same."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._number = 0
        self._unread = b""
        self._events: list[dict[str, Any]] = []

    def visit(self, path: Path, expression: str, *, width: int) -> Visit:
        """Open a file in a window of this width, and evaluate JavaScript in it once everything is loaded."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", session)
        self._events.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", session, **size)
        self._call("Page.navigate", session, url=path.as_uri())
        self._wait_for("Page.loadEventFired")
        result = self._call("Runtime.evaluate", session, expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        picture = self._call("Page.captureScreenshot", session, captureBeyondViewport=True)
        visit = Visit(found=result["result"].get("value"), screenshot=base64.b64decode(picture["data"]))
        for event in self._events:
            details = event["params"]
            match event["method"]:
                case "Log.entryAdded":
                    visit.complaints.append(details["entry"]["text"])
                case "Runtime.exceptionThrown":
                    visit.complaints.append(details["exceptionDetails"]["text"])
                case "Runtime.consoleAPICalled":
                    visit.complaints.append(json.dumps(details["args"]))
                case "Network.requestWillBeSent":
                    visit.requested.append(details["request"]["url"])
        self._call("Target.closeTarget", targetId=target)
        return visit

    def close(self) -> None:
        self._call("Browser.close")

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        unsent = json.dumps(message).encode() + b"\0"
        while unsent:
            unsent = unsent[os.write(self._to, unsent) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self._events.append(answer)

    def _wait_for(self, event: str) -> None:
        while not any(one["method"] == event for one in self._events):
            self._events.append(self._read())

    def _read(self) -> dict[str, Any]:
        deadline_s = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, "the browser does not answer"
            chunk = os.read(self._from, 1 << 16)
            assert chunk, "the browser has ended"
            self._unread += chunk
        message, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """profile: an empty folder for what it keeps."""
    assert CHROMIUM is not None
    its_input, to_browser = os.pipe()
    from_browser, its_output = os.pipe()
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        f"--user-data-dir={profile}",
    ]
    # It reads commands from descriptor 3 and answers on 4.
    script = f'exec "$@" 3<&{its_input} 4>&{its_output}'
    command = ["bash", "-c", script, "bash", CHROMIUM, *options, "--remote-debugging-pipe", "about:blank"]
    with subprocess.Popen(command, pass_fds=(its_input, its_output), stderr=subprocess.DEVNULL) as process:
        os.close(its_input)
        os.close(its_output)
        browser = Browser(to_browser, from_browser)
        try:
            yield browser
            browser.close()
            process.wait(timeout=_TIMEOUT_S)
        finally:
            process.kill()
            os.close(to_browser)
            os.close(from_browser)
