"""What submitit runs: the ranks of a job on this node, each with its guard.

Pickled by submitit, so both classes hold nothing but the job's home; everything else is read there by every start.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from submitit.helpers import DelayedSubmission

from launch.forwarding import Forwarding
from launch.guard import guard
from launch.job import JOB_FILE, JobSpec, Verdict, attempt_folder, attempts, keep, submissions
from launch.place import LOCAL_JOB, LOCAL_RESTART, Place, port_of, slurm_job

_GUARD = ["-m", "launch.guard"]
_TORCHRUN = "torch.distributed.run"


@dataclass(frozen=True)
class SlurmTask:
    """One task of srun: one rank, or with ranks_by torchrun all ranks of a node."""

    home: str

    def __call__(self) -> None:
        """Ends the process with the exit code of the job, where this is its first task."""
        spec = JobSpec.read(Path(self.home) / JOB_FILE)
        if spec.ranks_by == "srun":
            sys.exit(guard(spec, Place.here(spec)))
        _, restart, hosts = slurm_job(os.environ)
        rendezvous = [
            f"--nnodes={spec.num_nodes}",
            f"--node-rank={os.environ['SLURM_NODEID']}",
            f"--master-addr={hosts[0]}",
            f"--master-port={port_of(os.environ['SLURM_JOB_ID'], restart)}",
        ]
        sys.exit(_start_ranks(spec, rendezvous, {}, Forwarding()))

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
        forwarding = Forwarding()
        if (refusal := _wait_for(spec, forwarding)) is not None:
            keep(attempt_folder(home, job_id, 0) / "verdict.json", refusal)
            sys.exit(refusal.exit_code)
        restart = 0
        while attempt_folder(home, job_id, restart).exists():  # of another job: process numbers come round again
            restart += 1
        while True:
            variables = {LOCAL_JOB: job_id, LOCAL_RESTART: str(restart)}
            code = _start_ranks(spec, ["--standalone"], variables, forwarding)
            newest = attempts(home)[-1]
            if newest.verdict is None:
                sys.exit(code)
            asked_to_end = forwarding.first in ("SIGTERM", "SIGINT")
            if newest.verdict.action != "requeue" or asked_to_end:
                sys.exit(newest.verdict.exit_code)
            restart += 1
            forwarding.first = None

    def checkpoint(self) -> DelayedSubmission:
        """As SlurmTask.checkpoint."""
        return DelayedSubmission(self)


def _wait_for(spec: JobSpec, forwarding: Forwarding) -> Verdict | None:
    """Until the jobs before this one have ended. Returns the verdict on this job if it may not begin any more."""
    for home, condition in spec.wait_for.items():
        while (ended := _ended(Path(home))) is None:
            if forwarding.first is not None:
                return Verdict("fail", f"{forwarding.first} while it waited for {home}", 1, time.time())
            time.sleep(1.0)
        if condition == "ok" and (ended.action != "done" or ended.exit_code != 0):
            reason = f"not begun, since the job before it did not succeed: {ended.reason}"
            return Verdict("fail", reason, 1, time.time())
    return None


def _ended(home: Path) -> Verdict | None:
    newest = attempts(home)[-1:]
    verdict = newest[0].verdict if newest else None
    return None if verdict is None or verdict.action == "requeue" else verdict


def _start_ranks(spec: JobSpec, rendezvous: list[str], variables: dict[str, str], forwarding: Forwarding) -> int:
    """The guards of all ranks of this node, until they have ended. Returns the job's exit code on the first node."""
    if spec.num_ranks == 1:
        command = [sys.executable, "-u", *_GUARD, spec.home]
    else:
        ranks = f"--nproc-per-node={spec.ranks_per_node}"
        command = [sys.executable, "-m", _TORCHRUN, *rendezvous, ranks, *_GUARD, spec.home]
    # Out of reach of signals to this process group: torchrun would end all ranks at once, instead of letting them save.
    launcher = subprocess.Popen(command, env=os.environ | variables, start_new_session=True)
    forwarding.send = lambda number: _signal_guards(launcher.pid, number)
    code = launcher.wait()
    forwarding.send = None
    return code


def _signal_guards(launcher: int, number: int) -> None:
    try:
        family = [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            words = process.cmdline()
            if "launch.guard" in words and _TORCHRUN not in words:
                process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
