"""Runs as their folders and SLURM tell of them: which there are, how far each is, and what it is doing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.record.job import JOB_FILE
from launch.scheduler import slurm
from launch.scheduler.slurm import JobState
from launch.status.facts import Facts, read_facts
from launch.status.state import State, is_settled, state_by_home, state_of
from launch.status.tail import read_object
from pomscale.base.errors import InputError, PomscaleError
from pomscale.runs.layout import CLAIMS_FOLDER, METRICS_FILE, STARTS_FILE
from pomscale.runs.metric_names import goodput_share

RUNS = Path("runs")
"""Where runs are looked for by name; recipes put them there unless they say otherwise."""

_PIPELINE_FILE = "pipeline.json"  # launch.pipelines.file, which knows of everything that can be launched
_MARKS = {JOB_FILE, METRICS_FILE, STARTS_FILE, CLAIMS_FOLDER}
_MAX_DEPTH = 3  # FOLDER/SWEEP/POINT


class NoSuchRun(InputError):
    """Not there, or not yet."""


@dataclass(frozen=True)
class RunSummary:
    """One line of the table. share, eta_s: None where nobody has written how many samples there will be.

    reason: of the state, one line. job_id: of SLURM. last_row_unix_s: when metrics were last written. started_unix_s:
    the newest start, or the submission that waits.
    """

    home: Path
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

    @property
    def share(self) -> float | None:
        """Of the samples that there will be, 0 to 1."""
        return None if self.samples is None or not self.total_samples else self.samples / self.total_samples


@dataclass(frozen=True)
class Summaries:
    """runs: newest first. problem: why SLURM could not be asked; then the states are what the folders tell."""

    runs: list[RunSummary]
    problem: str = ""


def find_runs(folder: Path) -> dict[Path, str]:
    """Homes of jobs, run folders among them, below a folder, or the folder itself -> their names within it.

    InputError if there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; name the folder that holds your runs, e.g. `pomscale runs $SCRATCH/runs`"
        )
    if is_home(folder):
        return {folder: folder.resolve().name}
    return {home: _name_in(folder, home) for home in _homes_below(folder, _MAX_DEPTH)}


def _name_in(folder: Path, home: Path) -> str:
    inside = home.absolute().is_relative_to(folder.absolute())
    return str(home.absolute().relative_to(folder.absolute())) if inside else str(home)


def _homes_below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        pipeline = read_object(folder / _PIPELINE_FILE)
        below = [Path(entry.path) for entry in os.scandir(folder) if not entry.is_file(follow_symlinks=False)]
    except OSError:  # no folder, somebody else's, or deleted just now
        return
    if pipeline is not None:  # the homes of its stages, some of which are run folders elsewhere
        try:
            homes = [Path(stage["home"]) for stage in pipeline["stages"]]
        except (KeyError, TypeError):  # not ours, or damaged: what lies below tells for itself
            homes = []
        if homes:
            yield from homes
            return
    for path in below:
        if is_home(path):
            yield path
        elif depth > 1:
            yield from _homes_below(path, depth - 1)


def is_home(folder: Path) -> bool:
    """Whether a run has begun there, or a job was launched."""
    try:
        return not _MARKS.isdisjoint(os.listdir(folder))
    except OSError:  # not there, no folder, or somebody else's
        return False


def resolve_run(word: str) -> Path:
    """A run by its folder, its name below runs/, or the beginning of its name. InputError unless that is one run."""
    path = Path(word)
    if is_home(path):
        return path
    if path.is_dir() and len(path.parts) > 1:
        raise NoSuchRun(
            f"{path}: no run folder: it has none of {', '.join(sorted(_MARKS))}; `pomscale runs {path}` looks below"
        )
    named = find_runs(RUNS) if RUNS.is_dir() else {}
    exact = [home for home, name in named.items() if word in (name, home.name)]
    begun = [home for home, name in named.items() if word and (name.startswith(word) or home.name.startswith(word))]
    found = exact or begun
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(sorted(str(home) for home in found)[:8])
        raise InputError(f"{word}: several runs are called so: {several}; name the folder of one")
    raise NoSuchRun(f"{word}: no run folder, and no run of that name in {RUNS}/; `pomscale runs` lists those there are")


def summarize(homes: Mapping[Path, str]) -> Summaries:
    """homes: folder -> name. One question to SLURM for all; never fails for what one of the folders holds."""
    now_unix_s = time.time()
    facts: dict[Path, Facts] = {}
    unreadable: list[RunSummary] = []
    for home, name in homes.items():
        try:
            facts[home] = read_facts(home)
        except PomscaleError as error:
            unreadable.append(RunSummary(home, name, "unknown", str(error)))
    jobs, problem = ask_slurm(facts.values(), now_unix_s)
    runs = [
        summary(of_home, homes[home], state_of(of_home, jobs, now_unix_s), now_unix_s)
        for home, of_home in facts.items()
    ]
    runs.sort(key=lambda run: run.started_unix_s, reverse=True)
    return Summaries(runs + unreadable, problem)


def ask_slurm(facts: Iterable[Facts], now_unix_s: float) -> tuple[Mapping[str, JobState] | None, str]:
    """(What SLURM knows of the jobs of those homes that do not tell how they ended, why it could not be asked.)

    None where nobody need be asked, or nobody answers.
    """
    job_ids = {of_home.slurm_job for of_home in facts if not is_settled(of_home, state_by_home(of_home, now_unix_s))}
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
    started = [facts.claim.unix_s] if facts.claim is not None else []
    if facts.submission is not None:
        started.append(facts.submission.submitted_unix_s)
    if facts.incarnation is not None:
        started.append(facts.incarnation["started_unix_s"])
    samples = _samples(facts)
    total = None if facts.incarnation is None else facts.incarnation.get("total_samples")
    return RunSummary(
        facts.home,
        name,
        state.word,
        " ".join(state.reason.split()),  # an exception may have said more than a line
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
    )


def _samples(facts: Facts) -> int | None:
    """Seen so far: a new start goes back to its checkpoint before it logs."""
    if facts.rows and (facts.incarnation is None or facts.rows[-1]["incarnation"] >= facts.incarnation["incarnation"]):
        return int(facts.rows[-1]["samples"])
    return None if facts.incarnation is None else int(facts.incarnation["start_samples"])


def _eta_s(rows: Sequence[Mapping[str, float]], samples: int | None, total: int | None) -> float | None:
    """At the speed of the last rows, saving and evaluation included."""
    if samples is None or total is None or len(rows) < 2:
        return None
    gained, took_s = rows[-1]["samples"] - rows[0]["samples"], rows[-1]["time_unix_s"] - rows[0]["time_unix_s"]
    return (total - samples) * took_s / gained if gained > 0 else None
