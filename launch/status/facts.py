"""What a home tells of itself, without any scheduler. Reads little, for there may be hundreds of homes."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.record.job import ATTEMPTS, JOB_FILE, JOBS_FILE, Attempt, Start, Submission, Verdict
from launch.record.state import process_of_job_lives
from launch.status.tail import objects, read_object, tail
from pomscale.base.errors import PomscaleError
from pomscale.runs.layout import EVENTS_FILE, METRICS_FILE, STARTS_FILE
from pomscale.runs.outcome import read_outcome
from pomscale.runs.starts import Claim, newest_claim

# Some twenty rows, as many as a speed should be averaged over.
_ROWS_BYTES, _EVENTS_BYTES = 32_768, 4096
_ROW_KEYS = {"samples", "time_unix_s", "incarnation"}
_CLOCK_SKEW_S = 60.0  # between the machine that submits and the one that runs


@dataclass(frozen=True)
class Facts:
    """submission, claim: the newest. attempts: the newest of each task of the newest job. incarnation: its last line.

    claim_lives, local_lives: whether the process of the claim, and that of a local job, is there; None where that
    cannot be seen from here, or there is none. rows: the last ones, all of one incarnation.
    """

    home: Path
    submission: Submission | None
    attempts: list[Attempt]
    claim: Claim | None
    claim_lives: bool | None
    local_lives: bool | None
    outcome: dict[str, Any] | None
    incarnation: dict[str, Any] | None
    num_starts: int
    rows: list[dict[str, Any]]
    stop_requested: bool
    is_run: bool

    @property
    def attempt(self) -> Attempt | None:
        """The newest."""
        return max(self.attempts, key=lambda attempt: attempt.start.started_unix_s, default=None)

    @property
    def is_waiting(self) -> bool:
        """Whether the newest submission has not begun."""
        submission, attempt, claim = self.submission, self.attempt, self.claim
        if submission is None or (claim is not None and claim.unix_s > submission.submitted_unix_s):
            return False
        return attempt is None or (
            job_of(attempt.start.job_id) != submission.job_id
            or attempt.start.started_unix_s < submission.submitted_unix_s - _CLOCK_SKEW_S
        )

    @property
    def is_by_hand(self) -> bool:
        """Whether the newest start is not that of a job with a guard, but of `pomscale train` itself."""
        if self.claim is None or self.is_waiting:
            return False
        attempt = self.attempt
        if attempt is None:
            return True
        if attempt.verdict is not None:
            return self.claim.unix_s > attempt.verdict.decided_unix_s
        return self._is_on_slurm(attempt) and self.claim.slurm_job_id != job_of(attempt.start.job_id)

    @property
    def slurm_job(self) -> str | None:
        """The SLURM job that has, or had, the home last; None if that was no job of SLURM."""
        if self.is_waiting and self.submission is not None:
            return self.submission.job_id if self.submission.scheduler == "slurm" else None
        if self.is_by_hand and self.claim is not None:
            return self.claim.slurm_job_id
        attempt = self.attempt
        return job_of(attempt.start.job_id) if attempt is not None and self._is_on_slurm(attempt) else None

    def _is_on_slurm(self, attempt: Attempt) -> bool:
        """A job that nobody has submitted by `pomscale launch` was submitted by sbatch."""
        submission = self.submission
        if submission is None or submission.job_id != job_of(attempt.start.job_id):
            return True
        return submission.scheduler == "slurm"

    @property
    def current_outcome(self) -> dict[str, Any] | None:
        """That of the newest start; None while there is none."""
        if self.outcome is None or (self.claim is not None and self.outcome["incarnation"] < self.claim.number):
            return None
        return self.outcome

    @property
    def has_logged(self) -> bool:
        """Whether the newest start has."""
        return bool(self.rows) and (self.claim is None or self.rows[-1]["incarnation"] >= self.claim.number)

    def latest(self, metric: str) -> float | None:
        """Its last value, of those few rows that were read."""
        for row in reversed(self.rows):
            if metric in row:
                return float(row[metric])  # also "nan", as metrics.jsonl has it
        return None


def read_facts(home: Path) -> Facts:
    """Raises PomscaleError, naming the file, where one that must be whole is not, or may not be read."""
    try:
        return _read_facts(home)
    except OSError as error:
        raise PomscaleError(f"{home}: cannot be read: {error}") from error


def _read_facts(home: Path) -> Facts:
    submissions = objects(tail(home / JOBS_FILE, _EVENTS_BYTES))
    try:
        submission = Submission.of(submissions[-1]) if submissions else None
    except TypeError as error:
        raise PomscaleError(f"{home / JOBS_FILE}: its last line is no submission: {error}") from error
    attempts = _newest_attempts(home / ATTEMPTS)
    claim = newest_claim(home)
    incarnations = _with_numbers({"started_unix_s"}, objects(tail(home / STARTS_FILE, _ROWS_BYTES)))
    rows = _with_numbers(_ROW_KEYS, objects(tail(home / METRICS_FILE, _ROWS_BYTES)))
    newest = max((row["incarnation"] for row in rows), default=0)
    return Facts(
        home,
        submission,
        attempts,
        claim,
        claim_lives=None if claim is None else claim.lives,
        local_lives=None if submission is None else _local_job_lives(submission, attempts),
        outcome=read_outcome(home),
        incarnation=incarnations[-1] if incarnations else None,
        num_starts=claim.number if claim is not None else len(incarnations),
        rows=[row for row in rows if row["incarnation"] == newest],
        stop_requested=_stop_requested(home, claim),
        is_run=claim is not None or bool(incarnations) or bool((read_object(home / JOB_FILE) or {}).get("is_run")),
    )


def _with_numbers(keys: Collection[str], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that have them: one strange line must not hide all the other runs."""
    return [row for row in rows if all(isinstance(row.get(key), int | float) for key in keys)]


def _newest_attempts(folder: Path) -> list[Attempt]:
    """Of each task of the job that was started last."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    restarts: dict[str, int] = {}
    for name in sorted(names, key=lambda name: _begun_unix_s(folder / name), reverse=True):
        task, _, restart = name.rpartition("-")
        if not restart.isdecimal():
            continue  # a file system's own
        if not restarts or job_of(task) == job_of(next(iter(restarts))):
            restarts[task] = max(restarts.get(task, 0), int(restart))
    found = [_attempt(folder / f"{task}-{restart}", task, restart) for task, restart in restarts.items()]
    return [attempt for attempt in found if attempt is not None]


def _begun_unix_s(attempt: Path) -> float:
    """Without reading it. Files are added to an old start too, by a rank that outlives it."""
    start = attempt / "start.json"
    return (start if start.is_file() else attempt).stat().st_mtime


def _attempt(folder: Path, job_id: str, restart: int) -> Attempt | None:
    """None while its first process is just writing it."""
    start_file, verdict_file = folder / "start.json", folder / "verdict.json"
    verdict = Verdict.read(verdict_file) if verdict_file.is_file() else None
    if start_file.is_file():
        start = Start.read(start_file)
        if verdict is not None and verdict.decided_unix_s < start.started_unix_s:
            verdict = None  # job ids repeat, and this one had the same
        return Attempt(folder, start, verdict)
    if verdict is not None:  # refused before it began
        return Attempt(folder, Start(job_id, restart, [], 1, verdict.decided_unix_s, 0), verdict)
    return None


def job_of(task: str) -> str:
    """The job that a task of an array belongs to; other jobs are their own only task."""
    return task.partition("_")[0]


def _local_job_lives(submission: Submission, attempts: list[Attempt]) -> bool | None:
    """A local job is a process of the machine that it was submitted on; where that is, its starts tell."""
    if submission.scheduler == "slurm" or not submission.job_id.isdecimal():
        return None
    hosts = {host for attempt in attempts if attempt.start.job_id == submission.job_id for host in attempt.start.hosts}
    if hosts and hosts != {socket.gethostname()}:
        return None
    return process_of_job_lives(submission)


def _stop_requested(home: Path, claim: Claim | None) -> bool:
    events = objects(tail(home / EVENTS_FILE, _EVENTS_BYTES))
    newest = claim.number if claim is not None else 0
    return any(row.get("event") == "stop_requested" and row.get("incarnation") == newest for row in events)
