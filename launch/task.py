"""What submitit runs: the ranks of a job on this node, each with its guard.

Pickled by submitit, so both classes hold nothing but the job's home; everything else is read there by every start.
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

from launch.node.forwarding import Forwarding, hold_signals
from launch.node.process import LOCAL_JOB, LOCAL_RESTART, port_of, slurm_job
from launch.record.job import (
    JOB_FILE,
    REQUEUE_FILE,
    JobSpec,
    Start,
    Verdict,
    attempt_folder,
    endings,
    keep,
    submissions,
)
from launch.record.state import ended, is_success

_GUARD = ["-m", "launch.guard"]
_TORCHRUN = "torch.distributed.run"
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class SlurmTask:
    """One task of srun: one rank, or with ranks_by torchrun all ranks of a node."""

    home: str

    def __call__(self) -> None:
        """Ends the process with the exit code of the job, where this is its first task."""
        spec = JobSpec.read(Path(self.home) / JOB_FILE)
        if spec.ranks_by == "srun" or spec.num_ranks == 1:
            become_guard(spec)
        job_id, restart, hosts = slurm_job(os.environ)
        rendezvous = [
            f"--nnodes={spec.num_nodes}",
            f"--node-rank={os.environ['SLURM_NODEID']}",
            f"--master-addr={hosts[0]}",
            f"--master-port={port_of(spec, job_id, restart)}",
        ]
        code = _start_ranks(spec, rendezvous, {}, Forwarding())
        attempt = attempt_folder(Path(self.home), job_id, restart)
        if os.environ["SLURM_NODEID"] == "0":
            sys.exit(_exit_code(attempt, code))
        # srun ends all tasks as soon as one fails: not before rank 0 has judged what the ranks of this node have told.
        sys.exit(0 if endings(attempt) else code)

    def checkpoint(self) -> DelayedSubmission:
        """For a signal so early that only submitit's own handler is there: start again, nothing has begun."""
        return DelayedSubmission(self)


@dataclass(frozen=True)
class LocalTask:
    """All ranks of a job on this machine, started again as the verdict on each start says."""

    home: str

    def __call__(self) -> None:
        """Ends the process with the exit code of the job."""
        home = Path(self.home)
        spec = JobSpec.read(home / JOB_FILE)
        job_id = os.environ.get("SUBMITIT_LOCAL_JOB_ID") or submissions(home)[-1].job_id
        restart = 0
        while (attempt := attempt_folder(home, job_id, restart)).exists():  # of another job: process numbers come again
            restart += 1
        forwarding = Forwarding()
        if (refusal := _wait_for(spec, forwarding)) is not None:
            keep(attempt / "start.json", Start(job_id, restart, [], spec.ranks_per_node, time.time(), 0))
            keep(attempt / "verdict.json", refusal)
            sys.exit(refusal.exit_code)
        while True:
            variables = {LOCAL_JOB: job_id, LOCAL_RESTART: str(restart)}
            code = _start_ranks(spec, ["--standalone"], variables, forwarding)
            attempt = attempt_folder(home, job_id, restart)
            forwarding.first = None  # before the next line: what comes after it is for the next start
            if forwarding.asked_to_end or not (attempt / REQUEUE_FILE).is_file():
                sys.exit(_exit_code(attempt, code))
            restart += 1

    def checkpoint(self) -> DelayedSubmission:
        """As SlurmTask.checkpoint."""
        return DelayedSubmission(self)


def _exit_code(attempt: Path, code: int) -> int:
    """That of the verdict: torchrun knows but 0 and 1."""
    verdict = attempt / "verdict.json"
    return Verdict.read(verdict).exit_code if verdict.is_file() else code


def become_guard(spec: JobSpec) -> NoReturn:
    """Replace this process by the guard of its rank. What asks it to stop meanwhile is held back, not lost."""
    hold_signals()
    os.execv(sys.executable, [sys.executable, "-u", *_GUARD, spec.home])


def _wait_for(spec: JobSpec, forwarding: Forwarding) -> Verdict | None:
    """Until the jobs before this one have ended. Returns the verdict on this job if it may not begin any more."""
    for home, condition in spec.wait_for.items():
        if not submissions(Path(home)):
            return Verdict("fail", f"not begun: the job that it waits for has left nothing in {home}", 1, time.time())
        while (verdict := ended(Path(home))) is None:
            if forwarding.first is not None:
                return Verdict("fail", f"{forwarding.first} while it waited for {home}", 1, time.time())
            time.sleep(1.0)
        if condition == "ok" and not is_success(verdict):
            reason = f"not begun, since the job before it ({home}) did not succeed: {verdict.reason}"
            return Verdict("fail", reason, 1, time.time())
    return None


def _start_ranks(spec: JobSpec, rendezvous: list[str], variables: dict[str, str], forwarding: Forwarding) -> int:
    """The guards of all ranks of this node, until they have ended. Returns the job's exit code on the first node."""
    if spec.num_ranks == 1:
        command = [sys.executable, "-u", *_GUARD, spec.home]
    else:
        ranks = f"--nproc-per-node={spec.ranks_per_node}"
        command = [sys.executable, "-m", _TORCHRUN, *rendezvous, ranks, *_GUARD, spec.home]
    # SLURM signals every descendant of a task; torchrun would end all ranks at once, instead of letting them save.
    variables = {**variables, "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGHUP,SIGQUIT"}
    launcher = subprocess.Popen(
        command,
        env=os.environ | variables,
        start_new_session=True,
        preexec_fn=hold_signals,  # noqa: PLW1509 (one thread). torchrun never takes them, its guards do
    )
    told: set[int] = set()
    forwarding.send = lambda number: told.update(_signal_guards(launcher.pid, number))
    while (code := launcher.poll()) is None:
        if forwarding.first is not None:  # guards that were not there yet when it came
            told.update(_signal_guards(launcher.pid, signal.Signals[forwarding.first], spared=told))
        time.sleep(_LOOK_EVERY_S)
    forwarding.send = None
    return code


def _signal_guards(launcher: int, number: int, spared: Collection[int] = ()) -> list[int]:
    """Their process numbers."""
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
