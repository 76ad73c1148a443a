"""Identity of this process within its job, read from the variables that srun, torchrun or launch.task have set."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from launch.record.job import JobSpec
from launch.scheduler import slurm
from launch.scheduler.environment import LOCAL_JOB, LOCAL_RESTART
from pomscale.base.errors import PomscaleError

_FIRST_PORT, _NUM_PORTS = 20_000, 10_000  # below what the kernel hands out by itself (from 32,768 on)


@dataclass(frozen=True)
class RankIdentity:
    """The rank of this process and the start of the job that it belongs to.

    array_task: 0 without an array. environment: variables that pass the identity on to torch.distributed and to the
    process of the rank.
    """

    rank: int
    host: str
    job_id: str
    restart: int
    hosts: tuple[str, ...]
    on_slurm: bool
    array_task: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def here(cls, spec: JobSpec, environment: Mapping[str, str] = os.environ) -> RankIdentity:
        """Read the identity of this process. PomscaleError if it belongs to no job, or to another job than `spec`."""
        by_torchrun = "TORCHELASTIC_RUN_ID" in environment
        if LOCAL_JOB in environment:
            host, rank = socket.gethostname(), int(environment.get("RANK", "0"))
            restart = int(environment[LOCAL_RESTART])
            return cls(rank, host, environment[LOCAL_JOB], restart, (host,), on_slurm=False)
        if "SLURM_JOB_ID" not in environment:
            raise PomscaleError("this process belongs to no job: start it by `pomscale launch` or slurm/*.sbatch")
        job_id, restart, hosts = slurm_job(environment)
        host = environment.get("SLURMD_NODENAME", socket.gethostname())
        array_task = int(environment.get("SLURM_ARRAY_TASK_ID", "0"))
        if by_torchrun:
            return cls(int(environment["RANK"]), host, job_id, restart, hosts, on_slurm=True, array_task=array_task)
        num_tasks = int(environment["SLURM_NTASKS"])
        if num_tasks != spec.num_ranks:
            raise PomscaleError(
                f"{spec.job_folder}: the job has {num_tasks} tasks, and its job.json says {spec.num_ranks} ranks; "
                "launch it again rather than changing sbatch's options"
            )
        rank = int(environment["SLURM_PROCID"])
        ranks = {"LOCAL_RANK": environment["SLURM_LOCALID"]}
        if spec.num_ranks > 1 and spec.is_run:
            ranks |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(num_tasks),
                "LOCAL_WORLD_SIZE": str(spec.ranks_per_node),
                "MASTER_ADDR": hosts[0],
                "MASTER_PORT": str(port_of(spec, job_id, restart)),
            }
        return cls(rank, host, job_id, restart, hosts, on_slurm=True, array_task=array_task, environment=ranks)


def slurm_job(environment: Mapping[str, str]) -> tuple[str, int, tuple[str, ...]]:
    """Return (job id, SLURM's restart count, hosts in the order of ranks)."""
    job_id = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:
        job_id = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    hosts = tuple(slurm.hosts_of(environment["SLURM_JOB_NODELIST"]))
    return job_id, int(environment.get("SLURM_RESTART_COUNT", "0")), hosts


def port_of(spec: JobSpec, job_id: str, restart: int) -> int:
    """Return the port of the rendezvous, which differs by start: a rank left over from the last one must not join."""
    return _FIRST_PORT + zlib.crc32(f"{spec.job_folder} {job_id} {restart}".encode()) % _NUM_PORTS
