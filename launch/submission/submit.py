"""A job and a cluster profile -> the scheduler, through submitit's executors.

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
from dataclasses import asdict, replace
from pathlib import Path

from submitit.core.utils import FailedJobError
from submitit.local.debug import DebugExecutor

from launch.node.process import LOCAL_JOB
from launch.record.job import CODE, JOB_FILE, JOBS_FILE, SUBMITIT, JobSpec, Submission, keep
from launch.scheduler import slurm
from launch.submission.job_script import Wish, job_script, slurm_executor
from launch.task import LocalTask, SlurmTask
from pomscale.base import installation
from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.cluster import ClusterProfile, expanded

# What a job tells its own processes. One that is submitted from inside must not take itself for that one.
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "TORCHELASTIC_", "POMSCALE_")
_OF_A_RANK = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_OF_A_JOB_TOO = {"TMPDIR"}  # a folder that will be gone
_OF_THE_CLUSTER = {"SLURM_CONF", "SLURM_CLUSTERS"}

# sbatch's words where nobody has looked at the job.
_NO_ANSWER = ("contact slurm controller", "socket timed out", "connection failure", "temporarily unavailable")


def submit(spec: JobSpec, profile: ClusterProfile, wish: Wish) -> str:
    """Returns the job id: SLURM's (of an array, that of the whole), or that of the process that runs the job.

    Writes HOME/job.json, then a line of HOME/jobs.jsonl. On one machine there are no time limits and no jobs to wait
    for but spec.wait_for, the tasks of an array are ranks of one job, and a debug job is over when this returns.

    Raises InputError, with sbatch's own words, for a job that it refuses; PomscaleError if SLURM does not answer.
    """
    if profile.scheduler == "slurm":
        return _submit_to_slurm(spec, profile, wish)
    spec = _on_one_machine(spec, profile, wish)
    keep(Path(spec.home) / JOB_FILE, spec)
    return (_run_here if profile.scheduler == "debug" else _start_in_background)(spec, profile, wish)


def batch_script(spec: JobSpec, profile: ClusterProfile, wish: Wish) -> str:
    """What submit() would give to sbatch; "" for other schedulers. Writes nothing, asks nobody."""
    if profile.scheduler == "slurm":
        return job_script(spec, profile, wish)
    _on_one_machine(spec, profile, wish)
    return ""


def _submit_to_slurm(spec: JobSpec, profile: ClusterProfile, wish: Wish) -> str:
    if not slurm.is_available():
        raise PomscaleError("sbatch: there is no SLURM on this machine; launch from a login node of the cluster")
    executor = slurm_executor(spec, profile, wish)
    home = Path(spec.home)
    keep(home / JOB_FILE, spec)
    submitted_unix_s = time.time()
    with _uninterrupted(home):
        with _as_on_a_login_node(), _refusal_explained(home):
            tasks = [SlurmTask(spec.home)] * (wish.array or 1)
            job_id = executor.submit_array(tasks)[0].job_id.partition("_")[0]
        try:
            record(home, Submission(job_id, submitted_unix_s, "slurm", spec.num_nodes, len(tasks)))
        except PomscaleError:  # nobody would know of it
            slurm.cancel(job_id)
            raise
    return job_id


@contextmanager
def _uninterrupted(home: Path) -> Iterator[None]:
    """From the submission of a job to its line in jobs.jsonl: one that nobody knows of could not be cancelled.

    Ctrl-C waits until then. It would reach sbatch, too, which inherits that it is held back.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked: list[int] = []
    # A thread of a library may be the one that takes the signal, so it is noted as well as held back.
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        print(f"the job was submitted; `pomscale runs cancel {shlex.quote(str(home))}` ends it", file=sys.stderr)
        raise KeyboardInterrupt


@contextmanager
def _as_on_a_login_node() -> Iterator[None]:
    """Evaluations are submitted from inside a job, and people launch from salloc: sbatch hands on what it finds."""
    hidden = {}
    if "SLURM_JOB_ID" in os.environ or LOCAL_JOB in os.environ:
        names = [name for name in os.environ if name.startswith(_OF_A_JOB) or name in _OF_A_RANK | _OF_A_JOB_TOO]
        hidden = {name: os.environ.pop(name) for name in names if name not in _OF_THE_CLUSTER}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _refusal_explained(home: Path) -> Iterator[None]:
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it raises
            yield
    except OSError as error:
        raise PomscaleError(f"{home}: the job cannot be written there: {error}; make room and launch again") from error
    except FailedJobError as error:
        lines = [line.removeprefix("sbatch: error: ").strip() for line in str(error).splitlines()]
        words = "; ".join(filter(None, lines))
        if any(sign in words.lower() for sign in _NO_ANSWER):
            raise PomscaleError(f"SLURM does not answer: {words}; try again when it does") from error
        raise InputError(
            f"sbatch refuses this job: {words}. Change the cluster profile (account, partition, qos) or --nodes"
        ) from error


def _on_one_machine(spec: JobSpec, profile: ClusterProfile, wish: Wish) -> JobSpec:
    if wish.after:
        raise ValueError("after: only SLURM knows such jobs; use spec.wait_for")
    if spec.num_nodes > 1:
        raise InputError(f"--nodes {spec.num_nodes}: a {profile.scheduler} job has one node, this machine")
    return spec if wish.array is None else replace(spec, ranks_per_node=wish.array)


def _start_in_background(spec: JobSpec, profile: ClusterProfile, wish: Wish) -> str:
    home = Path(spec.home)
    python = sys.executable if profile.python is None else expanded(profile.python, "python")
    num_gpus = profile.gpus_per_node if wish.gpus_per_node is None else wish.gpus_per_node
    submitted_unix_s = time.time()
    with _uninterrupted(home):
        with _as_on_a_login_node():
            started = subprocess.run(
                [sys.executable, "-m", "launch.background", spec.home, str(num_gpus), python],
                env=os.environ | _paths(home, profile),
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                check=False,
            )
        if started.returncode:
            why = started.stderr.strip() or f"see the logs in {home / SUBMITIT}"
            raise PomscaleError(f"{home}: the job could not be started: {why}")
        try:
            record(home, Submission(started.stdout, submitted_unix_s, "local", 1, wish.array or 1))
        except PomscaleError:  # nobody would know of it
            os.kill(int(started.stdout), signal.SIGTERM)
            raise
    return started.stdout


def _paths(home: Path, profile: ClusterProfile) -> dict[str, str]:
    """Where a job on this machine finds its code, and puts temporary files."""
    code = home / CODE
    root = code if code.is_dir() else installation.root()
    paths = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",
    }
    if profile.local_disk is not None:
        paths["TMPDIR"] = expanded(profile.local_disk, "local_disk")
    return paths


def _run_here(spec: JobSpec, profile: ClusterProfile, wish: Wish) -> str:
    """The job id is that of this process."""
    home, job_id = Path(spec.home), str(os.getpid())
    record(home, Submission(job_id, time.time(), "debug", 1, wish.array or 1))
    os.environ.update(_paths(home, profile))
    try:
        # Not result(): that opens a debugger on an error.
        error = DebugExecutor(home / SUBMITIT).submit(LocalTask(spec.home)).exception()
    except SystemExit:  # as it ends a process of its own; the verdict has the code
        error = None
    if error is not None:
        raise error
    return job_id


def record(home: Path, submission: Submission) -> None:
    """A line of HOME/jobs.jsonl. PomscaleError if it cannot be written."""
    line = json.dumps(asdict(submission)) + "\n"
    try:
        with (home / JOBS_FILE).open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(line.encode()) < len(line):  # half a line would swallow the next one
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise PomscaleError(f"{home / JOBS_FILE}: {error}; make room and launch again") from error
