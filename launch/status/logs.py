"""`pomscale runs logs`: the output of the ranks of a run, over all its starts."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.record.job import log_path
from launch.status.runs import RunSummary, summarize
from launch.status.state import LIVE
from launch.status.tail import Growing, tail
from pomscale.base.errors import InputError
from pomscale.runs.layout import ATTEMPTS_FOLDER, JOB_FILE, LOGS_FOLDER, SUBMITIT_FOLDER

_DEFAULT_LINES = 50

# The line that a guard writes at each start.
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
    """Show the output of ranks. InputError if there are no logs, and none are to come.

    Args:
        job_folder: Job folder of the run.
        rank: None for all ranks, with the rank before each line.
        lines: Number of lines at the end; default: all of a start, if one is given, else 50.
        start: Show only the output of this start, JOB-RESTART.
        follow: Also show what is printed from now on, over all starts, until the run is over.
        show: Called with each line.

    Returns:
        With follow, a summary of the run at its end; else None.
    """
    if start is not None:
        _check_start(job_folder, start)
    paths = _logs(job_folder, rank)
    if not paths:
        _check_launched(job_folder, rank, follow)
    files = {}
    for path in paths:
        prefix = _prefix(path, rank)
        files[path] = Growing(path, num_bytes=0)
        files[path].read()  # before the other files are shown, which may take seconds: new lines must not be lost
        shown = _last_lines(path, lines or _DEFAULT_LINES) if start is None else _lines_of_start(path, start, lines)
        for line in shown:
            show(prefix + line)
    return _follow(job_folder, rank, files, show) if follow else None


def where_logs_are(job_folder: Path) -> str:
    """Return a line for the user that names the log files."""
    submitit = job_folder / SUBMITIT_FOLDER
    return f"{job_folder / LOGS_FOLDER}/rank-*.log, one file per rank; {submitit} has the output of the job itself"


def _check_start(job_folder: Path, start: str) -> None:
    known = sorted(path.name for path in (job_folder / ATTEMPTS_FOLDER).glob("*-*"))
    if start not in known:
        there = f"there are {', '.join(known[-8:])}" if known else "there are none"
        raise InputError(f"--attempt {start}: no such start (JOB-RESTART) of {job_folder}; {there}")


def _logs(job_folder: Path, rank: int | None) -> list[Path]:
    if rank is None:
        return sorted((job_folder / LOGS_FOLDER).glob("rank-*.log"))
    path = log_path(job_folder, rank)
    return [path] if path.is_file() else []


def _check_launched(job_folder: Path, rank: int | None, follow: bool) -> None:
    """Raise InputError unless there will be logs to wait for."""
    if not (job_folder / JOB_FILE).is_file() and not (job_folder / LOGS_FOLDER).is_dir():
        raise InputError(
            f"{job_folder}: not started by `pomscale launch`, so its output was not kept here; it is in the terminal "
            "where it was started, or in the output file of sbatch"
        )
    if rank is not None and (others := _logs(job_folder, None)):
        raise InputError(
            f"{job_folder}: rank {rank} has printed nothing; there are logs of {len(others)} ranks, see "
            f"{job_folder / LOGS_FOLDER}"
        )
    if not follow:
        raise InputError(
            f"{job_folder}: no rank has printed anything yet; --follow waits for it, and "
            f"{job_folder / SUBMITIT_FOLDER} has the output of the job itself"
        )


def _prefix(path: Path, rank: int | None) -> str:
    return f"[rank {int(path.stem.removeprefix('rank-'))}] " if rank is None else ""


def _last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a log, without reading gigabytes."""
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
    """Show everything that is printed from now on, also into files that do not exist yet."""
    quiet_since_s = time.monotonic()
    while True:
        came = False
        for prefix, line in _new_lines(job_folder, rank, files):
            came = True
            show(prefix + line)
        now_s = time.monotonic()
        if came:
            quiet_since_s = now_s
        elif now_s - quiet_since_s > _ASK_AFTER_S:
            quiet_since_s = now_s
            run = summarize({job_folder: job_folder.name}).runs[0]
            if run.state not in (*LIVE, "unknown"):
                for prefix, line in _new_lines(job_folder, rank, files):  # its last lines
                    show(prefix + line)
                return run
        time.sleep(_LOOK_EVERY_S)


def _new_lines(job_folder: Path, rank: int | None, files: dict[Path, Growing]) -> Iterator[tuple[str, str]]:
    for path in _logs(job_folder, rank):
        file = files.setdefault(path, Growing(path))
        for line in file.read().decode(errors="replace").splitlines():
            yield _prefix(path, rank), line
