"""The supervisor of a job: outside of the training processes, in the guard of rank 0.

It sees how ranks end, reads what they have left in the run folder, decides (verdict.py), and leaves its verdict. What
is to be done about it is done outside of the job's own processes: by the job script, which is no part of a container
and outlives srun (slurm/requeue.sh), or by launch.task on one machine.
"""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from launch.node.evaluations import Evaluations, note_failure
from launch.node.forwarding import Forwarding
from launch.node.process import Place
from launch.node.verdict import EXIT_STOPPED, Evidence, idle_so_far, judge
from launch.record.job import END_FILE, REQUEUE_FILE, Attempt, Ending, JobSpec, Start, Verdict, attempts, endings, keep
from launch.scheduler import slurm
from pomscale.base.console import say, warn
from pomscale.base.errors import PomscaleError
from pomscale.base.files import write_text
from pomscale.runs.checkpoint_folder import complete_checkpoints, samples_of
from pomscale.runs.layout import CHECKPOINTS_FOLDER
from pomscale.runs.outcome import outcomes_after
from pomscale.runs.starts import newest_start

LAST_WORDS_S = 10.0
"""For a rank that is to end because another one has; then it is killed, for it may wait for that one for good."""
ENDED_BY_SUPERVISOR = "the supervisor"

# How long the guards of the others may take to say how theirs has ended: a shared file system shows new files late.
_SETTLE_S = 40.0
# After a bad end, whoever is silent is suspected: NFS may take a minute to show the others the file `end`, and another
# one to show here what they have answered.
_SETTLE_AFTER_A_BAD_END_S = 140.0
_LOOK_EVERY_S, _EVALUATE_EVERY_S = 1.0, 5.0
_CLOCK_SKEW_S = 60.0
_GOOD_ENDS = (0, EXIT_STOPPED)


class Supervisor:
    def __init__(self, spec: JobSpec, place: Place, attempt: Path, forwarding: Forwarding) -> None:
        self._spec = spec
        self._place = place
        self._attempt = attempt
        self._forwarding = forwarding
        self._home = Path(spec.home)
        self._before: Attempt | None = None
        self._looked_s = self._evaluated_s = 0.0
        self._first_bad_s: float | None = None
        self._warned = ""
        self._left: Verdict | None = None
        self._evaluations: Evaluations | None = None
        self._evaluating: threading.Thread | None = None

    def begin(self) -> str | None:
        """Record this start. Returns why the job was started again; None if it was not."""
        earlier = self._attempts()
        if earlier:
            self._before = self._with_verdict(earlier)
        start = Start(
            self._place.job_id,
            self._place.restart,
            list(self._place.hosts),
            self._spec.ranks_per_node,
            time.time(),
            newest_start(self._home),
        )
        for name in ("verdict.json", REQUEUE_FILE, END_FILE):  # of a SLURM that was set up anew and counts from 1 again
            (self._attempt / name).unlink(missing_ok=True)
        keep(self._attempt / "start.json", start)
        self._start = start
        self._check_progress()
        if self._spec.evaluations:
            try:
                self._evaluations = Evaluations(self._home)
            except (PomscaleError, OSError) as problem:
                self._warn(f"{problem}; no checkpoint is evaluated during this start")
        return None if self._before is None or self._before.verdict is None else self._before.verdict.reason

    def _check_progress(self) -> None:
        """What takes the node of rank 0 with it each time is started again by SLURM, and by nobody else, for ever."""
        before = None if self._before is None else self._before.verdict
        if before is None or before.action != "leave" or before.num_idle <= self._spec.max_idle_requeues:
            return
        reason = f"{before.num_idle} starts in a row made no progress; the last one: {before.reason}"
        self._keep(self._attempt, Verdict("fail", reason, 1, time.time(), samples=before.samples))
        raise PomscaleError(f"{self._home}: {reason}; `pomscale runs resume` tries once more")

    def _attempts(self) -> list[Attempt]:
        """Starts so far. Tasks of an array work side by side: for each of them only its own count."""
        found, job_id = attempts(self._home), self._place.job_id
        return [one for one in found if one.start.job_id == job_id] if "_" in job_id else found

    def _with_verdict(self, earlier: list[Attempt]) -> Attempt:
        """The last one. If its supervisor has died with its node, or was killed by the scheduler, it has left none."""
        before = earlier[-1]
        if before.verdict is not None:
            return before
        last = next((one.verdict for one in reversed(earlier) if one.verdict is not None), None)
        samples = self._samples()
        num_idle = idle_so_far(last)
        if self._spec.is_run:  # only a run has checkpoints to go by
            went_on = (samples or 0) > ((last.samples if last is not None else None) or 0)
            num_idle = 0 if went_on else num_idle + 1
        bad = self._bad_nodes(before.start.hosts)
        reason = f"node failure: {', '.join(bad)}" if bad else "ended by the scheduler, or with the node of rank 0"
        verdict = Verdict("leave", reason, 0, time.time(), bad, num_idle, samples)
        self._keep(before.folder, verdict)
        return Attempt(before.folder, before.start, verdict)

    def poll(self, child: subprocess.Popen[bytes]) -> None:
        """While the process of rank 0 runs; costs nothing most of the time."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now_s
        try:
            self._look_at_the_others(child, now_s)
            self._look_at_the_scheduler()
            is_due = now_s - self._evaluated_s > _EVALUATE_EVERY_S
            # Not in the last minutes of a start, which are for its verdict: a scheduler may take long to answer.
            if self._evaluations is not None and is_due and self._forwarding.first is None:
                self._evaluated_s = now_s
                self._evaluate(self._evaluations)
        except (PomscaleError, OSError) as problem:  # a file system that stutters must not end the run
            self._warn(str(problem))

    def _evaluate(self, evaluations: Evaluations) -> None:
        """In a thread: a scheduler that is slow to answer must not keep a lost rank from being noticed."""
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
        """Once, of the same again and again."""
        if problem != self._warned:
            warn(problem)
        self._warned = problem

    def _keep(self, attempt: Path, verdict: Verdict) -> None:
        """On a full disk the output of this guard is all that tells it."""
        try:
            keep(attempt / "verdict.json", verdict)
        except PomscaleError as problem:
            self._warn(str(problem))

    def _look_at_the_others(self, child: subprocess.Popen[bytes], now_s: float) -> None:
        """A run cannot go on without one of its ranks. With NCCL the others would wait for it until the watchdog."""
        if not self._spec.is_run:
            return
        if self._first_bad_s is None and any(one.returncode not in _GOOD_ENDS for one in self._endings()):
            self._first_bad_s = now_s
            self._end_all()
        if self._first_bad_s is not None and now_s - self._first_bad_s > LAST_WORDS_S:
            self._forwarding.first = self._forwarding.first or ENDED_BY_SUPERVISOR
            child.kill()

    def _end_all(self) -> None:
        """Who answers is alive: what is silent then has gone with its node."""
        try:
            (self._attempt / END_FILE).touch()
        except OSError as problem:
            self._warn(f"{problem}; the other ranks are not told to end")

    def _look_at_the_scheduler(self) -> None:
        """Told to end: by whom? Where SLURM is ending the job itself, seconds are left to say which nodes are bad."""
        if self._left is not None or self._forwarding.first != "SIGTERM" or not self._place.on_slurm:
            return
        if not slurm.is_available():  # in a container: the job script decides
            return
        try:
            state = self._state_now()
            if state == "RUNNING":
                return
            bad = self._bad_nodes(list(self._place.hosts))
            reason = f"node failure: {', '.join(bad)}" if bad else f"SLURM ends this start ({state.lower() or 'gone'})"
            num_idle = idle_so_far(None if self._before is None else self._before.verdict)
            self._left = Verdict("leave", reason, 0, time.time(), bad, num_idle, self._samples())
            self._keep(self._attempt, self._left)
            if bad:
                slurm.exclude(self._place.job_id, bad)
        except PomscaleError as problem:
            self._warn(str(problem))

    def _state_now(self) -> str:
        """squeue may say nothing in the moment in which a node goes down."""
        for _ in range(3):
            if state := slurm.state_now(self._place.job_id):
                return state
            time.sleep(0.5)
        return ""

    def _bad_nodes(self, hosts: list[str]) -> list[str]:
        if not self._place.on_slurm or not slurm.is_available():
            return []
        try:
            return slurm.bad_nodes(hosts)
        except PomscaleError as problem:
            self._warn(str(problem))
            return []

    def conclude(self, own: Ending) -> int:
        """After the process of rank 0 has ended: wait for the others, decide, record. Returns the job's exit code."""
        if self._spec.is_run and own.returncode not in _GOOD_ENDS:
            self._end_all()
        known = self._wait_for_the_others(own)
        self._look_at_the_scheduler()
        if self._left is not None:
            return EXIT_STOPPED
        evidence = Evidence(
            self._start,
            self._spec.num_ranks,
            list(known.values()),
            self._outcomes(),
            self._samples(),
        )
        before = None if self._before is None else self._before.verdict
        verdict = judge(evidence, before, self._spec.max_idle_requeues)
        say(f"{verdict.action}: {verdict.reason}" + (f"; see {verdict.log}" if verdict.log else ""))
        self._keep(self._attempt, verdict)
        if verdict.action == "fail":
            note_failure(self._home, verdict.reason)
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
        """Without what this job has suspected so far. What others met here before may have been mended since."""
        job_id = self._place.job_id
        verdicts = [one.verdict for one in self._attempts() if one.start.job_id == job_id and one.verdict is not None]
        suspects = {host for one in [*verdicts, verdict] for host in one.suspects}
        try:
            write_text(self._attempt / REQUEUE_FILE, ",".join(sorted(suspects)) + "\n")
        except PomscaleError as problem:
            self._warn(f"{problem}; the job is not started again: `pomscale runs resume` does it")

    def _wait_for_the_others(self, own: Ending) -> dict[int, Ending]:
        """A run's ranks end together, or not at all; those of other jobs have each their own work."""
        settle_s = _SETTLE_S if own.returncode in _GOOD_ENDS else _SETTLE_AFTER_A_BAD_END_S
        deadline_s = time.monotonic() + settle_s
        while True:
            known = {own.rank: own} | {one.rank: one for one in self._endings()}
            if len(known) >= self._spec.num_ranks or (self._spec.is_run and time.monotonic() > deadline_s):
                return known
            self._look_at_the_scheduler()
            time.sleep(0.5)

    def _endings(self) -> list[Ending]:
        """Of this start: a SLURM that was set up anew counts its jobs from 1 again."""
        since_unix_s = self._start.started_unix_s - _CLOCK_SKEW_S
        return [one for one in endings(self._attempt) if one.ended_unix_s > since_unix_s]

    def _outcomes(self) -> dict[int, dict[str, Any]]:
        """Without them, the last lines of the ranks still tell."""
        if not self._spec.is_run:
            return {}
        try:
            return outcomes_after(self._home, self._start.newest_generation)
        except (OSError, ValueError) as problem:
            self._warn(f"{self._home / 'outcomes'} cannot be read: {problem}")
            return {}

    def _samples(self) -> int | None:
        if not self._spec.is_run:
            return None
        complete = complete_checkpoints(self._home / CHECKPOINTS_FOLDER)
        return samples_of(complete[-1]) if complete else None
