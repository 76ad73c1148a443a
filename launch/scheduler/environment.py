"""Environment of scheduler commands: that of this process, without options that a user has set for them.

SLURM's commands also take their options from variables, and these win over the lines of a job script: with
SBATCH_ACCOUNT, another account than the profile's would be charged; with SQUEUE_STATES, squeue would not show a job
that runs. What a command is to do is decided by the code that calls it, and by the cluster profile, alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

from pomscale.base.console import warn

OPTION_PREFIXES = ("SALLOC_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SCONTROL_")
"""Prefixes of variables that are options of SLURM's commands. slurm/requeue.sh, which is bash, names the same.

SLURM_CONF, SLURM_JWT, SLURM_CLUSTERS and the like are configuration, and stay.
"""

_ANSWERS_IN_FULL = {"SLURM_BITSTR_LEN": "0"}  # else squeue cuts off the waiting tasks of an array after 64 characters

LOCAL_JOB, LOCAL_RESTART = "POMSCALE_LOCAL_JOB", "POMSCALE_LOCAL_RESTART"
"""Variables that launch.task.LocalTask sets, since a local job has no scheduler to count its starts."""

# Variables that a job sets for its own processes. A job that is submitted from inside another must not inherit them.
_JOB_PREFIXES = ("SLURM_", "SLURMD_", "SUBMITIT_", "TORCHELASTIC_", "POMSCALE_")
_JOB_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_JOB_VARIABLES |= {"TMPDIR"}  # a folder that is deleted with the job
_CONFIGURATION = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}


def for_questions(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a command that asks SLURM, or changes a job that has been submitted."""
    return _without_options(environment) | _ANSWERS_IN_FULL


def for_submission(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of sbatch, which passes it on to the job: without the job that this process is part of.

    Evaluations are submitted from inside a job, and users launch from inside salloc.
    """
    kept = _without_options(environment)
    if not _is_inside_job(environment):
        return kept
    return {
        name: value
        for name, value in kept.items()
        if name in _CONFIGURATION or not (name.startswith(_JOB_PREFIXES) or name in _JOB_VARIABLES)
    }


@contextmanager
def submitting() -> Iterator[None]:
    """Make for_submission() the environment of this process, for commands that others start from it."""
    kept = for_submission()
    hidden = {name: value for name, value in os.environ.items() if name not in kept}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def warn_of_ignored_options(environment: Mapping[str, str] = os.environ) -> None:
    """Warn, once, of options for sbatch and srun that a user has set and that do not reach the job."""
    # Inside a job srun has set variables of its own.
    prefixes = ("SBATCH_",) if _is_inside_job(environment) else ("SBATCH_", "SRUN_")
    ignored = sorted(name for name in environment if name.startswith(prefixes))
    if ignored:
        _warn_once(
            f"not used: {', '.join(f'{name}={environment[name]}' for name in ignored)}; a job has the options of its "
            "cluster profile alone: write them there, or give them by --set"
        )


def _without_options(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(OPTION_PREFIXES)}


@cache
def _warn_once(line: str) -> None:
    """Warn once: a sweep submits many jobs."""
    warn(line)


def _is_inside_job(environment: Mapping[str, str]) -> bool:
    return "SLURM_JOB_ID" in environment or LOCAL_JOB in environment
