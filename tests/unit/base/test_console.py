"""Lines that end no run, progress bars, and numbers for people."""

from __future__ import annotations

import errno
import io

import pytest

from pomscale.base import console
from pomscale.base.console import Progress, format_count, format_duration, say, track, warn


def test_numbers_for_people() -> None:
    assert [format_count(n) for n in (0, 950, 8192, 999_999, 1_281_167)] == ["0", "950", "8.19k", "1M", "1.28M"]
    assert [format_duration(s) for s in (42, 200, 18_420, 187_200)] == ["42s", "3m 20s", "5h 07m", "2d 04h"]


def test_a_console_on_a_full_disk_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        num_refused = 0

        def flush(self) -> None:
            self.num_refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")

    full = Full()
    monkeypatch.setattr("sys.stdout", full)
    monkeypatch.setattr("sys.stderr", full)
    with pytest.raises(OSError, match="No space left"):
        print("what would end a run", flush=True)
    say("a line")
    warn("another")
    with Progress("videos", 1) as progress:
        progress.advance()
    assert full.num_refused == 4


class Time:
    """A clock that a test sets, in place of the module `time` of the console."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(console, "time", clock)
    return clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_log_has_the_first_item_the_last_and_some(clock: Time, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track(range(40), "videos", 40):
        clock.now_s += 12.0
    assert lines(capsys) == [
        "videos: 1 of 40, 12 s each, ETA 7m 48s",
        *(f"videos: {n} of 40, 12 s each, ETA {format_duration(12 * (40 - n))}" for n in range(4, 40, 3)),
        "videos: 40 of 40, 12 s each, ETA 0s",
    ]


def test_bytes_and_a_note(clock: Time, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("verify", 8 * 10**9, unit="bytes") as progress:
        progress.note = "2 damaged"
        clock.now_s += 4.0
        progress.advance(2 * 10**9)
    assert lines(capsys) == ["verify: 2.00 of 8.00 GB, 0.50 GB/s, 2 damaged, ETA 12s"]


def test_what_was_done_before_does_not_count_in_the_rate(clock: Time, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encode", 1000) as progress:
        clock.now_s += 50.0
        progress.skip(500)
        progress.begin()
        clock.now_s += 4.0
        progress.advance(400)  # not 30 s after the line before it: told at the end
    assert lines(capsys) == ["encode: 500 of 1,000, 0/s, ETA ?", "encode: 900 of 1,000, 100/s, ETA 1s"]
    assert (progress.num_done, progress.rate_per_s, progress.eta_s) == (900, 100.0, 1.0)


def test_nothing_is_shown_where_it_is_not_wanted_and_no_last_line_after_an_error(
    clock: Time, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(track(range(3), "videos", 3, enabled=False)) == [0, 1, 2]

    def fail() -> None:
        with Progress("videos", 3) as progress:
            for _ in range(2):
                clock.now_s += 1.0
                progress.advance()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert lines(capsys) == ["videos: 1 of 3, 1 s each, ETA 2s"]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("frame groups", 2) as progress:
        progress.advance()
        progress.advance()
    assert "frame groups" in terminal.getvalue()
    assert "2 of 2" in terminal.getvalue()
