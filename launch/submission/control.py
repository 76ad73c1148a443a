"""`pomscale runs cancel | requeue | resume`: end a run, have it start again, submit it again."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from launch.record.job import JOB_FILE, LAUNCH_FILE, JobSpec, LaunchedAs, attempts, keep, sole_launch, submissions
from launch.scheduler import slurm
from launch.status.facts import Facts, read_facts
from launch.status.runs import ask_slurm
from launch.status.state import ACTIVE, LIVE, State, state_of
from launch.submission.checks import check_machine, check_not_in_queue, check_run_folder, check_time_limit
from launch.submission.job_script import Wish
from launch.submission.submit import submit
from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.cluster import ClusterProfile
from pomscale.config.load import load_train_recipe
from pomscale.runs.checkpoint_folder import complete_checkpoints, samples_of
from pomscale.runs.layout import CHECKPOINTS_FOLDER

_WAIT_S = 20.0
"""How long `cancel` watches a run end. A large one may take longer to save; it is not killed for that."""
_LOOK_EVERY_S = 0.3


@dataclass(frozen=True)
class Done:
    """done: what was asked for has been done, or is under way. text: a line for people."""

    done: bool
    text: str


def cancel(home: Path, wait_s: float = _WAIT_S) -> Done:
    """End a run and take it from the queue. It saves first, as far as the scheduler gives it the time.

    PomscaleError where SLURM does not do it, or the run is on a machine that cannot be reached from here.
    """
    facts, state = _look(home)
    if state.word not in LIVE:
        return Done(False, f"{home}: not in the queue: {state.word}" + (f" ({state.reason})" if state.reason else ""))
    if facts.slurm_job is not None:
        slurm.cancel(facts.slurm_job)
        what = f"job {facts.slurm_job}"
    else:
        _signal(facts, signal.SIGTERM)
        what = "its processes on this machine"
    ended = _wait(lambda: _is_over(home), wait_s)
    if not ended:
        return Done(
            True, f"{home}: {what} told to end, and still saving; `pomscale runs status {home}` shows when it is over"
        )
    return Done(True, f"{home}: {what} ended; {_saved(home)}")


def requeue(home: Path, *, now: bool = False) -> str:
    """Have a run save and start again; now: start again at once, from its last checkpoint. Returns a line for people.

    InputError for a run that is not running, or that nobody would start again.
    """
    facts, state = _look(home)
    if state.word not in ACTIVE:
        because = f" ({state.reason})" if state.reason else ""
        raise InputError(
            f"{home}: {state.word}{because}: only a job that runs can be requeued; see `pomscale runs resume`"
        )
    if facts.slurm_job is not None:
        if now:
            slurm.requeue(facts.slurm_job)
            return f"{home}: job {facts.slurm_job} is requeued; {_saved(home)}"
        slurm.send_signal(facts.slurm_job, "USR2")
        return f"{home}: job {facts.slurm_job} was asked to save and start again"
    if facts.is_by_hand:
        raise InputError(
            f"{home}: not started by `pomscale launch`, so nothing would start it again; cancel it instead"
        )
    if now:
        raise InputError(f"{home}: --now is for jobs of SLURM; without it this run saves and starts again")
    _signal(facts, signal.SIGUSR2)
    return f"{home}: its processes on this machine were asked to save and start again"


def resume(home: Path, *, num_nodes: int | None = None, time_limit: str | None = None) -> str:
    """Submit a run again as it was launched, on another number of nodes or for another time if so wished.

    Hosts that the last verdict has named are avoided. Returns the job id. InputError for a run that is in the queue,
    has finished, was never launched, or does not fit so many nodes.
    """
    if not (home / LAUNCH_FILE).is_file() or not (home / JOB_FILE).is_file():
        raise InputError(
            f"{home}: not started by `pomscale launch`: type the command again that has started it; it goes on"
        )
    with sole_launch(home):
        check_not_in_queue(home)
        return _submit_again(home, num_nodes, time_limit)


def _submit_again(home: Path, num_nodes: int | None, time_limit: str | None) -> str:
    spec, launched = JobSpec.read(home / JOB_FILE), LaunchedAs.read(home / LAUNCH_FILE)
    profile = ClusterProfile.model_validate(launched.profile)
    spec = replace(spec, num_nodes=num_nodes or spec.num_nodes, wait_for={})
    launched = replace(launched, num_nodes=spec.num_nodes, time_limit=time_limit or launched.time_limit)
    check_time_limit(profile, launched.time_limit)
    if spec.is_run and launched.recipe is not None:
        recipe = load_train_recipe(home / launched.recipe)
        check_run_folder(home, recipe)
        check_machine(recipe, profile, spec.num_nodes, spec.num_ranks, None)
    before = submissions(home)
    array = before[-1].num_tasks if before and before[-1].num_tasks > 1 else None
    last = attempts(home)[-1:]
    suspects = last[0].verdict.suspects if last and last[0].verdict is not None else []
    wish = Wish(launched.time_limit, {}, array, launched.gpus_per_node, suspects)
    job_id = submit(spec, profile, wish)
    keep(home / LAUNCH_FILE, launched)
    return job_id


def _look(home: Path) -> tuple[Facts, State]:
    """PomscaleError where the run is SLURM's affair and SLURM does not answer."""
    now_unix_s = time.time()
    facts = read_facts(home)
    jobs, problem = ask_slurm([facts], now_unix_s)
    if problem:
        raise PomscaleError(f"{home}: job {facts.slurm_job} is SLURM's, and {problem}")
    return facts, state_of(facts, jobs, now_unix_s)


def _is_over(home: Path) -> bool:
    """A scheduler that does not answer just now has been told all the same."""
    try:
        return _look(home)[1].word not in LIVE
    except PomscaleError:
        return False


def _signal(facts: Facts, number: signal.Signals) -> None:
    """PomscaleError for a run of somebody else. Who has ended meanwhile needs no signal."""
    try:
        for process in _processes(facts):
            process.send_signal(number)
    except psutil.AccessDenied as error:
        raise PomscaleError(f"{facts.home}: runs as another user; ask them: {error}") from error
    except psutil.NoSuchProcess:
        return


def _processes(facts: Facts) -> list[psutil.Process]:
    """Those that end, or start again, a run of this machine when they get the signal for it."""
    submission, claim = facts.submission, facts.claim
    if facts.is_by_hand and claim is not None:
        if not facts.claim_lives or claim.pid is None:
            raise PomscaleError(
                f"{facts.home}: runs on {claim.host}, process {claim.pid}, outside of any job: end it there"
            )
        return [psutil.Process(claim.pid)]
    if submission is None or not facts.local_lives:
        raise PomscaleError(f"{facts.home}: runs on another machine than this one; type the same command there")
    job = psutil.Process(int(submission.job_id))
    # submitit's controller only hands on SIGTERM, and dies of the others.
    return [job] if submission.scheduler == "debug" else job.children()


def _wait(is_over: Callable[[], bool], wait_s: float) -> bool:
    deadline_s = time.monotonic() + wait_s
    while not is_over():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


def _saved(home: Path) -> str:
    complete = complete_checkpoints(home / CHECKPOINTS_FOLDER)
    return f"saved: {samples_of(complete[-1]):,} samples" if complete else "nothing was saved yet"
