"""Tasks that submitit runs: they start the ranks of a job on this node, each with its guard.

submitit pickles them by reference, and `pomscale runs resume` unpickles them with the code that was frozen at the first
launch. So this module, the classes and their only field, `home` (the job folder), keep their names. Everything else is
read from the job folder by every start.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil
from submitit.helpers import DelayedSubmission

from launch.node.identity import port_of, slurm_job
from launch.node.signals import SignalForwarder, block_signals
from launch.record.job import JobSpec, StartRecord, Verdict, keep, read_endings, read_submissions, start_folder
from launch.record.result import final_verdict, is_success, not_begun_after
from launch.scheduler.environment import LOCAL_JOB, LOCAL_RESTART
from pomscale.base.hosts import name_problem
from pomscale.runs.layout import JOB_FILE, REQUEUE_FILE, START_FILE, VERDICT_FILE

_GUARD = ["-m", "launch.guard"]
_TORCHRUN = "torch.distributed.run"
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class SlurmTask:
    """One task of srun: one rank, or with ranks_by torchrun all ranks of a node."""

    home: str

    def __call__(self) -> None:
        """Run the ranks. The first task ends the process with the exit code of the job."""
        job_folder = Path(self.home)
        spec = JobSpec.read(job_folder / JOB_FILE)
        if spec.ranks_by == "srun" or spec.num_ranks == 1:
            become_guard(spec)
        job_id, restart, hosts = slurm_job(os.environ)
        if spec.num_nodes > 1 and (problem := name_problem(hosts[0])) is not None:
            sys.exit(f"error: {problem}")
        rendezvous = [
            f"--nnodes={spec.num_nodes}",
            f"--node-rank={os.environ['SLURM_NODEID']}",
            f"--master-addr={hosts[0]}",
            f"--master-port={port_of(spec, job_id, restart)}",
        ]
        code = _start_ranks(spec, rendezvous, {}, SignalForwarder())
        folder = start_folder(job_folder, job_id, restart)
        if os.environ["SLURM_NODEID"] == "0":
            sys.exit(_exit_code(folder, code))
        # srun ends all tasks as soon as one fails, so this one succeeds if its ranks have left endings for rank 0.
        sys.exit(0 if read_endings(folder) else code)

    def checkpoint(self) -> DelayedSubmission:
        """Start again, after a signal so early that only submitit's own handler was there: nothing has begun."""
        return DelayedSubmission(self)


@dataclass(frozen=True)
class LocalTask:
    """All ranks of a job on this machine, started again as long as the verdict on each start asks for it."""

    home: str

    def __call__(self) -> None:
        """Run the ranks, and end the process with the exit code of the job."""
        job_folder = Path(self.home)
        spec = JobSpec.read(job_folder / JOB_FILE)
        job_id = os.environ.get("SUBMITIT_LOCAL_JOB_ID") or read_submissions(job_folder)[-1].job_id
        restart = 0
        # An earlier job with the same process number may have left starts.
        while (folder := start_folder(job_folder, job_id, restart)).exists():
            restart += 1
        forwarding = SignalForwarder()
        if (refusal := _wait_for(spec, forwarding)) is not None:
            keep(folder / START_FILE, StartRecord(job_id, restart, [], spec.ranks_per_node, time.time(), 0))
            keep(folder / VERDICT_FILE, refusal)
            sys.exit(refusal.exit_code)
        while True:
            variables = {LOCAL_JOB: job_id, LOCAL_RESTART: str(restart)}
            code = _start_ranks(spec, ["--standalone"], variables, forwarding)
            folder = start_folder(job_folder, job_id, restart)
            forwarding.first = None  # before the next line, since a signal after that is for the next start
            if forwarding.asked_to_end or not (folder / REQUEUE_FILE).is_file():
                sys.exit(_exit_code(folder, code))
            restart += 1

    def checkpoint(self) -> DelayedSubmission:
        """Start again, like SlurmTask.checkpoint."""
        return DelayedSubmission(self)


def _exit_code(folder: Path, code: int) -> int:
    """Return the exit code of the verdict, or `code` without one: torchrun itself only knows 0 and 1."""
    verdict = folder / VERDICT_FILE
    return Verdict.read(verdict).exit_code if verdict.is_file() else code


def become_guard(spec: JobSpec) -> NoReturn:
    """Replace this process by the guard of its rank. A request to stop meanwhile stays pending and is not lost."""
    block_signals()
    os.execv(sys.executable, [sys.executable, "-u", *_GUARD, spec.job_folder])


def _wait_for(spec: JobSpec, forwarding: SignalForwarder) -> Verdict | None:
    """Wait until the jobs before this one have ended. Return a verdict if this job must not begin, else None."""
    for job_folder, condition in spec.wait_for.items():
        if not read_submissions(Path(job_folder)):
            reason = f"not begun: the job that it waits for has left nothing in {job_folder}"
            return Verdict("fail", reason, 1, time.time())
        while (verdict := final_verdict(Path(job_folder))) is None:
            if forwarding.first is not None:
                return Verdict("fail", f"{forwarding.first} while it waited for {job_folder}", 1, time.time())
            time.sleep(1.0)
        if condition == "ok" and not is_success(verdict):
            return Verdict("fail", not_begun_after(job_folder, verdict), 1, time.time())
    return None


def _start_ranks(spec: JobSpec, rendezvous: list[str], variables: dict[str, str], forwarding: SignalForwarder) -> int:
    """Run the guards of all ranks of this node until they have ended. Return the exit code of their launcher.

    On the first node that is the exit code of the job.
    """
    if spec.num_ranks == 1:
        command = [sys.executable, "-u", *_GUARD, spec.job_folder]
    else:
        ranks = f"--nproc-per-node={spec.ranks_per_node}"
        command = [sys.executable, "-m", _TORCHRUN, *rendezvous, ranks, *_GUARD, spec.job_folder]
    # SLURM signals every descendant of a task; torchrun would end all ranks at once, instead of letting them save.
    variables = {**variables, "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGHUP,SIGQUIT"}
    launcher = subprocess.Popen(
        command,
        env=os.environ | variables,
        start_new_session=True,
        preexec_fn=block_signals,  # noqa: PLW1509 (one thread). torchrun leaves them blocked, its guards do not
    )
    signalled: set[int] = set()
    forwarding.send = lambda number: signalled.update(_signal_guards(launcher.pid, number))
    while (code := launcher.poll()) is None:
        if forwarding.first is not None:  # guards that did not exist yet when the signal came
            signalled.update(_signal_guards(launcher.pid, signal.Signals[forwarding.first], spared=signalled))
        time.sleep(_LOOK_EVERY_S)
    forwarding.send = None
    return code


def _signal_guards(launcher: int, number: int, spared: Collection[int] = ()) -> list[int]:
    """Send a signal to the guards below a launcher, except to the spared ones. Return their process numbers."""
    try:
        family = [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    signalled = []
    for process in family:
        try:
            words = process.cmdline()
            if process.pid not in spared and "launch.guard" in words and _TORCHRUN not in words:
                process.send_signal(number)
                signalled.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return signalled
