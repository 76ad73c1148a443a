"""Facts of a job folder, read without any scheduler. Little is read, since there may be hundreds of job folders."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.record.job import JobStart, StartRecord, Submission, Verdict, read_refusal
from launch.record.result import job_process_lives
from launch.status.last_words import LastWords, last_words
from launch.status.tail import objects, read_object, tail
from pomscale.base.errors import PomscaleError
from pomscale.runs.layout import (
    ATTEMPTS_FOLDER,
    EVENTS_FILE,
    JOB_FILE,
    JOBS_FILE,
    METRICS_FILE,
    START_FILE,
    STARTS_FILE,
    VERDICT_FILE,
)
from pomscale.runs.outcome import read_outcome
from pomscale.runs.starts import Claim, newest_claim

# About twenty rows, over which the speed is averaged.
_ROWS_BYTES, _EVENTS_BYTES = 32_768, 4096
_ROW_KEYS = {"samples", "time_unix_s", "incarnation"}
_CLOCK_SKEW_S = 60.0  # between the machine that submits and the one that runs


@dataclass(frozen=True)
class Facts:
    """Facts of a job folder.

    submission, claim: the newest. starts: the newest of each task of the newest job. claim_lives, local_lives: whether
    the process of the claim, and that of a local job, is alive; None if that cannot be seen from here, or if there is
    none. run_start: the last line of incarnations.jsonl. num_starts: of the run. rows: the last ones, all of the same
    start. original: the run folder that the newest job and process belong to, if this one is a copy of it in which
    nothing has begun.
    """

    job_folder: Path
    submission: Submission | None
    starts: list[JobStart]
    claim: Claim | None
    claim_lives: bool | None
    local_lives: bool | None
    outcome: dict[str, Any] | None
    run_start: dict[str, Any] | None
    num_starts: int
    rows: list[dict[str, Any]]
    stop_requested: bool
    is_run: bool
    original: Path | None = None

    @property
    def start(self) -> JobStart | None:
        """The newest start of the job."""
        return max(self.starts, key=lambda start: start.record.started_unix_s, default=None)

    @property
    def is_waiting(self) -> bool:
        """Whether the newest submission has not begun."""
        submission, start, claim = self.submission, self.start, self.claim
        if submission is None or (claim is not None and claim.unix_s > submission.submitted_unix_s):
            return False
        return start is None or (
            job_of(start.record.job_id) != submission.job_id
            or start.record.started_unix_s < submission.submitted_unix_s - _CLOCK_SKEW_S
        )

    @property
    def is_by_hand(self) -> bool:
        """Whether the newest start of the run was made by `pomscale train` itself, without a guard."""
        if self.claim is None or self.is_waiting:
            return False
        start = self.start
        if start is None:
            return True
        if start.verdict is not None:
            return self.claim.unix_s > start.verdict.decided_unix_s
        return self._is_on_slurm(start) and self.claim.slurm_job_id != job_of(start.record.job_id)

    @property
    def slurm_job(self) -> str | None:
        """The id of the job that used the job folder last; None if that was no job of SLURM."""
        if self.original is not None:
            return None
        if self.is_waiting and self.submission is not None:
            return self.submission.job_id if self.submission.scheduler == "slurm" else None
        if self.is_by_hand and self.claim is not None:
            return self.claim.slurm_job_id
        start = self.start
        return job_of(start.record.job_id) if start is not None and self._is_on_slurm(start) else None

    def _is_on_slurm(self, start: JobStart) -> bool:
        """Whether a start belongs to a job of SLURM, as do all jobs that `pomscale launch` has not submitted."""
        submission = self.submission
        if submission is None or submission.job_id != job_of(start.record.job_id):
            return True
        return submission.scheduler == "slurm"

    def last_words(self, start: JobStart | None, task: str) -> LastWords | None:
        """Return what a task of the newest job has printed last; None if it has printed nothing.

        start: the task's newest start, None if none began.
        """
        submission = self.submission
        if submission is None or self.original is not None or job_of(task) != submission.job_id:
            return None
        # A rank may die before the first one has recorded the first start.
        is_first = start is None or start.record.restart == 0
        since_unix_s = submission.submitted_unix_s if is_first or start is None else start.record.started_unix_s
        return last_words(self.job_folder, task, since_unix_s, submission.output)

    @property
    def current_outcome(self) -> dict[str, Any] | None:
        """The outcome of the newest start of the run; None while there is none."""
        if self.outcome is None or (self.claim is not None and self.outcome["incarnation"] < self.claim.number):
            return None
        return self.outcome

    @property
    def has_logged(self) -> bool:
        """Whether the newest start of the run has logged metrics."""
        return bool(self.rows) and (self.claim is None or self.rows[-1]["incarnation"] >= self.claim.number)

    def latest(self, metric: str) -> float | None:
        """Return the last value of a metric in the few rows that were read."""
        for row in reversed(self.rows):
            if metric in row:
                return float(row[metric])  # also "nan", as metrics.jsonl writes it
        return None


def read_facts(job_folder: Path) -> Facts:
    """Raise PomscaleError, naming the file, if one that must be complete is damaged, or if one may not be read."""
    try:
        return _read_facts(job_folder)
    except OSError as error:
        raise PomscaleError(f"{job_folder}: cannot be read: {error}") from error


def _read_facts(job_folder: Path) -> Facts:
    submissions = objects(tail(job_folder / JOBS_FILE, _EVENTS_BYTES))
    try:
        submission = Submission.from_dict(submissions[-1]) if submissions else None
    except TypeError as error:
        raise PomscaleError(f"{job_folder / JOBS_FILE}: its last line is no submission: {error}") from error
    starts = _newest_starts(job_folder / ATTEMPTS_FOLDER)
    claim = newest_claim(job_folder)
    original = None if submission is None else submission.original(job_folder)
    if original is not None and claim is not None and claim.original is None:
        submission = original = None  # the run has begun here by hand since it was copied
    elif submission is None and claim is not None:
        original = claim.original
    run_starts = _with_numbers({"started_unix_s"}, objects(tail(job_folder / STARTS_FILE, _ROWS_BYTES)))
    rows = _with_numbers(_ROW_KEYS, objects(tail(job_folder / METRICS_FILE, _ROWS_BYTES)))
    newest = max((row["incarnation"] for row in rows), default=0)
    return Facts(
        job_folder,
        submission,
        starts,
        claim,
        claim_lives=None if claim is None else claim.lives,
        local_lives=None if submission is None else original is None and _local_job_lives(submission, starts),
        outcome=read_outcome(job_folder),
        run_start=run_starts[-1] if run_starts else None,
        num_starts=claim.number if claim is not None else len(run_starts),
        rows=[row for row in rows if row["incarnation"] == newest],
        stop_requested=_stop_requested(job_folder, claim),
        is_run=claim is not None or bool(run_starts) or bool((read_object(job_folder / JOB_FILE) or {}).get("is_run")),
        original=original,
    )


def _with_numbers(keys: Collection[str], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that have numbers at these keys: one damaged line must not hide all other runs."""
    return [row for row in rows if all(isinstance(row.get(key), int | float) for key in keys)]


def _newest_starts(folder: Path) -> list[JobStart]:
    """Return the newest start of each task of the job that was started last."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    restarts: dict[str, int] = {}
    for name in sorted(names, key=lambda name: _begun_unix_s(folder / name), reverse=True):
        task, _, restart = name.rpartition("-")
        if not restart.isdecimal():
            continue  # made by the file system itself
        if not restarts or job_of(task) == job_of(next(iter(restarts))):
            restarts[task] = max(restarts.get(task, 0), int(restart))
    found = [_read_start(folder / f"{task}-{restart}", task, restart) for task, restart in restarts.items()]
    return [start for start in found if start is not None]


def _begun_unix_s(folder: Path) -> float:
    """Return when a start began, without reading it. A rank that outlives its start may still add files to it."""
    record = folder / START_FILE
    return (record if record.is_file() else folder).stat().st_mtime


def _read_start(folder: Path, job_id: str, restart: int) -> JobStart | None:
    """Return a start; None while its first process is just writing it."""
    start_file, verdict_file = folder / START_FILE, folder / VERDICT_FILE
    verdict = Verdict.read(verdict_file).seen_from(folder.parents[1]) if verdict_file.is_file() else None
    if start_file.is_file():
        start = StartRecord.read(start_file)
        if verdict is not None and verdict.decided_unix_s < start.started_unix_s:
            verdict = None  # job ids repeat: the verdict is on an earlier job with the same id
        return JobStart(folder, start, verdict, read_refusal(folder))
    if verdict is not None:  # refused before it began
        return JobStart(folder, StartRecord(job_id, restart, [], 1, verdict.decided_unix_s, 0), verdict)
    return None


def job_of(task: str) -> str:
    """Return the job that a task of an array belongs to; any other job is its own only task."""
    return task.partition("_")[0]


def _local_job_lives(submission: Submission, starts: list[JobStart]) -> bool | None:
    """Whether the process of a local job lives; None if its starts show that it runs on another machine."""
    if submission.scheduler == "slurm" or not submission.job_id.isdecimal():
        return None
    hosts = {host for start in starts if start.record.job_id == submission.job_id for host in start.record.hosts}
    if hosts and hosts != {socket.gethostname()}:
        return None
    return job_process_lives(submission)


def _stop_requested(job_folder: Path, claim: Claim | None) -> bool:
    events = objects(tail(job_folder / EVENTS_FILE, _EVENTS_BYTES))
    newest = claim.number if claim is not None else 0
    return any(row.get("event") == "stop_requested" and row.get("incarnation") == newest for row in events)
