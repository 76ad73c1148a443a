"""What a job is, and what it leaves in its home: a run folder, or the folder of a pipeline's stage.

    HOME/job.json                  what to run and how (JobSpec); read by every start of the job
    HOME/launch.json               how it was asked for (LaunchedAs): what `pomscale runs resume` needs
    HOME/code/                     the code it runs, as it was when it was launched
    HOME/jobs.jsonl                one line per submission (Submission)
    HOME/attempts/JOB-RESTART/     one folder per start of a job, restarts by SLURM included
        start.json                 where it runs (Start)
        rank-00000.json            how a rank's process ended, as its guard saw it (Ending)
        verdict.json               what came of it, and what happens next (Verdict)
        end                        made by the supervisor when one rank of a run has ended badly: all others shall end
        requeue                    if that is another start: hosts it should avoid, comma-separated
    HOME/logs/rank-00000.log       what a rank has printed, over all starts; tasks of an array count on from each other
    HOME/submitit/                 submitit's files, and the output of the guards

The outcomes that training itself leaves are in pomscale.runs.outcome.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pomscale.base.console import warn
from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import make_folder, write_text
from pomscale.base.jsonl import read_json_lines

JOB_FILE, LAUNCH_FILE, JOBS_FILE, LOCK_FILE = "job.json", "launch.json", "jobs.jsonl", "launch.lock"
REQUEUE_FILE, END_FILE = "requeue", "end"
STARTS, LOGS, CODE, SUBMITIT = "attempts", "logs", "code", "submitit"

Action = Literal["done", "requeue", "fail", "leave"]
"""leave: the scheduler is ending or restarting the job by itself."""


class _Stored:
    """A dataclass kept as a JSON object."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)  # type: ignore[call-overload]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises PomscaleError where it is missing or not what it should be."""
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise PomscaleError(f"{path} cannot be read: {error}") from error

    @classmethod
    def of(cls, content: Any) -> Self:
        """Without what a newer version has added: a job runs the code it was launched with. TypeError for others."""
        if not isinstance(content, dict):
            raise TypeError(f"{type(content).__name__} instead of an object")
        known = {one.name for one in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in content.items() if name in known})


@dataclass(frozen=True)
class JobSpec(_Stored):
    """Commands, and the processes that run them. A process is a rank; all ranks run the same commands in turn.

    commands: words after `pomscale`, for each command. ranks_by: see ClusterProfile. is_run: the home is a run folder,
    whose outcomes, generations and checkpoints tell what happened. wait_for: homes of jobs to wait for, where no
    scheduler does it ("ok": only if they succeed). evaluations: whether the recipe asks for evaluations of checkpoints.
    """

    job_folder: str
    name: str
    commands: list[list[str]]
    cwd: str
    num_nodes: int = 1
    ranks_per_node: int = 1
    ranks_by: Literal["srun", "torchrun"] = "srun"
    environment: dict[str, str] = field(default_factory=dict)
    max_idle_requeues: int = 3
    is_run: bool = False
    wait_for: dict[str, Literal["ok", "any"]] = field(default_factory=dict)
    evaluations: bool = False

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node


@dataclass(frozen=True)
class LaunchedAs(_Stored):
    """recipe: path of the resolved one inside the home. profile: resolved. gpus_per_node: instead of the profile's."""

    recipe: str | None
    cluster: str
    profile: dict[str, Any]
    num_nodes: int
    time_limit: str | None
    command_line: list[str]
    gpus_per_node: int | None = None


@dataclass(frozen=True)
class Submission(_Stored):
    """One line of jobs.jsonl. job_id: of an array, that of the whole array; num_tasks: its size."""

    job_id: str
    submitted_unix_s: float
    scheduler: Literal["slurm", "local", "debug"]
    num_nodes: int
    num_tasks: int = 1


@dataclass(frozen=True)
class StartRecord(_Stored):
    """One start of a job. hosts: by node; rank r runs on hosts[r // ranks_per_node]."""

    job_id: str
    restart: int
    hosts: list[str]
    ranks_per_node: int
    started_unix_s: float
    newest_generation: int  # of the run, when this began: what comes after is of this start

    def host_of(self, rank: int) -> str:
        return self.hosts[min(rank // self.ranks_per_node, len(self.hosts) - 1)]


@dataclass(frozen=True)
class Ending(_Stored):
    """How a rank's process ended. returncode: negative for a signal. told_to_end: by a signal that its guard got."""

    rank: int
    host: str
    pid: int
    started_unix_s: float
    ended_unix_s: float
    returncode: int
    out_of_memory: bool = False
    told_to_end: str | None = None
    last_line: str = ""
    log: str = ""


@dataclass(frozen=True)
class Verdict(_Stored):
    """What came of one start. reason: one line. suspects: hosts to avoid. num_idle: requeues in a row without progress.

    samples: of the run's newest complete checkpoint, None where there is none. exit_code: of the job.
    """

    action: Action
    reason: str
    exit_code: int
    decided_unix_s: float
    suspects: list[str] = field(default_factory=list)
    num_idle: int = 0
    samples: int | None = None
    log: str = ""


@dataclass(frozen=True)
class JobStart:
    """One start of a job as its folder tells it; verdict: None while it runs, or if nobody lived to give one."""

    folder: Path
    start: StartRecord
    verdict: Verdict | None


_Kept = TypeVar("_Kept", bound=_Stored)


def keep(path: Path, what: _Stored) -> None:
    """Write it, whole or not at all. PomscaleError, naming the file, if it cannot be written."""
    make_folder(path.parent)
    write_text(path, what.to_json())


@contextmanager
def sole_launch(job_folder: Path) -> Iterator[None]:
    """Keeps other launches out of this home for the duration of the block. InputError while one is at work there.

    A lock of the file system: where there are none (NFS without its lock daemon), two launches in one moment may meet.
    """
    make_folder(job_folder)
    with (job_folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{job_folder}: another launch is at work there; look with `pomscale runs {job_folder}`"
            ) from error
        except OSError as problem:
            warn(f"{job_folder}: no locks here ({problem}); do not launch twice at once")
        yield


def start_folder(job_folder: Path, job_id: str, restart: int) -> Path:
    return job_folder / STARTS / f"{job_id}-{restart}"


def ending_path(start: Path, rank: int) -> Path:
    return start / f"rank-{rank:05d}.json"


def log_path(job_folder: Path, rank: int) -> Path:
    return job_folder / LOGS / f"rank-{rank:05d}.log"


def endings(start: Path) -> list[Ending]:
    """Of the ranks that have one so far, by rank. One that cannot be read counts as not there."""
    found = [_readable(Ending, path) for path in sorted(start.glob("rank-*.json"))]
    return [ending for ending in found if ending is not None]


def read_starts(job_folder: Path) -> list[JobStart]:
    """All starts, oldest first. One that cannot be read is left out: remains of an old one must not end a new one."""
    found = []
    for folder in (job_folder / STARTS).glob("*-*"):
        if not (folder / "start.json").is_file():
            continue  # its first process is just writing it
        start, verdict = _readable(StartRecord, folder / "start.json"), folder / "verdict.json"
        if start is not None:
            found.append(JobStart(folder, start, _readable(Verdict, verdict) if verdict.is_file() else None))
    return sorted(found, key=lambda start: start.record.started_unix_s)


def _readable(kind: type[_Kept], path: Path) -> _Kept | None:
    """None, and a line on standard error, for a file that cannot be read."""
    try:
        return kind.read(path)
    except PomscaleError as problem:
        _warn_once(str(problem))
        return None


@cache
def _warn_once(problem: str) -> None:
    """Once: a supervisor looks every second."""
    warn(problem)


def submissions(job_folder: Path) -> list[Submission]:
    """All submissions, oldest first."""
    rows, _ = read_json_lines(job_folder / JOBS_FILE)
    return [Submission.of(row) for row in rows]
