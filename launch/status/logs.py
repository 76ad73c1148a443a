"""`pomscale runs logs`: what the ranks of a run have printed, over all its starts."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.record.job import JOB_FILE, LOGS, STARTS, SUBMITIT, log_path
from launch.status.runs import RunSummary, summarize
from launch.status.state import LIVE
from launch.status.tail import Growing, tail
from pomscale.base.errors import InputError

_DEFAULT_LINES = 50

# What a guard writes at each start.
_START = re.compile(r"^===== start (\S+) on \S+, \S+ =====$")
_FIRST_BYTES = 65_536
_LOOK_EVERY_S, _ASK_AFTER_S = 0.3, 10.0


def show_logs(
    job_folder: Path,
    *,
    rank: int | None,
    lines: int | None,
    start: str | None,
    follow: bool,
    show: Callable[[str], None] = print,
) -> RunSummary | None:
    """rank: None = all, each line with its rank. lines: the last ones; None = all of an attempt, else _DEFAULT_LINES.

    attempt: only what was printed in that start, JOB-RESTART. follow: then whatever comes, over restarts, until the
    run is over; returns how it ended. InputError where there are no logs, and none to come.
    """
    if start is not None:
        _check_attempt(job_folder, start)
    paths = _logs(job_folder, rank)
    if not paths:
        _check_launched(job_folder, rank, follow)
    files = {}
    for path in paths:
        prefix = _prefix(path, rank)
        files[path] = Growing(path, num_bytes=0)
        files[path].read()  # before the others are shown, which may take seconds: what comes meanwhile is not lost
        shown = _last_lines(path, lines or _DEFAULT_LINES) if start is None else _lines_of_start(path, start, lines)
        for line in shown:
            show(prefix + line)
    return _follow(job_folder, rank, files, show) if follow else None


def where_logs_are(job_folder: Path) -> str:
    """A line for people."""
    return f"{job_folder / LOGS}/rank-*.log, one file per rank; {job_folder / SUBMITIT} has what the job itself has printed"


def _check_attempt(job_folder: Path, start: str) -> None:
    known = sorted(path.name for path in (job_folder / STARTS).glob("*-*"))
    if start not in known:
        there = f"there are {', '.join(known[-8:])}" if known else "there are none"
        raise InputError(f"--attempt {start}: no such start (JOB-RESTART) of {job_folder}; {there}")


def _logs(job_folder: Path, rank: int | None) -> list[Path]:
    if rank is None:
        return sorted((job_folder / LOGS).glob("rank-*.log"))
    path = log_path(job_folder, rank)
    return [path] if path.is_file() else []


def _check_launched(job_folder: Path, rank: int | None, follow: bool) -> None:
    """InputError unless there is something to wait for."""
    if not (job_folder / JOB_FILE).is_file() and not (job_folder / LOGS).is_dir():
        raise InputError(
            f"{job_folder}: not started by `pomscale launch`, so nobody has kept what it printed; that is in the terminal "
            "where it was started, or in the file that sbatch was told to write"
        )
    if rank is not None and (others := _logs(job_folder, None)):
        raise InputError(
            f"{job_folder}: rank {rank} has printed nothing; there are logs of {len(others)} ranks, see {job_folder / LOGS}"
        )
    if not follow:
        raise InputError(
            f"{job_folder}: no rank has printed anything yet; --follow waits for it, and {job_folder / SUBMITIT} has what the job "
            "itself has printed"
        )


def _prefix(path: Path, rank: int | None) -> str:
    return f"[rank {int(path.stem.removeprefix('rank-'))}] " if rank is None else ""


def _last_lines(path: Path, count: int) -> list[str]:
    """Without reading a log of gigabytes."""
    num_bytes, size = _FIRST_BYTES, path.stat().st_size
    while True:
        found = tail(path, num_bytes).decode(errors="replace").splitlines()
        if len(found) >= count or num_bytes >= size:
            return found[-count:]
        num_bytes *= 8


def _lines_of_start(path: Path, start: str, count: int | None) -> list[str]:
    found: list[str] = []
    inside = False
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            header = _START.match(line.rstrip())
            if header is not None:
                inside = header[1] == start
            if inside:
                found.append(line.rstrip("\n"))
    return found if count is None else found[-count:]


def _follow(job_folder: Path, rank: int | None, files: dict[Path, Growing], show: Callable[[str], None]) -> RunSummary:
    """Whatever is printed from now on, also into files that are not there yet."""
    quiet_since_s = time.monotonic()
    while True:
        came = False
        for prefix, line in _news(job_folder, rank, files):
            came = True
            show(prefix + line)
        now_s = time.monotonic()
        if came:
            quiet_since_s = now_s
        elif now_s - quiet_since_s > _ASK_AFTER_S:
            quiet_since_s = now_s
            run = summarize({job_folder: job_folder.name}).runs[0]
            if run.state not in (*LIVE, "unknown"):
                for prefix, line in _news(job_folder, rank, files):  # its last words
                    show(prefix + line)
                return run
        time.sleep(_LOOK_EVERY_S)


def _news(job_folder: Path, rank: int | None, files: dict[Path, Growing]) -> Iterator[tuple[str, str]]:
    for path in _logs(job_folder, rank):
        file = files.setdefault(path, Growing(path))
        for line in file.read().decode(errors="replace").splitlines():
            yield _prefix(path, rank), line
