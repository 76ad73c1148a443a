"""`pomscale watch` in a real terminal: it waits for a run, shows it live, and leaves the terminal as it was."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.running import (
    ENVIRONMENT,
    GLOBAL_BATCH,
    KILLED_WITHIN_S,
    TIMEOUT_S,
    pomscale,
    started,
    train_command,
    write_tiny_recipe,
)

WIDTH, HEIGHT = 100, 40
# At the end of what was read so far, half of one may stand.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b(\[[0-9;?]*)?\Z")
_ENTER, _LEAVE, _SHOW_CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


class Terminal:
    """The other end of a pty: what was written to it so far."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._bytes = b""

    @property
    def written(self) -> str:
        return self._bytes.decode(errors="replace")

    def last_frame(self) -> str:
        """What stands on the screen: each frame is written over the one before it, from the top left."""
        return _ESCAPES.sub("", self.written.split("\x1b[H")[-1])

    def read_until(self, is_so: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline_s, self.last_frame()
            if select.select([self._descriptor], [], [], 0.1)[0]:
                try:
                    self._bytes += os.read(self._descriptor, 65536)
                except OSError:  # its only program has gone
                    assert is_so(), self.last_frame()

    def type(self, keys: bytes) -> None:
        os.write(self._descriptor, keys)


@contextmanager
def in_terminal(*words: str) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    """A command whose controlling terminal this is, so that Ctrl-C reaches it as from a keyboard."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "pomscale", *words],
        env=ENVIRONMENT | {"TERM": "xterm-256color"},
        preexec_fn=lambda: os.login_tty(theirs),  # noqa: PLW1509 (one thread)
    )
    os.close(theirs)
    try:
        yield Terminal(ours), process
    finally:
        process.kill()
        process.wait(KILLED_WITHIN_S)
        os.close(ours)


@pytest.fixture
def recipe(digits: Path, tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path, digits)


def test_a_run_from_before_its_beginning(recipe: Path) -> None:
    home = recipe.parent / "runs" / "tiny"
    endless = [f"training.total_samples={100_000 * GLOBAL_BATCH}", "schedule={}"]
    with in_terminal("watch", str(home)) as (terminal, watching):
        terminal.read_until(lambda: "waiting for" in terminal.last_frame())
        assert terminal.written.startswith(_ENTER)
        with started(train_command(recipe, *endless), stderr=subprocess.STDOUT):
            terminal.read_until(lambda: "running  start 1" in terminal.last_frame())
            terminal.read_until(lambda: "■ productive" in terminal.last_frame())
            frame = terminal.last_frame()
            terminal.read_until(lambda: terminal.last_frame() != frame and "images/s" in terminal.last_frame())
            lines = terminal.last_frame().splitlines()
            assert len(lines) <= HEIGHT
            assert max(map(len, lines)) <= WIDTH
        # Killed just now, and without a word: that is seen at the next look.
        terminal.read_until(lambda: "killed  start 1" in terminal.last_frame())
        terminal.type(b"\x03")
        terminal.read_until(lambda: _LEAVE in terminal.written)
        assert watching.wait(TIMEOUT_S) == 0
    assert _SHOW_CURSOR in terminal.written
    assert "Traceback" not in terminal.written


def test_without_a_terminal_it_is_one_frame(recipe: Path) -> None:
    home = recipe.parent / "runs" / "tiny"
    waiting = pomscale("watch", home).stdout.replace("│", " ")
    assert "no run has begun there yet" in " ".join(waiting.split())
    home.mkdir(parents=True)
    (home / "metrics.jsonl").write_text('{"half": \n')
    shown = pomscale("watch", home, "--once").stdout
    assert "\x1b" not in shown
    assert "unknown  start 0" in shown


def test_a_terminal_that_lacks_characters_gets_others(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"samples": 8, "time_unix_s": 1, "incarnation": 1, "train/loss": 0.5}\n')
    command = [sys.executable, "-m", "pomscale", "watch", str(tmp_path), "--once"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"training loss 0.5" in done.stdout
