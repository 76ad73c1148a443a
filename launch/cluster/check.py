"""`pomscale cluster check`: submit a short job in the same way as all jobs, and report what works on a cluster."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from launch.cluster.findings import (
    Finding,
    name_findings,
    rank_findings,
    requeue_finding,
    signal_finding,
    slurm_findings,
    world_findings,
)
from launch.record.job import read_starts
from launch.scheduler import slurm
from launch.status.runs import RUNS, RunSummary, summarize
from launch.status.state import LIVE
from launch.submission.control import cancel
from launch.submission.prepare import JobRequest, prepare_commands, resolved_output
from launch.submission.prepared import Prepared
from pomscale.base.errors import PomscaleError
from pomscale.config.cluster import ClusterProfile
from pomscale.runs.cluster_facts import rank_facts, ready_path, signal_path, world_facts
from pomscale.runs.layout import SUBMITIT_FOLDER

_FACTS = "facts"
_JOB_MINUTES = 10  # torch may take minutes to load from a file system that has not seen it for long
_LOOK_EVERY_S = 0.5
_SHOWN_LINES = 12  # of the log of a job that failed


@dataclass(frozen=True)
class CheckReport:
    """Report of a check. As text: a line for every finding, and below it the remedy. exit_code: 1 if a check failed."""

    title: str
    findings: list[Finding]
    log: str = ""

    @property
    def exit_code(self) -> int:
        return int(any(finding.status == "FAILED" for finding in self.findings))

    def __str__(self) -> str:
        lines = [self.title]
        for finding in self.findings:
            lines.append(f"{finding.status:<9}{finding.subject:<24}{finding.found}")
            if finding.remedy:
                lines.append(f"{'':<33}-> {finding.remedy}")
        if self.log:
            lines.append(self.log)
        counts = {status: sum(one.status == status for one in self.findings) for status in ("FAILED", "warning")}
        wrong = [
            f"{count} {status}{'s' if status == 'warning' and count > 1 else ''}"
            for status, count in counts.items()
            if count
        ]
        return "\n".join([*lines, f"{len(self.findings)} checks: {', '.join(wrong) or 'all ok'}"])


def check_cluster(
    name: str, profile: ClusterProfile, *, num_nodes: int | None = None, folder: Path | None = None
) -> CheckReport:
    """Submit a job of a minute, wait for it, and report.

    The state of the job is printed to standard error. Ctrl-C cancels the job.

    Args:
        name: Name of the profile, or its path.
        profile: The profile.
        num_nodes: Default: 2 with SLURM, else 1.
        folder: Folder in which the job folder is made. Default: the folder of runs. The job folder is removed again if
            no check failed.
    """
    with_slurm = profile.scheduler == "slurm"
    num_nodes = num_nodes or (2 if with_slurm else 1)
    title = f"cluster check of {name}: {num_nodes} x {profile.num_ranks_per_node} ranks"
    findings: list[Finding] = []
    try:
        if with_slurm:
            slurm.check_answers()
            names = (profile.partition or "").split(",")
            partitions = {name: slurm.partition(name or None) for name in names}
            findings += slurm_findings(profile, slurm.configuration(), partitions)
        prepared = _prepare(name, profile, num_nodes, folder)
        job_id = prepared.submit()
    except PomscaleError as error:
        problem = Finding("job", "FAILED", str(error), "correct the profile, or wait until SLURM answers")
        return CheckReport(title, [*findings, problem])
    job = _Job(prepared, job_id)
    try:
        job.follow()
    except BaseException:
        cancel(prepared.job_folder, wait_s=0)
        raise
    report = CheckReport(title, findings + job.findings(), job.log())
    if report.exit_code == 0:
        shutil.rmtree(prepared.job_folder)
    return report


def _prepare(name: str, profile: ClusterProfile, num_nodes: int, folder: Path | None) -> Prepared:
    job_name = f"cluster-check-{Path(name).stem}-{datetime.now():%m%d-%H%M%S}"
    job_folder = (folder or resolved_output(str(RUNS), profile)) / job_name
    words = ["cluster", "probe", str(job_folder.absolute() / _FACTS)]
    limit = None
    if profile.scheduler == "slurm":
        words.append("--signal")
        minutes = _JOB_MINUTES + profile.signal_lead_s // 60  # else SLURM would send its signal at once
        limit = f"{minutes // 60}:{minutes % 60:02d}:00"
    if profile.offline:
        words.append("--offline")
    request = JobRequest(profile, name, num_nodes=num_nodes, time_limit=limit)
    prepared = prepare_commands(job_name, job_folder, [words], request)
    # is_run makes the ranks find each other; a job that is killed does not start again.
    return replace(prepared, spec=replace(prepared.spec, is_run=True, max_idle_requeues=0))


class _Job:
    """The job of one check."""

    def __init__(self, prepared: Prepared, job_id: str) -> None:
        self._prepared = prepared
        self._job_id = job_id
        self._job_folder, self._num_ranks = prepared.job_folder, prepared.spec.num_ranks
        self._with_slurm = prepared.profile.scheduler == "slurm"
        self._requeue: Finding | None = None
        self._sent_s: float | None = None
        self._arrived_s: float | None = None
        self._refused = ""
        self._state: RunSummary | None = None

    def follow(self) -> None:
        """Wait until the job has ended. Send it the signal that it waits for."""
        if self._with_slurm:
            self._requeue = requeue_finding(slurm.details(self._job_id))
        printed = ""
        while True:
            self._state = summarize({self._job_folder: self._job_folder.name}).runs[0]
            line = f"job {self._job_id}: {self._state.state}" + (
                f" ({self._state.reason})" if self._state.reason else ""
            )
            if line != printed:
                print(line, file=sys.stderr, flush=True)
                printed = line
            if self._state.state not in LIVE:
                return
            if self._with_slurm:
                self._see_to_signals()
            time.sleep(_LOOK_EVERY_S)

    def _see_to_signals(self) -> None:
        facts = self._job_folder / _FACTS
        ranks = range(self._num_ranks)
        if self._sent_s is None and not self._refused and all(ready_path(facts, rank).exists() for rank in ranks):
            try:
                slurm.send_signal(self._job_id, "USR2")
                self._sent_s = time.monotonic()
            except PomscaleError as error:
                self._refused = str(error)
        if self._arrived_s is None and all(signal_path(facts, rank).exists() for rank in ranks):
            self._arrived_s = time.monotonic()

    def findings(self) -> list[Finding]:
        facts, profile = self._job_folder / _FACTS, self._prepared.profile
        assert self._state is not None
        findings = [self._job_finding(), *name_findings(self._state.reason)]
        if self._requeue is not None:
            findings.append(self._requeue)
        ranks, world = rank_facts(facts), world_facts(facts)
        findings += rank_findings(ranks, self._num_ranks, profile, self._job_folder.parent)
        if ranks:
            findings += world_findings(world, has_gpus=all(one.gpu is not None for one in ranks.values()))
        if world is not None and self._with_slurm:
            findings.append(self._signal_finding())
        return findings

    def _job_finding(self) -> Finding:
        assert self._state is not None
        found = f"{self._job_id}: {self._state.state}" + (f": {self._state.reason}" if self._state.reason else "")
        started = read_starts(self._job_folder)
        if self._state.state == "finished" and started:
            start = started[-1].record
            waited_s = start.started_unix_s - self._state.started_unix_s
            return Finding("job", "ok", f"{self._job_id} on {', '.join(start.hosts)}, begun after {waited_s:.0f} s")
        return Finding("job", "FAILED", found, f"see {self._log_path() or self._job_folder}")

    def _signal_finding(self) -> Finding:
        facts = self._job_folder / _FACTS
        num_arrived = sum(signal_path(facts, rank).exists() for rank in range(self._num_ranks))
        took_s = None if self._sent_s is None else (self._arrived_s or time.monotonic()) - self._sent_s
        return signal_finding(num_arrived, self._num_ranks, took_s, self._refused)

    def log(self) -> str:
        """Return the end of the log of a job that failed; "" if it did not fail."""
        assert self._state is not None
        path = self._log_path()
        if self._state.state == "finished" or path is None:
            return ""
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"the end of {path}:", *(f"    {line}" for line in lines[-_SHOWN_LINES:])])

    def _log_path(self) -> Path | None:
        """Return the log of the rank that failed first, or else the output of the job script."""
        assert self._state is not None
        if self._state.log:
            return Path(self._state.log)
        printed = [path for path in sorted((self._job_folder / SUBMITIT_FOLDER).glob("*.out")) if path.stat().st_size]
        return printed[0] if printed else None
