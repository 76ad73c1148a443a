"""Submission of a job to the scheduler of a cluster profile, through submitit's executors.

slurm   submitit's job script, each task of which runs launch.task.SlurmTask
local   launch.task.LocalTask, in a process that outlives the terminal (launch.background)
debug   launch.task.LocalTask, in this very process
"""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path

from submitit.core.utils import FailedJobError
from submitit.local.debug import DebugExecutor

from launch.record.job import JobSpec, Submission, keep
from launch.scheduler import environment, slurm
from launch.submission.job_script import SubmitOptions, job_script, slurm_executor
from launch.task import LocalTask, SlurmTask
from pomscale.base import installation
from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.cluster import ClusterProfile, expanded
from pomscale.runs.layout import CODE_FOLDER, JOB_FILE, JOBS_FILE, SUBMITIT_FOLDER

# sbatch's messages if the controller has not answered.
_NO_ANSWER = ("contact slurm controller", "socket timed out", "connection failure", "temporarily unavailable")


def submit(spec: JobSpec, profile: ClusterProfile, options: SubmitOptions) -> str:
    """Submit a job. Return the job id: SLURM's (for an array, that of the whole), or the number of its process.

    Writes JOB_FOLDER/job.json, then a line of JOB_FOLDER/jobs.jsonl. On one machine there are no time limits and no
    jobs to wait for but spec.wait_for, the tasks of an array are ranks of one job, and a debug job is over when this
    returns.

    Raises:
        InputError: With sbatch's own message, if it refuses the job.
        PomscaleError: If SLURM does not answer.
    """
    if profile.scheduler == "slurm":
        return _submit_to_slurm(spec, profile, options)
    spec = _on_one_machine(spec, profile, options)
    keep(Path(spec.job_folder) / JOB_FILE, spec)
    return (_run_here if profile.scheduler == "debug" else _start_in_background)(spec, profile, options)


def batch_script(spec: JobSpec, profile: ClusterProfile, options: SubmitOptions) -> str:
    """Return the job script that submit() would pass to sbatch; "" for other schedulers."""
    if profile.scheduler == "slurm":
        environment.warn_of_ignored_options()
        return job_script(spec, profile, options)
    _on_one_machine(spec, profile, options)
    return ""


def _submit_to_slurm(spec: JobSpec, profile: ClusterProfile, options: SubmitOptions) -> str:
    if not slurm.is_available():
        raise PomscaleError("sbatch: there is no SLURM on this machine; launch from a login node of the cluster")
    executor = slurm_executor(spec, profile, options)
    environment.warn_of_ignored_options()
    job_folder = Path(spec.job_folder)
    keep(job_folder / JOB_FILE, spec)
    submitted_unix_s = time.time()
    with _uninterrupted(job_folder):
        with environment.submitting(), _explained_refusal(job_folder, options):
            tasks = [SlurmTask(spec.job_folder)] * (options.array or 1)
            job_id = executor.submit_array(tasks)[0].job_id.partition("_")[0]
        try:
            record_submission(job_folder, Submission(job_id, submitted_unix_s, "slurm", spec.num_nodes, len(tasks)))
        except PomscaleError:  # nobody would know of it
            slurm.cancel(job_id)
            raise
    return job_id


@contextmanager
def _uninterrupted(job_folder: Path) -> Iterator[None]:
    """Hold back Ctrl-C between the submission of a job and its line in jobs.jsonl: without it nobody could cancel it.

    sbatch, which Ctrl-C would reach, too, inherits that the signal is blocked.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked: list[int] = []
    # A thread of a library may receive the signal, so it is noted as well as blocked.
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        print(f"the job was submitted; `pomscale runs cancel {shlex.quote(str(job_folder))}` ends it", file=sys.stderr)
        raise KeyboardInterrupt


@contextmanager
def _explained_refusal(job_folder: Path, options: SubmitOptions) -> Iterator[None]:
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it raises
            yield
    except OSError as error:
        raise PomscaleError(
            f"{job_folder}: the job cannot be written there: {error}; make room and launch again"
        ) from error
    except FailedJobError as error:
        lines = [line.removeprefix("sbatch: error: ").strip() for line in str(error).splitlines()]
        words = "; ".join(filter(None, lines))
        if any(sign in words.lower() for sign in _NO_ANSWER):
            raise PomscaleError(f"SLURM does not answer: {words}; try again when it does") from error
        raise InputError(f"sbatch refuses this job: {words}. {_remedy(words, options)}") from error


def _remedy(words: str, options: SubmitOptions) -> str:
    """Return what to do about sbatch's words."""
    if options.array is not None and "array" in words.lower():
        most = slurm.configuration().get("MaxArraySize", "?")
        return f"--array {options.array}: give at most {most} tasks (MaxArraySize), which share the same work"
    return "Change the cluster profile (account, partition, qos) or --nodes"


def _on_one_machine(spec: JobSpec, profile: ClusterProfile, options: SubmitOptions) -> JobSpec:
    if options.after:
        raise ValueError("after: only SLURM knows such jobs; use spec.wait_for")
    if spec.num_nodes > 1:
        raise InputError(f"--nodes {spec.num_nodes}: a {profile.scheduler} job has one node, this machine")
    return spec if options.array is None else replace(spec, ranks_per_node=options.array)


def _start_in_background(spec: JobSpec, profile: ClusterProfile, options: SubmitOptions) -> str:
    job_folder = Path(spec.job_folder)
    python = sys.executable if profile.python is None else expanded(profile.python, "python")
    num_gpus = profile.gpus_per_node if options.gpus_per_node is None else options.gpus_per_node
    submitted_unix_s = time.time()
    with _uninterrupted(job_folder):
        with environment.submitting():
            started = subprocess.run(
                [sys.executable, "-m", "launch.background", spec.job_folder, str(num_gpus), python],
                env=os.environ | _paths(job_folder, profile),
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                check=False,
            )
        if started.returncode:
            why = started.stderr.strip() or f"see the logs in {job_folder / SUBMITIT_FOLDER}"
            raise PomscaleError(f"{job_folder}: the job could not be started: {why}")
        try:
            record_submission(job_folder, Submission(started.stdout, submitted_unix_s, "local", 1, options.array or 1))
        except PomscaleError:  # nobody would know of it
            os.kill(int(started.stdout), signal.SIGTERM)
            raise
    return started.stdout


def _paths(job_folder: Path, profile: ClusterProfile) -> dict[str, str]:
    """Return the variables that say where a job on this machine finds its code and puts temporary files."""
    code = job_folder / CODE_FOLDER
    root = code if code.is_dir() else installation.root()
    paths = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",
    }
    if profile.local_disk is not None:
        paths["TMPDIR"] = expanded(profile.local_disk, "local_disk")
    return paths


def _run_here(spec: JobSpec, profile: ClusterProfile, options: SubmitOptions) -> str:
    """Run a debug job in this process, whose number is the job id."""
    job_folder, job_id = Path(spec.job_folder), str(os.getpid())
    record_submission(job_folder, Submission(job_id, time.time(), "debug", 1, options.array or 1))
    os.environ.update(_paths(job_folder, profile))
    try:
        # result() would open a debugger on an error.
        error = DebugExecutor(job_folder / SUBMITIT_FOLDER).submit(LocalTask(spec.job_folder)).exception()
    except SystemExit:  # LocalTask ends its process in this way; the exit code is in the verdict
        error = None
    if error is not None:
        raise error
    return job_id


def record_submission(job_folder: Path, submission: Submission) -> None:
    """Append a line to JOB_FOLDER/jobs.jsonl. PomscaleError if it cannot be written."""
    line = json.dumps(replace(submission, job_folder=str(job_folder)).to_dict()) + "\n"
    try:
        with (job_folder / JOBS_FILE).open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(line.encode()) < len(line):  # half a line would spoil the next one
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise PomscaleError(f"{job_folder / JOBS_FILE}: {error}; make room and launch again") from error
