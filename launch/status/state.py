"""Facts of a home, and what SLURM says of its job -> one word. No files, no SLURM, no clock of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from launch.record.job import SUBMITIT, Attempt, Verdict
from launch.scheduler.slurm import JobState
from launch.status.facts import Facts, job_of
from pomscale.base.console import format_duration

Word = Literal[
    "queued", "starting", "running", "stopping", "requeued", "stopped", "finished", "failed", "cancelled", "timeout",
    "killed", "unknown",
]  # fmt: skip
"""requeued: what there is is saved, and it waits for machines again. stopped: saved, and nothing starts it again by
itself. killed: it ended without a word. unknown: nothing tells, e.g. of a machine that cannot be seen from here."""

WORDS: tuple[Word, ...] = get_args(Word)
ACTIVE: tuple[Word, ...] = ("starting", "running", "stopping")
"""Its processes are there."""
LIVE: tuple[Word, ...] = ("queued", *ACTIVE, "requeued")
"""Something will still happen, without anybody doing anything."""

# A row is late after so many times what lies between two at most (a validation's comes seconds after that of the steps
# before it), but not before a save can be over.
_LATE_ROWS, _LATE_S = 10.0, 900.0

_OF_VERDICT: Mapping[str, Word] = {"done": "finished", "fail": "failed", "requeue": "requeued", "leave": "stopped"}
_OF_OUTCOME: Mapping[str, Word] = {"finished": "finished", "stopped": "stopped", "quit": "stopped"}
_PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "SIGNALING", "STAGE_OUT", "RESIZING", "SUSPENDED", "STOPPED"}
_OF_SLURM: Mapping[str, Word] = {
    "FAILED": "failed",
    "OUT_OF_MEMORY": "failed",
    "DEADLINE": "failed",
    "CANCELLED": "cancelled",
    "TIMEOUT": "timeout",
    "NODE_FAIL": "killed",
    "BOOT_FAIL": "killed",
    "PREEMPTED": "killed",
    "REVOKED": "killed",
}
# Of an array, whose tasks may be in any: the first of these that one of them is in.
_FOREMOST: tuple[Word, ...] = (
    "running", "starting", "stopping", "requeued", "queued", "failed", "killed", "timeout", "cancelled", "unknown",
    "stopped", "finished",
)  # fmt: skip


@dataclass(frozen=True)
class State:
    """reason: why, in one line; log: where to read on. Both may be empty."""

    word: Word
    reason: str = ""
    log: str = ""


def state_of(facts: Facts, jobs: Mapping[str, JobState] | None, now_unix_s: float) -> State:
    """jobs: what SLURM knows of facts.slurm_job, tasks of an array one by one; None if it was not asked."""
    by_home = state_by_home(facts, now_unix_s)
    job_id = facts.slurm_job
    if jobs is None or job_id is None or is_settled(facts, by_home):
        return by_home
    known = {task: job for task, job in jobs.items() if job_of(task) == job_id}
    if not known:
        return _forgotten(facts, by_home, job_id)
    attempts = {} if facts.is_waiting else {attempt.start.job_id: attempt for attempt in facts.attempts}
    if len(known) == 1 and (facts.submission is None or facts.submission.num_tasks == 1):
        task, job = next(iter(known.items()))
        return _with_slurm(by_home, job, attempts.get(task))
    tasks = sorted(known.keys() | attempts.keys())
    return _of_all([_of_task_of_slurm(known.get(task), attempts.get(task)) for task in tasks])


def is_settled(facts: Facts, by_home: State) -> bool:
    """Whether the home itself says how it ended, so that no scheduler need be asked."""
    told = facts.attempt is not None and facts.attempt.verdict is not None
    return by_home.word == "finished" or (by_home.word == "failed" and told)


def state_by_home(facts: Facts, now_unix_s: float) -> State:
    """Where there is no SLURM, or it does not answer. What then waits in a queue is taken to wait still."""
    outcome, attempt, submission = facts.current_outcome, facts.attempt, facts.submission
    if facts.is_waiting:
        nothing = f"its process is gone and has left nothing; see {facts.home / SUBMITIT}"
        return State("killed", nothing) if facts.local_lives is False else State("queued")
    if outcome is not None and outcome["state"] == "finished":
        return State("finished")
    if attempt is None or facts.is_by_hand:
        return _of_claim(facts, now_unix_s)
    if submission is not None and submission.num_tasks > 1 and submission.scheduler == "slurm":
        to_come = submission.num_tasks - len(facts.attempts)
        return _of_all([*map(_of_task, facts.attempts), *[State("queued")] * max(0, to_come)])
    return _of_attempt(facts, attempt, now_unix_s)


def _of_attempt(facts: Facts, attempt: Attempt, now_unix_s: float) -> State:
    if attempt.verdict is not None:
        return _of_verdict(attempt.verdict, ended=facts.local_lives is False)
    if facts.claim is not None and facts.claim.number > attempt.start.newest_generation:
        return _of_claim(facts, now_unix_s)
    if facts.local_lives is False:
        return _gone("its job is gone", facts)
    return State("starting" if facts.is_run else "running")


def _of_verdict(verdict: Verdict, *, ended: bool) -> State:
    """ended: nobody is left who would start it again."""
    word = "stopped" if ended and verdict.action == "requeue" else _OF_VERDICT[verdict.action]
    reason = "" if word == "finished" and verdict.exit_code == 0 else verdict.reason
    return State(word, reason, verdict.log)


def _of_task(attempt: Attempt | None) -> State:
    """One of an array: only its guard tells."""
    if attempt is None:
        return State("queued")
    return State("running") if attempt.verdict is None else _of_verdict(attempt.verdict, ended=False)


def _of_task_of_slurm(job: JobState | None, attempt: Attempt | None) -> State:
    """job: None for a task that has ended and that SLURM has forgotten, while others still run."""
    if job is not None:
        return _with_slurm(_of_task(attempt), job, attempt)
    if attempt is not None and attempt.verdict is not None:
        return _of_verdict(attempt.verdict, ended=True)
    return State("killed", "a task is not in the queue any more, and has not said how it ended")


def _of_claim(facts: Facts, now_unix_s: float) -> State:
    """By what training itself has left."""
    outcome = facts.current_outcome
    guarded = not facts.is_by_hand and facts.attempt is not None and facts.local_lives is not False
    if outcome is not None:
        # A supervisor is about to decide what comes of it.
        return State("stopping", outcome.get("reason", "")) if guarded else _of_outcome(outcome)
    if facts.claim_lives is None:
        return _by_signs_of_life(facts, now_unix_s)
    if facts.claim_lives:
        return State(_word_of_life(facts))
    return State("stopping") if guarded and facts.local_lives else _gone("its process is gone", facts)


def _of_outcome(outcome: Mapping[str, Any]) -> State:
    return State(_OF_OUTCOME.get(outcome["state"], "failed"), outcome.get("reason", ""))


def _word_of_life(facts: Facts) -> Word:
    if facts.stop_requested:
        return "stopping"
    return "running" if facts.has_logged else "starting"


def _by_signs_of_life(facts: Facts, now_unix_s: float) -> State:
    """Of a process that cannot be seen from here."""
    claim = facts.claim
    signs = [row["time_unix_s"] for row in facts.rows] + ([claim.unix_s] if claim is not None else [])
    if not signs:
        return State("unknown", "it has never begun, as far as its folder tells")
    silent_s = now_unix_s - max(signs)
    if silent_s < _late_after_s(facts):
        return State(_word_of_life(facts))
    where = f" on {claim.host}" if claim is not None and claim.host else ""
    return State("unknown", f"no sign of life{where} for {format_duration(silent_s)}, and no word of its end")


def _late_after_s(facts: Facts) -> float:
    times = [row["time_unix_s"] for row in facts.rows]
    return max(_LATE_S, _LATE_ROWS * max((later - earlier for earlier, later in pairwise(times)), default=0.0))


def _gone(what: str, facts: Facts) -> State:
    claim = facts.claim
    who = f" ({claim.host}, process {claim.pid})" if claim is not None and claim.pid else ""
    return State("killed", f"{what}{who} and has left no word")


def _forgotten(facts: Facts, by_home: State, job_id: str) -> State:
    """SLURM does not know the job any more."""
    if by_home.word not in LIVE:
        return by_home
    if facts.is_waiting:
        return State("unknown", f"job {job_id} is not in the queue any more, and never began; was it cancelled?")
    outcome, attempt = facts.current_outcome, facts.attempt
    if not facts.is_by_hand and attempt is not None and attempt.verdict is not None:
        return State("stopped", attempt.verdict.reason, attempt.verdict.log)
    if outcome is not None:
        return _of_outcome(outcome)
    return _gone(f"job {job_id} is not in the queue any more", facts)


def _with_slurm(by_home: State, job: JobState, attempt: Attempt | None) -> State:
    """What SLURM says of a job that it knows counts; why it ended, the home knows better."""
    if job.state in _PENDING:
        return _while_pending(job, attempt)
    if job.state in _RUNNING:
        return _while_running(by_home, job, attempt)
    if job.state == "COMPLETING":
        return by_home if by_home.word in ("finished", "failed") else replace(by_home, word="stopping")
    return _after_the_end(by_home, job, attempt)


def _while_pending(job: JobState, attempt: Attempt | None) -> State:
    waits = f"waits: {job.reason}" if job.reason not in ("", "None") else ""
    if attempt is None:
        return State("queued", waits)
    why = attempt.verdict.reason if attempt.verdict is not None else ""
    return State("requeued", "; ".join(filter(None, [why, waits])))


def _while_running(by_home: State, job: JobState, attempt: Attempt | None) -> State:
    if by_home.word in ("starting", "running", "stopping"):
        return by_home
    if by_home.word == "unknown":
        return State("running")
    begins = attempt is None or (job.num_restarts or 0) > attempt.start.restart
    return State("starting") if begins else replace(by_home, word="stopping")


def _after_the_end(by_home: State, job: JobState, attempt: Attempt | None) -> State:
    if by_home.word in ("finished", "failed"):
        return by_home
    if job.state == "COMPLETED":  # with exit code 0
        return replace(by_home, word="stopped") if by_home.word in LIVE else by_home
    word = _OF_SLURM.get(job.state, "unknown")
    verdict = attempt.verdict if attempt is not None else None
    if verdict is not None:
        return State(word, verdict.reason, verdict.log)
    return State(word, "" if word == "cancelled" else f"SLURM says {job.state}; nothing else tells")


def _of_all(tasks: Sequence[State]) -> State:
    """The state of an array. reason: how many of its tasks are in which, and the first that failed."""
    counts = Counter(task.word for task in tasks)
    foremost = next(word for word in _FOREMOST if counts[word])
    if len(counts) == 1 and foremost in ("finished", "queued", "cancelled"):
        return State(foremost)
    told = ", ".join(f"{counts[word]} {word}" for word in _FOREMOST if counts[word])
    failed = next((task for task in tasks if task.word in ("failed", "killed", "timeout")), State("unknown"))
    return State(foremost, f"tasks: {told}" + (f"; {failed.reason}" if failed.reason else ""), failed.log)
