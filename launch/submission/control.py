"""`pomscale runs cancel | requeue | resume`: end a run, make it start again, submit it again."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from launch.record.job import JobSpec, LaunchedAs, keep, read_starts, read_submissions, sole_launch
from launch.record.moved import is_in_place, recipe_here, spec_here, train_command
from launch.scheduler import slurm
from launch.status.facts import Facts, read_facts
from launch.status.runs import ask_slurm
from launch.status.state import ACTIVE, LIVE, State, state_of
from launch.submission.checks import (
    check_machine,
    check_not_in_queue,
    check_run_folder,
    check_time_limit,
    launched_profile,
)
from launch.submission.job_script import SubmitOptions
from launch.submission.submit import submit
from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import write_text
from pomscale.config.load import dump_recipe, load_train_recipe
from pomscale.runs.checkpoint_folder import complete_checkpoints, samples_of
from pomscale.runs.layout import CHECKPOINTS_FOLDER, JOB_FILE, LAUNCH_FILE

_WAIT_S = 20.0
"""Time for which `cancel` waits until a run has ended. A large run may take longer to save; it is not killed."""
_LOOK_EVERY_S = 0.3


@dataclass(frozen=True)
class Done:
    """Result of `cancel`. done: whether the run has ended, or is about to. text: a line for the user."""

    done: bool
    text: str


def cancel(job_folder: Path, wait_s: float = _WAIT_S) -> Done:
    """End a run and remove it from the queue. It saves first, if the scheduler gives it enough time.

    PomscaleError if SLURM does not do it, or if the run is on a machine that cannot be reached from here.
    """
    facts, state = _look(job_folder)
    if state.word not in LIVE:
        return Done(
            False, f"{job_folder}: not in the queue: {state.word}" + (f" ({state.reason})" if state.reason else "")
        )
    if facts.slurm_job is not None:
        slurm.cancel(facts.slurm_job)
        what = f"job {facts.slurm_job}"
    else:
        _signal(facts, signal.SIGTERM)
        what = "its processes on this machine"
    ended = _wait(lambda: _is_over(job_folder), wait_s)
    if not ended:
        return Done(
            True,
            f"{job_folder}: {what} asked to end, and still saving; `pomscale runs status {job_folder}` shows when it "
            "is over",
        )
    return Done(True, f"{job_folder}: {what} ended; {_saved(job_folder)}")


def requeue(job_folder: Path, *, now: bool = False) -> str:
    """Make a run save and start again; with now, start again at once from its last checkpoint. Return a line.

    InputError for a run that is not running, or that would not be started again.
    """
    facts, state = _look(job_folder)
    if state.word not in ACTIVE:
        because = f" ({state.reason})" if state.reason else ""
        raise InputError(
            f"{job_folder}: {state.word}{because}: only a running job can be requeued; see `pomscale runs resume`"
        )
    if not facts.is_by_hand:
        _check_in_place(job_folder)
    if facts.slurm_job is not None:
        if now:
            slurm.requeue(facts.slurm_job)
            return f"{job_folder}: job {facts.slurm_job} is requeued; {_saved(job_folder)}"
        slurm.send_signal(facts.slurm_job, "USR2")
        return f"{job_folder}: job {facts.slurm_job} was asked to save and start again"
    if facts.is_by_hand:
        raise InputError(
            f"{job_folder}: not started by `pomscale launch`, so nothing would start it again; cancel it instead"
        )
    if now:
        raise InputError(f"{job_folder}: --now is for jobs of SLURM; without it this run saves and starts again")
    _signal(facts, signal.SIGUSR2)
    return f"{job_folder}: its processes on this machine were asked to save and start again"


def resume(job_folder: Path, *, num_nodes: int | None = None, time_limit: str | None = None) -> str:
    """Submit a run again as it was launched. Return the job id.

    It continues in this folder, also if that was moved, or copied from another run. Hosts that the last verdict
    suspects are avoided. InputError for a run that is in the queue, has finished, was never launched, or does not fit
    the number of nodes.

    Args:
        job_folder: Job folder of the run.
        num_nodes: Replaces the number of nodes of the last launch.
        time_limit: Replaces the time limit of the last launch.
    """
    if not (job_folder / LAUNCH_FILE).is_file() or not (job_folder / JOB_FILE).is_file():
        raise InputError(
            f"{job_folder}: not started by `pomscale launch`: type the command again that has started it, or "
            f"`{train_command(job_folder)}`; it goes on"
        )
    with sole_launch(job_folder):
        check_not_in_queue(job_folder)
        return _submit_again(job_folder, num_nodes, time_limit)


def _submit_again(job_folder: Path, num_nodes: int | None, time_limit: str | None) -> str:
    last_spec, launched = JobSpec.read(job_folder / JOB_FILE), LaunchedAs.read(job_folder / LAUNCH_FILE)
    profile = launched_profile(job_folder, launched)
    spec = replace(spec_here(last_spec, job_folder), num_nodes=num_nodes or last_spec.num_nodes, wait_for={})
    launched = replace(launched, num_nodes=spec.num_nodes, time_limit=time_limit or launched.time_limit)
    check_time_limit(profile, launched.time_limit)
    if spec.is_run and launched.recipe is not None:
        recipe = load_train_recipe(job_folder / launched.recipe)
        check_run_folder(job_folder, recipe)
        check_machine(recipe, profile, spec.num_nodes, spec.num_ranks, None)
        if not is_in_place(last_spec, job_folder):
            recipe = recipe_here(recipe, job_folder)
            spec = replace(spec, name=recipe.name)
            write_text(job_folder / launched.recipe, dump_recipe(recipe))
    before = read_submissions(job_folder)
    array = before[-1].num_tasks if before and before[-1].num_tasks > 1 else None
    last = read_starts(job_folder)[-1:]
    suspects = last[0].verdict.suspects if last and last[0].verdict is not None else []
    options = SubmitOptions(launched.time_limit, {}, array, launched.gpus_per_node, suspects)
    try:
        job_id = submit(spec, profile, options)
    except PomscaleError:
        keep(job_folder / JOB_FILE, last_spec)
        raise
    keep(job_folder / LAUNCH_FILE, launched)
    return job_id


def _check_in_place(job_folder: Path) -> None:
    """Raise InputError if the job runs although its folder was moved: it would start where nothing is any more."""
    spec = JobSpec.read(job_folder / JOB_FILE)
    if not is_in_place(spec, job_folder):
        raise InputError(
            f"{job_folder}: was moved from {spec.job_folder} while its job runs, which would start there again; "
            f"`pomscale runs cancel {job_folder}`, then `pomscale runs resume {job_folder}`"
        )


def _look(job_folder: Path) -> tuple[Facts, State]:
    """Return the facts and the state of a run. PomscaleError if it is a job of SLURM and SLURM does not answer."""
    now_unix_s = time.time()
    facts = read_facts(job_folder)
    jobs, problem = ask_slurm([facts], now_unix_s)
    if problem:
        raise PomscaleError(f"{job_folder}: job {facts.slurm_job} is SLURM's, and {problem}")
    return facts, state_of(facts, jobs, now_unix_s)


def _is_over(job_folder: Path) -> bool:
    """Whether a run is over; False if the scheduler, which has received the request, does not answer just now."""
    try:
        return _look(job_folder)[1].word not in LIVE
    except PomscaleError:
        return False


def _signal(facts: Facts, number: signal.Signals) -> None:
    """Send a signal to the processes of a run, unless they have ended. PomscaleError for a run of another user."""
    try:
        for process in _processes(facts):
            process.send_signal(number)
    except psutil.AccessDenied as error:
        raise PomscaleError(f"{facts.job_folder}: runs as another user; ask them: {error}") from error
    except psutil.NoSuchProcess:
        return


def _processes(facts: Facts) -> list[psutil.Process]:
    """Return the processes of this machine that end a run, or start it again, when they receive a signal."""
    submission, claim = facts.submission, facts.claim
    if facts.is_by_hand and claim is not None:
        if not facts.claim_lives or claim.pid is None:
            raise PomscaleError(
                f"{facts.job_folder}: runs on {claim.host}, process {claim.pid}, outside of any job: end it there"
            )
        return [psutil.Process(claim.pid)]
    if submission is None or not facts.local_lives:
        raise PomscaleError(f"{facts.job_folder}: runs on another machine; type the same command there")
    job = psutil.Process(int(submission.job_id))
    # submitit's controller forwards only SIGTERM; other signals end it.
    return [job] if submission.scheduler == "debug" else job.children()


def _wait(is_over: Callable[[], bool], wait_s: float) -> bool:
    deadline_s = time.monotonic() + wait_s
    while not is_over():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


def _saved(job_folder: Path) -> str:
    complete = complete_checkpoints(job_folder / CHECKPOINTS_FOLDER)
    return f"saved: {samples_of(complete[-1]):,} samples" if complete else "nothing was saved yet"
