"""Runs: find them by their folders, and summarize each from its folder and SLURM."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.record.pipeline import PIPELINE_FILE, stage_folders
from launch.scheduler import slurm
from launch.scheduler.slurm import JobState
from launch.status.facts import Facts, read_facts
from launch.status.state import State, is_settled, state_by_folder, state_of
from launch.status.tail import read_object
from pomscale.base.errors import InputError, PomscaleError
from pomscale.runs.evaluation_log import read_evaluations
from pomscale.runs.layout import CLAIMS_FOLDER, JOB_FILE, METRICS_FILE, STARTS_FILE
from pomscale.runs.metric_names import QUALITY, goodput_share

RUNS = Path("runs")
"""The folder in which runs are looked up by name; the default `output` of recipes."""

_MARKS = {JOB_FILE, METRICS_FILE, STARTS_FILE, CLAIMS_FOLDER}
_MAX_DEPTH = 3  # FOLDER/SWEEP/POINT


class NoSuchRun(InputError):
    """There is no such run, or not yet."""


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run: one line of the table.

    reason: of the state, one line. job_id: of SLURM. share, eta_s: None if the total number of samples is not known.
    last_row_unix_s: when metrics were last written. started_unix_s: time of the newest start, or of the submission that
    waits. quality: the figures of the newest checkpoint whose generated samples were measured, by name.
    """

    job_folder: Path
    name: str
    state: str
    reason: str = ""
    log: str = ""
    job_id: str | None = None
    num_starts: int = 0
    samples: int | None = None
    total_samples: int | None = None
    loss: float | None = None
    samples_per_s: float | None = None
    goodput: float | None = None
    eta_s: float | None = None
    last_row_unix_s: float | None = None
    started_unix_s: float = 0.0
    quality: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """Share of the total number of samples, 0 to 1."""
        return None if self.samples is None or not self.total_samples else self.samples / self.total_samples


@dataclass(frozen=True)
class Summaries:
    """Summaries of runs, newest first. problem: why SLURM could not be asked, so that only the folders were read."""

    runs: list[RunSummary]
    problem: str = ""


def find_runs(folder: Path) -> dict[Path, str]:
    """Find the job folders, which include run folders, below a folder or the folder itself. Return names by folder.

    InputError if there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; name the folder that holds your runs, e.g. `pomscale runs $SCRATCH/runs`"
        )
    if is_job_folder(folder):
        return {folder: folder.resolve().name}
    return {job_folder: _name_in(folder, job_folder) for job_folder in _job_folders_below(folder, _MAX_DEPTH)}


def _name_in(folder: Path, job_folder: Path) -> str:
    inside = job_folder.absolute().is_relative_to(folder.absolute())
    return str(job_folder.absolute().relative_to(folder.absolute())) if inside else str(job_folder)


def _job_folders_below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        pipeline = read_object(folder / PIPELINE_FILE)
        below = [Path(entry.path) for entry in os.scandir(folder) if not entry.is_file(follow_symlinks=False)]
    except OSError:  # no folder, no permission, or deleted just now
        return
    if pipeline is not None:  # some of its stages have their run folders elsewhere
        try:
            job_folders = stage_folders(folder, pipeline)
        except (KeyError, TypeError):  # another program's file, or damaged: look at the folders below
            job_folders = []
        if job_folders:
            yield from job_folders
            return
    for path in below:
        if is_job_folder(path):
            yield path
        elif depth > 1:
            yield from _job_folders_below(path, depth - 1)


def is_job_folder(folder: Path) -> bool:
    """Whether a run has begun in this folder, or a job was launched there."""
    try:
        return not _MARKS.isdisjoint(os.listdir(folder))
    except OSError:  # missing, no folder, or no permission
        return False


def resolve_run(word: str) -> Path:
    """Find a run by its folder, its name below runs/, or the beginning of its name. InputError unless one matches."""
    path = Path(word)
    if is_job_folder(path):
        return path
    if path.is_dir() and len(path.parts) > 1:
        raise NoSuchRun(
            f"{path}: no run folder: it has none of {', '.join(sorted(_MARKS))}; "
            f"`pomscale runs {shlex.quote(str(path))}` looks below"
        )
    named = find_runs(RUNS) if RUNS.is_dir() else {}
    exact = [job_folder for job_folder, name in named.items() if word in (name, job_folder.name)]
    begun = [
        job_folder
        for job_folder, name in named.items()
        if word and (name.startswith(word) or job_folder.name.startswith(word))
    ]
    found = exact or begun
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(sorted(str(job_folder) for job_folder in found)[:8])
        raise InputError(f"{word}: several runs have this name: {several}; name the folder of one")
    raise NoSuchRun(f"{word}: no run folder, and no run of that name in {RUNS}/; `pomscale runs` lists the runs")


def summarize(job_folders: Mapping[Path, str]) -> Summaries:
    """homes: folder -> name. One question to SLURM for all; never fails for what one of the folders holds."""
    now_unix_s = time.time()
    facts: dict[Path, Facts] = {}
    unreadable: list[RunSummary] = []
    for job_folder, name in job_folders.items():
        try:
            facts[job_folder] = read_facts(job_folder)
        except PomscaleError as error:
            unreadable.append(RunSummary(job_folder, name, "unknown", str(error)))
    jobs, problem = ask_slurm(facts.values(), now_unix_s)
    runs = [
        summary(one, job_folders[job_folder], state_of(one, jobs, now_unix_s), now_unix_s)
        for job_folder, one in facts.items()
    ]
    runs.sort(key=lambda run: run.started_unix_s, reverse=True)
    return Summaries(runs + unreadable, problem)


def ask_slurm(facts: Iterable[Facts], now_unix_s: float) -> tuple[Mapping[str, JobState] | None, str]:
    """Ask SLURM about the jobs of those job folders that have no record of their end.

    Returns (states by job id, why SLURM could not be asked). The states are None if SLURM need not be asked, or does
    not answer.
    """
    job_ids = {one.slurm_job for one in facts if not is_settled(one, state_by_folder(one, now_unix_s))}
    asked = sorted(job_id for job_id in job_ids if job_id is not None)
    if not asked:
        return None, ""
    if not slurm.is_available():
        return None, "SLURM's commands are not on this machine"
    try:
        return slurm.job_states(asked), ""
    except PomscaleError as problem:
        return None, str(problem)


def summary(facts: Facts, name: str, state: State, now_unix_s: float) -> RunSummary:
    """Summarize the facts and the state of a run."""
    started = [facts.claim.unix_s] if facts.claim is not None else []
    if facts.submission is not None:
        started.append(facts.submission.submitted_unix_s)
    if facts.run_start is not None:
        started.append(facts.run_start["started_unix_s"])
    samples = _samples(facts)
    total = None if facts.run_start is None else facts.run_start.get("total_samples")
    return RunSummary(
        facts.job_folder,
        name,
        state.word,
        " ".join(state.reason.split()),  # the message of an exception may have several lines
        state.log,
        facts.slurm_job,
        facts.num_starts,
        samples,
        total,
        facts.latest("train/loss"),
        facts.latest("speed/samples_per_s"),
        facts.latest(goodput_share("productive")),
        _eta_s(facts.rows, samples, total) if state.word in ("running", "stopping") else None,
        facts.rows[-1]["time_unix_s"] if facts.rows else None,
        max(started, default=facts.rows[-1]["time_unix_s"] if facts.rows else 0.0),
        _quality(facts.job_folder, samples),
    )


def _quality(job_folder: Path, samples: int | None) -> dict[str, float]:
    """Return the newest figures of generated samples. What lies beyond the run's samples it has given up."""
    measured = [
        one
        for one in read_evaluations(job_folder)
        if (samples is None or one.samples <= samples)
        and any(name.rpartition("/")[2] in QUALITY for name in one.metrics)
    ]
    return max(measured, key=lambda one: (one.samples, one.time_unix_s)).metrics if measured else {}


def _samples(facts: Facts) -> int | None:
    """Return the samples seen so far. A new start goes back to its checkpoint before it logs."""
    if facts.rows and (facts.run_start is None or facts.rows[-1]["incarnation"] >= facts.run_start["incarnation"]):
        return int(facts.rows[-1]["samples"])
    return None if facts.run_start is None else int(facts.run_start["start_samples"])


def _eta_s(rows: Sequence[Mapping[str, float]], samples: int | None, total: int | None) -> float | None:
    """Estimate the time left from the speed of the last rows, which includes saving and evaluation."""
    if samples is None or total is None or len(rows) < 2:
        return None
    gained, took_s = rows[-1]["samples"] - rows[0]["samples"], rows[-1]["time_unix_s"] - rows[0]["time_unix_s"]
    return (total - samples) * took_s / gained if gained > 0 else None
