"""The supervisor of a job. It runs in the guard of rank 0, outside of the training processes.

It sees how ranks end, reads what they have left in the run folder, decides (launch.node.verdict) and writes the
verdict. The verdict is carried out outside of the job's own processes: on SLURM by the job script, which runs outside
of any container and outlives srun (slurm/requeue.sh), on one machine by launch.task.
"""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from launch.node.evaluations import Evaluations, note_failure
from launch.node.identity import RankIdentity
from launch.node.signals import SignalForwarder
from launch.node.verdict import EXIT_STOPPED, Evidence, decide_verdict, idle_so_far
from launch.record.job import Ending, JobSpec, JobStart, StartRecord, Verdict, keep, read_endings, read_starts
from launch.scheduler import slurm
from pomscale.base.console import say, warn
from pomscale.base.errors import PomscaleError
from pomscale.base.files import write_text
from pomscale.runs.checkpoint_folder import complete_checkpoints, samples_of
from pomscale.runs.layout import (
    CHECKPOINTS_FOLDER,
    END_FILE,
    REFUSED_FILE,
    REQUEUE_FILE,
    START_FILE,
    VERDICT_FILE,
)
from pomscale.runs.outcome import outcomes_after
from pomscale.runs.starts import newest_start

GRACE_S = 10.0
"""Time that a rank has to end after another one has failed. Then it is killed: it may wait for the other forever."""
ENDED_BY_SUPERVISOR = "the supervisor"

# How long the guards of the other ranks may take to leave their endings: a shared file system shows new files late.
_SETTLE_S = 40.0
# After a failure the hosts of silent ranks are suspected: NFS may take a minute to show the file `end` to the other
# guards, and another minute to show their endings here.
_SETTLE_AFTER_A_BAD_END_S = 140.0
_LOOK_EVERY_S, _EVALUATE_EVERY_S = 1.0, 5.0
_CLOCK_SKEW_S = 60.0
_GOOD_ENDS = (0, EXIT_STOPPED)


class Supervisor:
    """Supervisor of one start of a job."""

    def __init__(self, spec: JobSpec, identity: RankIdentity, folder: Path, forwarding: SignalForwarder) -> None:
        self._spec = spec
        self._identity = identity
        self._start_folder = folder
        self._forwarding = forwarding
        self._job_folder = Path(spec.job_folder)
        self._before: JobStart | None = None
        self._looked_s = self._evaluated_s = 0.0
        self._first_bad_s: float | None = None
        self._warned = ""
        self._leave_verdict: Verdict | None = None
        self._evaluations: Evaluations | None = None
        self._evaluating: threading.Thread | None = None

    def begin(self) -> str | None:
        """Record this start. Return why the job was started again; None if it is the first start."""
        earlier = self._earlier_starts()
        if earlier:
            self._before = self._with_verdict(earlier)
        start = StartRecord(
            self._identity.job_id,
            self._identity.restart,
            list(self._identity.hosts),
            self._spec.ranks_per_node,
            time.time(),
            newest_start(self._job_folder),
        )
        # A SLURM that was set up again counts its jobs from 1, so an older job may have left files in this folder.
        for name in (VERDICT_FILE, REQUEUE_FILE, REFUSED_FILE, END_FILE):
            (self._start_folder / name).unlink(missing_ok=True)
        keep(self._start_folder / START_FILE, start)
        self._start = start
        self._check_progress()
        if self._spec.evaluations:
            try:
                self._evaluations = Evaluations(self._job_folder)
            except (PomscaleError, OSError) as problem:
                self._warn(f"{problem}; no checkpoint is evaluated during this start")
        return None if self._before is None or self._before.verdict is None else self._before.verdict.reason

    def _check_progress(self) -> None:
        """Fail a job that has brought down the node of rank 0 too often: SLURM alone would restart it forever."""
        before = None if self._before is None else self._before.verdict
        if before is None or before.action != "leave" or before.num_idle <= self._spec.max_idle_requeues:
            return
        reason = f"{before.num_idle} starts in a row made no progress; the last one: {before.reason}"
        self._keep(self._start_folder, Verdict("fail", reason, 1, time.time(), samples=before.samples))
        raise PomscaleError(f"{self._job_folder}: {reason}; `pomscale runs resume` tries once more")

    def refuse(self, reason: str) -> int:
        """Record that this start does not begin. Return the job's exit code."""
        verdict = Verdict("fail", reason, 1, time.time())
        say(f"{verdict.action}: {reason}")
        self._keep(self._start_folder, verdict)
        return verdict.exit_code

    def _earlier_starts(self) -> list[JobStart]:
        """Return the starts so far. The tasks of an array run side by side: each counts only its own."""
        found, job_id = read_starts(self._job_folder), self._identity.job_id
        return [one for one in found if one.record.job_id == job_id] if "_" in job_id else found

    def _with_verdict(self, earlier: list[JobStart]) -> JobStart:
        """Return the last start, with a verdict.

        If its supervisor died with its node, or was killed by the scheduler, it has left none, and one is made here.
        """
        before = earlier[-1]
        if before.verdict is not None:
            return before
        last = next((one.verdict for one in reversed(earlier) if one.verdict is not None), None)
        samples = self._samples()
        num_idle = idle_so_far(last)
        if self._spec.is_run:  # only a run has checkpoints to go by
            made_progress = (samples or 0) > ((last.samples if last is not None else None) or 0)
            num_idle = 0 if made_progress else num_idle + 1
        bad = self._bad_nodes(before.record.hosts)
        reason = f"node failure: {', '.join(bad)}" if bad else "ended by the scheduler, or with the node of rank 0"
        verdict = Verdict("leave", reason, 0, time.time(), bad, num_idle, samples)
        self._keep(before.folder, verdict)
        return JobStart(before.folder, before.record, verdict)

    def poll(self, child: subprocess.Popen[bytes]) -> None:
        """Look at ranks, scheduler and checkpoints, once a second. To be called often while rank 0 runs."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now_s
        try:
            self._look_at_other_ranks(child, now_s)
            self._look_at_scheduler()
            is_due = now_s - self._evaluated_s > _EVALUATE_EVERY_S
            # Not once the start was asked to stop: a slow scheduler must not use up the time for the verdict.
            if self._evaluations is not None and is_due and self._forwarding.first is None:
                self._evaluated_s = now_s
                self._evaluate(self._evaluations)
        except (PomscaleError, OSError) as problem:  # a temporary error of the file system must not end the run
            self._warn(str(problem))

    def _evaluate(self, evaluations: Evaluations) -> None:
        """Start due evaluations in a thread: a slow scheduler must not keep a lost rank from being noticed."""
        if self._evaluating is not None and self._evaluating.is_alive():
            return

        def poll() -> None:
            try:
                evaluations.poll()
            except (PomscaleError, OSError) as problem:
                self._warn(str(problem))

        self._evaluating = threading.Thread(target=poll, name="evaluations", daemon=True)
        self._evaluating.start()

    def _warn(self, problem: str) -> None:
        """Warn, unless the last warning was the same."""
        if problem != self._warned:
            warn(problem)
        self._warned = problem

    def _keep(self, folder: Path, verdict: Verdict) -> None:
        """Write a verdict. On a full disk only the output of this guard shows it."""
        try:
            keep(folder / VERDICT_FILE, verdict)
        except PomscaleError as problem:
            self._warn(str(problem))

    def _look_at_other_ranks(self, child: subprocess.Popen[bytes], now_s: float) -> None:
        """End all ranks of a run once one has failed. With NCCL they would wait for it until the watchdog acts."""
        if not self._spec.is_run:
            return
        if self._first_bad_s is None and any(one.returncode not in _GOOD_ENDS for one in self._endings()):
            self._first_bad_s = now_s
            self._end_all()
        if self._first_bad_s is not None and now_s - self._first_bad_s > GRACE_S:
            self._forwarding.first = self._forwarding.first or ENDED_BY_SUPERVISOR
            child.kill()

    def _end_all(self) -> None:
        """Ask all guards to end their ranks. A guard that leaves no ending then is gone with its node."""
        try:
            (self._start_folder / END_FILE).touch()
        except OSError as problem:
            self._warn(f"{problem}; the other ranks are not asked to end")

    def _look_at_scheduler(self) -> None:
        """Find out whether a SIGTERM means that SLURM is ending the job itself.

        If so, only seconds are left to write the verdict and to exclude bad nodes.
        """
        if self._leave_verdict is not None or self._forwarding.first != "SIGTERM" or not self._identity.on_slurm:
            return
        if not slurm.is_available():  # in a container: the job script decides
            return
        try:
            state = self._state_now()
            if state == "RUNNING":
                return
            bad = self._bad_nodes(list(self._identity.hosts))
            reason = f"node failure: {', '.join(bad)}" if bad else f"SLURM ends this start ({state.lower() or 'gone'})"
            num_idle = idle_so_far(None if self._before is None else self._before.verdict)
            self._leave_verdict = Verdict("leave", reason, 0, time.time(), bad, num_idle, self._samples())
            self._keep(self._start_folder, self._leave_verdict)
            if bad:
                slurm.exclude(self._identity.job_id, bad)
        except PomscaleError as problem:
            self._warn(str(problem))

    def _state_now(self) -> str:
        """Return the state of the job; squeue may print nothing at the moment when a node goes down."""
        for _ in range(3):
            if state := slurm.state_now(self._identity.job_id):
                return state
            time.sleep(0.5)
        return ""

    def _bad_nodes(self, hosts: list[str]) -> list[str]:
        if not self._identity.on_slurm or not slurm.is_available():
            return []
        try:
            return slurm.bad_nodes(hosts)
        except PomscaleError as problem:
            self._warn(str(problem))
            return []

    def conclude(self, own: Ending) -> int:
        """Wait for the other ranks after rank 0 has ended, decide, and record. Return the job's exit code."""
        if self._spec.is_run and own.returncode not in _GOOD_ENDS:
            self._end_all()
        known = self._wait_for_other_ranks(own)
        self._look_at_scheduler()
        if self._leave_verdict is not None:
            return EXIT_STOPPED
        evidence = Evidence(
            self._start,
            self._spec.num_ranks,
            list(known.values()),
            self._outcomes(),
            self._samples(),
        )
        before = None if self._before is None else self._before.verdict
        verdict = decide_verdict(evidence, before, self._spec.max_idle_requeues)
        say(f"{verdict.action}: {verdict.reason}" + (f"; see {verdict.log}" if verdict.log else ""))
        self._keep(self._start_folder, verdict)
        if verdict.action == "fail":
            note_failure(self._job_folder, verdict.reason)
        if verdict.action == "requeue":
            self._ask_for_another_start(verdict)
        elif self._evaluations is not None:
            if self._evaluating is not None:
                self._evaluating.join()
            try:
                self._evaluations.poll(finished=verdict.action == "done")
            except (PomscaleError, OSError) as problem:
                self._warn(str(problem))
        return verdict.exit_code

    def _ask_for_another_start(self, verdict: Verdict) -> None:
        """Leave the request for another start, on hosts that no start of this job has suspected.

        Suspects of earlier jobs are not excluded, as they may have been repaired since.
        """
        job_id = self._identity.job_id
        verdicts = [
            one.verdict for one in self._earlier_starts() if one.record.job_id == job_id and one.verdict is not None
        ]
        suspects = {host for one in [*verdicts, verdict] for host in one.suspects}
        try:
            write_text(self._start_folder / REQUEUE_FILE, ",".join(sorted(suspects)) + "\n")
        except PomscaleError as problem:
            self._warn(f"{problem}; the job is not started again: `pomscale runs resume` does it")

    def _wait_for_other_ranks(self, own: Ending) -> dict[int, Ending]:
        """Wait for the endings of the other ranks.

        The ranks of a run end together, so there is a limit; those of other jobs end when their own work is done.
        """
        settle_s = _SETTLE_S if own.returncode in _GOOD_ENDS else _SETTLE_AFTER_A_BAD_END_S
        deadline_s = time.monotonic() + settle_s
        while True:
            known = {own.rank: own} | {one.rank: one for one in self._endings()}
            if len(known) >= self._spec.num_ranks or (self._spec.is_run and time.monotonic() > deadline_s):
                return known
            self._look_at_scheduler()
            time.sleep(0.5)

    def _endings(self) -> list[Ending]:
        """Return the endings of this start; an older job of the same number may have left some (see begin)."""
        since_unix_s = self._start.started_unix_s - _CLOCK_SKEW_S
        return [one for one in read_endings(self._start_folder) if one.ended_unix_s > since_unix_s]

    def _outcomes(self) -> dict[int, dict[str, Any]]:
        """Return what training has left; if it cannot be read, the last lines of the ranks have to do."""
        if not self._spec.is_run:
            return {}
        try:
            return outcomes_after(self._job_folder, self._start.newest_run_start)
        except (OSError, ValueError) as problem:
            self._warn(f"{self._job_folder / 'outcomes'} cannot be read: {problem}")
            return {}

    def _samples(self) -> int | None:
        if not self._spec.is_run:
            return None
        complete = complete_checkpoints(self._job_folder / CHECKPOINTS_FOLDER)
        return samples_of(complete[-1]) if complete else None
