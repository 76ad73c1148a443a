"""A job and the files in its job folder, which is the run folder or the folder of another kind of job.

    JOB_FOLDER/job.json               commands and processes of the job (JobSpec); read by every start of the job
    JOB_FOLDER/launch.json            how the job was launched (LaunchedAs); `pomscale runs resume` needs it
    JOB_FOLDER/code/                  frozen copy of the code that the job runs
    JOB_FOLDER/jobs.jsonl             one line per submission (Submission)
    JOB_FOLDER/attempts/JOB-RESTART/  one folder per start of the job, restarts by SLURM included
        start.json                    where the start runs (StartRecord)
        rank-00000.json               how a rank's process ended, as its guard saw it (Ending)
        verdict.json                  how the start ended and what happens next (Verdict)
        end                           made by the supervisor when a rank of a run has failed: all other ranks shall end
        requeue                       made if the job shall start again; holds the hosts to avoid, comma-separated
        refused                       made by the job script if SLURM does not start it again; holds SLURM's words
    JOB_FOLDER/logs/rank-00000.log    output of a rank, over all starts; the tasks of an array are numbered in sequence
    JOB_FOLDER/submitit/              submitit's files, and the output of the guards

The outcomes that training itself leaves are in pomscale.runs.outcome.
"""

from __future__ import annotations

import fcntl
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pomscale.base.console import warn
from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import make_folder, write_text
from pomscale.base.jsonl import read_json_lines
from pomscale.runs.layout import (
    ATTEMPTS_FOLDER,
    JOBS_FILE,
    LAUNCH_LOCK_FILE,
    LOGS_FOLDER,
    REFUSED_FILE,
    START_FILE,
    VERDICT_FILE,
)
from pomscale.runs.original import original_of

Action = Literal["done", "requeue", "fail", "leave"]
"""leave: the scheduler is ending or restarting the job by itself."""

Condition = Literal["ok", "any"]
"""When a job may begin that waits for another: once that has succeeded, or once it has ended in any way."""


def stored_as(key: str) -> dict[str, str]:
    """Metadata of a field whose key on disk is older than its name, and must stay."""
    return {"key": key}


def _key(one: Field[Any]) -> str:
    key: str = one.metadata.get("key", one.name)
    return key


class Stored:
    """Base of the dataclasses that are kept as JSON objects."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values by their keys on disk."""
        return {_key(one): getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raise PomscaleError if the file is missing or does not hold such an object."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise PomscaleError(f"{path} cannot be read: {error}") from error

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """Raise TypeError for anything but such an object.

        Unknown keys are ignored: a job runs the code it was launched with, and a newer version may have added some.
        """
        if not isinstance(content, dict):
            raise TypeError(f"{type(content).__name__} instead of an object")
        names = {_key(one): one.name for one in fields(cls)}  # type: ignore[arg-type]
        return cls(**{names[key]: value for key, value in content.items() if key in names})


@dataclass(frozen=True)
class JobSpec(Stored):
    """Commands, and the processes that run them. A process is a rank; all ranks run the same commands in turn.

    commands: the words after `pomscale`, for each command. ranks_by: see ClusterProfile. is_run: whether the job folder
    is a run folder, whose outcomes, starts and checkpoints show what happened. wait_for: the condition by job folder,
    for jobs before this one. Where no scheduler sees to it, this job waits for them; on SLURM it checks that they have
    succeeded. evaluations: whether the recipe asks for evaluations of checkpoints.
    """

    job_folder: str = field(metadata=stored_as("home"))
    name: str
    commands: list[list[str]]
    cwd: str
    num_nodes: int = 1
    ranks_per_node: int = 1
    ranks_by: Literal["srun", "torchrun"] = "srun"
    environment: dict[str, str] = field(default_factory=dict)
    max_idle_requeues: int = 3
    is_run: bool = False
    wait_for: dict[str, Condition] = field(default_factory=dict)
    evaluations: bool = False

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node


@dataclass(frozen=True)
class LaunchedAs(Stored):
    """Record of a launch, with all that `pomscale runs resume` needs.

    recipe: path of the resolved recipe inside the job folder. profile: the resolved profile. gpus_per_node: replaces
    the profile's.
    """

    recipe: str | None
    cluster: str
    profile: dict[str, Any]
    num_nodes: int
    time_limit: str | None
    command_line: list[str]
    gpus_per_node: int | None = None


@dataclass(frozen=True)
class Submission(Stored):
    """One line of jobs.jsonl.

    job_id: for an array, the id of the whole array. num_tasks: the size of the array. job_folder: path of the job
    folder when the job was submitted; None in a line of an older version. output: file with what a job script of the
    user's own prints; None for a job of `pomscale launch`, which prints into JOB_FOLDER/submitit.
    """

    job_id: str
    submitted_unix_s: float
    scheduler: Literal["slurm", "local", "debug"]
    num_nodes: int
    num_tasks: int = 1
    job_folder: str | None = field(default=None, metadata=stored_as("home"))
    output: str | None = None

    def original(self, job_folder: Path) -> Path | None:
        """Return the job folder that this line of jobs.jsonl belongs to, if it came into this one with a copy."""
        return original_of(job_folder, self.job_folder, lambda other: self in read_submissions(other))


@dataclass(frozen=True)
class StartRecord(Stored):
    """Hosts and time of a start of a job.

    hosts: by node; rank r runs on hosts[r // ranks_per_node]. newest_run_start: the number of the run's newest start
    when this start of the job began; later numbers belong to this start.
    """

    job_id: str
    restart: int
    hosts: list[str]
    ranks_per_node: int
    started_unix_s: float
    newest_run_start: int = field(metadata=stored_as("newest_generation"))

    def host_of(self, rank: int) -> str:
        return self.hosts[min(rank // self.ranks_per_node, len(self.hosts) - 1)]


@dataclass(frozen=True)
class Ending(Stored):
    """End of a rank's process, as its guard saw it.

    returncode: negative for a signal. ended_by: the signal, received by the rank's guard, that asked the process to
    end; or the supervisor.
    """

    rank: int
    host: str
    pid: int
    started_unix_s: float
    ended_unix_s: float
    returncode: int
    out_of_memory: bool = False
    ended_by: str | None = field(default=None, metadata=stored_as("told_to_end"))
    last_line: str = ""
    log: str = ""


@dataclass(frozen=True)
class Verdict(Stored):
    """Decision of the supervisor on one start of a job: how it ended, and what happens next.

    reason: one line. exit_code: of the job. suspects: hosts to avoid. num_idle: requeues in a row without progress.
    samples: of the run's newest complete checkpoint; None if there is none.
    """

    action: Action
    reason: str
    exit_code: int
    decided_unix_s: float
    suspects: list[str] = field(default_factory=list)
    num_idle: int = 0
    samples: int | None = None
    log: str = ""

    def seen_from(self, job_folder: Path) -> Self:
        """Return this verdict with the log where it lies now: the folder may have been moved or copied since."""
        return replace(self, log=str(job_folder / LOGS_FOLDER / Path(self.log).name)) if self.log else self


@dataclass(frozen=True)
class JobStart:
    """One start of a job, as its folder shows it.

    verdict: None while the start runs, or if its supervisor died before it could decide. refusal: SLURM's reason for
    not starting the job again although the verdict asks for it; "" otherwise.
    """

    folder: Path
    record: StartRecord
    verdict: Verdict | None
    refusal: str = ""


_Kept = TypeVar("_Kept", bound=Stored)


def keep(path: Path, what: Stored) -> None:
    """Write the object, completely or not at all. PomscaleError, naming the file, if it cannot be written."""
    make_folder(path.parent)
    write_text(path, json.dumps(what.to_dict(), indent=1))


@contextmanager
def sole_launch(job_folder: Path) -> Iterator[None]:
    """Keep other launches out of this job folder for the duration of the block. InputError if one is under way.

    This is a lock of the file system. Where there are none (NFS without its lock daemon), two launches at the same
    moment are not kept apart.
    """
    make_folder(job_folder)
    with (job_folder / LAUNCH_LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{job_folder}: another launch is under way there; look with "
                f"`pomscale runs {shlex.quote(str(job_folder))}`"
            ) from error
        except OSError as problem:
            warn(f"{job_folder}: the file system has no locks ({problem}); do not launch twice at once")
        yield


def start_folder(job_folder: Path, job_id: str, restart: int) -> Path:
    return job_folder / ATTEMPTS_FOLDER / f"{job_id}-{restart}"


def ending_path(folder: Path, rank: int) -> Path:
    """Return the file of a rank in the folder of a start."""
    return folder / f"rank-{rank:05d}.json"


def log_path(job_folder: Path, rank: int) -> Path:
    return job_folder / LOGS_FOLDER / f"rank-{rank:05d}.log"


def read_endings(folder: Path) -> list[Ending]:
    """Return the endings that the folder of a start holds so far, by rank. An unreadable one counts as missing."""
    found = [_readable(Ending, path) for path in sorted(folder.glob("rank-*.json"))]
    return [ending for ending in found if ending is not None]


def read_starts(job_folder: Path) -> list[JobStart]:
    """Return all starts, oldest first.

    One that cannot be read is left out: the remains of an old start must not end a new one.
    """
    found = []
    for folder in (job_folder / ATTEMPTS_FOLDER).glob("*-*"):
        if not (folder / START_FILE).is_file():
            continue  # its first process is just writing it
        record, verdict = _readable(StartRecord, folder / START_FILE), folder / VERDICT_FILE
        if record is not None:
            decided = _readable(Verdict, verdict) if verdict.is_file() else None
            decided = None if decided is None else decided.seen_from(job_folder)
            found.append(JobStart(folder, record, decided, read_refusal(folder)))
    return sorted(found, key=lambda start: start.record.started_unix_s)


def read_refusal(folder: Path) -> str:
    """Return SLURM's reason for not starting a job again after the start in this folder; "" if it gave none."""
    try:
        return " ".join((folder / REFUSED_FILE).read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return ""


def _readable(kind: type[_Kept], path: Path) -> _Kept | None:
    """Return None, and warn, for a file that cannot be read."""
    try:
        return kind.read(path)
    except PomscaleError as problem:
        _warn_once(str(problem))
        return None


@cache
def _warn_once(problem: str) -> None:
    """Warn once per problem, since a supervisor looks every second."""
    warn(problem)


def read_submissions(job_folder: Path) -> list[Submission]:
    """Return all submissions, oldest first."""
    rows, _ = read_json_lines(job_folder / JOBS_FILE)
    return [Submission.from_dict(row) for row in rows]
