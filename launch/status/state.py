"""State of a run in one word, from the facts of its job folder and SLURM's state of its job.

These are functions of the facts: no SLURM, no clock, and no files but what a job without a record has printed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from launch.record.job import JobStart, Verdict
from launch.scheduler.slurm import JobState
from launch.status.facts import Facts, job_of
from pomscale.base.console import format_duration
from pomscale.runs.layout import SUBMITIT_FOLDER

Word = Literal[
    "queued", "starting", "running", "stopping", "requeued", "stopped", "finished", "failed", "cancelled", "timeout",
    "killed", "unknown",
]  # fmt: skip
"""requeued: saved, and waiting for machines again. stopped: saved, and nothing starts it again automatically. killed:
ended without a record. unknown: there is no sign of it, e.g. on a machine that cannot be seen from here."""

WORDS: tuple[Word, ...] = get_args(Word)
ACTIVE: tuple[Word, ...] = ("starting", "running", "stopping")
"""States in which processes are running."""
LIVE: tuple[Word, ...] = ("queued", *ACTIVE, "requeued")
"""States in which the run continues without any action of the user."""

# A row of metrics is late after this multiple of the longest time between two rows (the shortest is no measure, as the
# row of a validation comes seconds after another), but not before a save can be over.
_LATE_ROWS, _LATE_S = 10.0, 900.0

_WORD_OF_ACTION: Mapping[str, Word] = {"done": "finished", "fail": "failed", "requeue": "requeued", "leave": "stopped"}
_WORD_OF_OUTCOME: Mapping[str, Word] = {"finished": "finished", "stopped": "stopped", "quit": "stopped"}
_PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_WORD_OF_SLURM: Mapping[str, Word] = {
    "COMPLETED": "stopped",
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
# The state of an array is the first of these that one of its tasks is in.
_FOREMOST: tuple[Word, ...] = (
    "running", "starting", "stopping", "requeued", "queued", "failed", "killed", "timeout", "cancelled", "unknown",
    "stopped", "finished",
)  # fmt: skip
# States of a task that the user has to do something about, the worst first.
_WRONG: tuple[Word, ...] = ("failed", "killed", "timeout", "stopped")


@dataclass(frozen=True)
class State:
    """State of a run. reason: one line, may be empty. log: path of the log with details, may be empty."""

    word: Word
    reason: str = ""
    log: str = ""


def state_of(facts: Facts, jobs: Mapping[str, JobState] | None, now_unix_s: float) -> State:
    """Return the state of a run. jobs: SLURM's states of facts.slurm_job, by task for an array; None if not asked."""
    by_folder = state_by_folder(facts, now_unix_s)
    job_id = facts.slurm_job
    if jobs is None or job_id is None or is_settled(facts, by_folder):
        return by_folder
    known = {task: job for task, job in jobs.items() if job_of(task) == job_id}
    if not known:
        return _forgotten(facts, by_folder, job_id)
    starts = {} if facts.is_waiting else {start.record.job_id: start for start in facts.starts}
    if len(known) == 1 and (facts.submission is None or facts.submission.num_tasks == 1):
        task, job = next(iter(known.items()))
        return _with_slurm(facts, by_folder, job, starts.get(task))
    tasks = sorted(known.keys() | starts.keys())
    return _array_state([_slurm_task_state(facts, known.get(task), starts.get(task)) for task in tasks])


def is_settled(facts: Facts, by_folder: State) -> bool:
    """Whether the job folder itself shows how the run ended, so that no scheduler need be asked."""
    has_verdict = facts.start is not None and facts.start.verdict is not None
    return by_folder.word == "finished" or (by_folder.word == "failed" and has_verdict)


def state_by_folder(facts: Facts, now_unix_s: float) -> State:
    """Return the state without asking SLURM. A job that waited in the queue is assumed to be waiting still."""
    state = _recorded_state(facts, now_unix_s)
    if facts.original is not None and state.word in (*LIVE, "killed", "unknown"):
        return State("stopped", f"a copy of {facts.original}, to which its last job and processes belong")
    return state


def _recorded_state(facts: Facts, now_unix_s: float) -> State:
    outcome, start, submission = facts.current_outcome, facts.start, facts.submission
    if facts.is_waiting and submission is not None:
        reason = f"its process is gone and has left nothing; see {facts.job_folder / SUBMITIT_FOLDER}"
        is_gone = facts.local_lives is False
        return _in_its_words("killed", reason, facts, submission.job_id, None) if is_gone else State("queued")
    if outcome is not None and outcome["state"] == "finished":
        return State("finished")
    if start is None or facts.is_by_hand:
        return _claim_state(facts, now_unix_s)
    if submission is not None and submission.num_tasks > 1 and submission.scheduler == "slurm":
        to_come = submission.num_tasks - len(facts.starts)
        return _array_state([*map(_task_state, facts.starts), *[State("queued")] * max(0, to_come)])
    return _start_state(facts, start, now_unix_s)


def _start_state(facts: Facts, start: JobStart, now_unix_s: float) -> State:
    if start.verdict is not None:
        return _verdict_state(start.verdict, ended=facts.local_lives is False)
    if facts.claim is not None and facts.claim.number > start.record.newest_run_start:
        return _claim_state(facts, now_unix_s)
    if facts.local_lives is False:
        return _gone("its job is gone", facts)
    return State("starting" if facts.is_run else "running")


def _verdict_state(verdict: Verdict, *, ended: bool) -> State:
    """Return the state by a verdict. ended: whether no process is left that would start the job again."""
    word = "stopped" if ended and verdict.action == "requeue" else _WORD_OF_ACTION[verdict.action]
    reason = "" if word == "finished" and verdict.exit_code == 0 else verdict.reason
    return State(word, reason, verdict.log)


def _task_state(start: JobStart | None) -> State:
    """Return the state of a task of an array, for which the verdict of its guard is the only source."""
    if start is None:
        return State("queued")
    return State("running") if start.verdict is None else _verdict_state(start.verdict, ended=False)


def _slurm_task_state(facts: Facts, job: JobState | None, start: JobStart | None) -> State:
    """Return the state of a task of an array. job: None if SLURM has forgotten the task, while others still run."""
    if job is not None:
        return _with_slurm(facts, _task_state(start), job, start)
    if start is not None and start.verdict is not None:
        return _verdict_state(start.verdict, ended=True)
    gone = "a task is not in the queue any more, and has left no record of its end"
    return State("killed", gone) if start is None else _in_its_words("killed", gone, facts, start.record.job_id, start)


def _in_its_words(word: Word, reason: str, facts: Facts, task: str, start: JobStart | None) -> State:
    """Return the state of a job that has left no record of its end: what it has printed last must do."""
    words = facts.last_words(start, task)
    return State(word, reason) if words is None else State(word, f"{reason}; it has printed: {words.line}", words.log)


def _claim_state(facts: Facts, now_unix_s: float) -> State:
    """Return the state by what training itself has left."""
    outcome = facts.current_outcome
    guarded = not facts.is_by_hand and facts.start is not None and facts.local_lives is not False
    if outcome is not None:
        # A supervisor is about to decide what happens next.
        return State("stopping", outcome.get("reason", "")) if guarded else _outcome_state(outcome)
    if facts.claim_lives is None:
        return _state_by_signs_of_life(facts, now_unix_s)
    if facts.claim_lives:
        return State(_word_of_life(facts))
    return State("stopping") if guarded and facts.local_lives else _gone("its process is gone", facts)


def _outcome_state(outcome: Mapping[str, Any]) -> State:
    return State(_WORD_OF_OUTCOME.get(outcome["state"], "failed"), outcome.get("reason", ""))


def _word_of_life(facts: Facts) -> Word:
    if facts.stop_requested:
        return "stopping"
    return "running" if facts.has_logged else "starting"


def _state_by_signs_of_life(facts: Facts, now_unix_s: float) -> State:
    """Return the state of a process that cannot be seen from here."""
    claim = facts.claim
    signs = [row["time_unix_s"] for row in facts.rows] + ([claim.unix_s] if claim is not None else [])
    if not signs:
        return State("unknown", "its folder shows no sign of a start")
    silent_s = now_unix_s - max(signs)
    if silent_s < _late_after_s(facts):
        return State(_word_of_life(facts))
    where = f" on {claim.host}" if claim is not None and claim.host else ""
    return State("unknown", f"no sign of life{where} for {format_duration(silent_s)}, and no record of its end")


def _late_after_s(facts: Facts) -> float:
    times = [row["time_unix_s"] for row in facts.rows]
    return max(_LATE_S, _LATE_ROWS * max((later - earlier for earlier, later in pairwise(times)), default=0.0))


def _gone(what: str, facts: Facts) -> State:
    claim = facts.claim
    who = f" ({claim.host}, process {claim.pid})" if claim is not None and claim.pid else ""
    return State("killed", f"{what}{who} and has left no record of its end")


def _forgotten(facts: Facts, by_folder: State, job_id: str) -> State:
    """Return the state of a run whose job SLURM does not know any more."""
    if by_folder.word not in LIVE:
        return by_folder
    if facts.is_waiting:
        reason = f"job {job_id} is not in the queue any more, and never began"
        told = _in_its_words("killed", reason, facts, job_id, None)
        return told if told.log else State("unknown", f"{reason}; was it cancelled?")
    outcome, start = facts.current_outcome, facts.start
    if not facts.is_by_hand and start is not None and start.verdict is not None:
        return _not_started_again(start.verdict, start.refusal)
    if outcome is not None:
        return _outcome_state(outcome)
    gone = _gone(f"job {job_id} is not in the queue any more", facts)
    return _in_its_words(gone.word, gone.reason, facts, job_id, start)


def _with_slurm(facts: Facts, by_folder: State, job: JobState, start: JobStart | None) -> State:
    """Return the state of a run whose job SLURM knows. The reason comes from the job folder if it has one."""
    if job.state in _PENDING:
        return _while_pending(job, start)
    if job.state == "COMPLETING":
        return by_folder if by_folder.word in ("finished", "failed") else replace(by_folder, word="stopping")
    if job.state in _WORD_OF_SLURM:
        return _after_the_end(facts, by_folder, job, start)
    # Running, or in a state of another version of SLURM: a job that may be alive must not be submitted again.
    return _while_running(by_folder, job, start)


def _while_pending(job: JobState, start: JobStart | None) -> State:
    waits = f"waits: {job.reason}" if job.reason not in ("", "None") else ""
    if start is None:
        return State("queued", waits)
    why = start.verdict.reason if start.verdict is not None else ""
    return State("requeued", "; ".join(filter(None, [why, waits])))


def _while_running(by_folder: State, job: JobState, start: JobStart | None) -> State:
    if by_folder.word in ("starting", "running", "stopping"):
        return by_folder
    if by_folder.word == "unknown":
        return State("running")
    begins = start is None or (job.num_restarts or 0) > start.record.restart
    return State("starting") if begins else replace(by_folder, word="stopping")


def _after_the_end(facts: Facts, by_folder: State, job: JobState, start: JobStart | None) -> State:
    if by_folder.word in ("finished", "failed"):
        return by_folder
    if job.state == "COMPLETED":  # with exit code 0
        return replace(by_folder, word="stopped") if by_folder.word in LIVE else by_folder
    word = _WORD_OF_SLURM[job.state]
    if start is not None and start.verdict is not None:
        verdict = start.verdict
        if word == "failed" and verdict.action == "requeue":  # a job that stops to start again ends with code 75
            return _not_started_again(verdict, start.refusal or f"its job is {job.state}")
        return State(word, verdict.reason, verdict.log)
    if word == "cancelled":
        return State(word)
    told = _in_its_words(word, f"SLURM says {job.state}", facts, job.job_id, start)
    return told if told.log else State(word, f"{told.reason}; there is no other record")


def _not_started_again(verdict: Verdict, refusal: str) -> State:
    """Return the state of a run that has stopped, and that its scheduler does not start again although it should."""
    if verdict.action != "requeue" or not refusal:
        return State("stopped", verdict.reason, verdict.log)
    reason = f"{verdict.reason}; SLURM does not start it again ({refusal}): `pomscale runs resume` does"
    return State("stopped", reason, verdict.log)


def _array_state(tasks: Sequence[State]) -> State:
    """Return the state of an array. The reason counts its tasks by state, and has that of the first that went wrong."""
    counts = Counter(task.word for task in tasks)
    foremost = next(word for word in _FOREMOST if counts[word])
    if len(counts) == 1 and foremost in ("finished", "queued", "cancelled"):
        return State(foremost)
    by_word = ", ".join(f"{counts[word]} {word}" for word in _FOREMOST if counts[word])
    wrong = next((task for word in _WRONG for task in tasks if task.word == word), State("unknown"))
    return State(foremost, f"tasks: {by_word}" + (f"; {wrong.reason}" if wrong.reason else ""), wrong.log)
