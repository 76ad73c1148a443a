"""Preparation of a run inside a user's own job script, such as slurm/train.sbatch.

    python -m launch.plain RECIPE [a.b=c ...]

It does on the first node what `pomscale launch` does on a login node: check recipe, dataset and layout, freeze code and
recipe into the run folder, record the submission. It prints the job folder, which the guard of every rank is given.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from launch.node.identity import slurm_job
from launch.record.job import Submission, keep, read_submissions
from launch.submission.prepare import JobRequest, prepare_train, resolved_output
from launch.submission.submit import record_submission
from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.cluster import ClusterProfile
from pomscale.config.load import load_train_recipe
from pomscale.runs.layout import JOB_FILE


def prepare_here(words: list[str], environment: Mapping[str, str] = os.environ) -> Path:
    """Return the run folder that the words ask for. InputError, before anything is written, if anything is wrong."""
    if not words or "SLURM_JOB_ID" not in environment:
        raise InputError("start this by `sbatch slurm/train.sbatch RECIPE [a.b=c ...]`")
    path, overrides = Path(words[0]), words[1:]
    profile = _profile(environment)
    recipe = load_train_recipe(path, overrides)
    job_folder = resolved_output(recipe.output, profile) / recipe.name
    job_id, _, _ = slurm_job(environment)
    if any(one.job_id == job_id for one in read_submissions(job_folder)):
        return job_folder  # started again by SLURM: it continues as it was launched
    num_nodes = int(environment["SLURM_NNODES"])
    command_line = ["sbatch", "slurm/train.sbatch", *words]
    request = JobRequest(profile, "sbatch", num_nodes=num_nodes, command_line=command_line)
    prepared = prepare_train(path, overrides, request)
    prepared.write_job_folder()
    keep(job_folder / JOB_FILE, prepared.spec)
    record_submission(job_folder, Submission(job_id, time.time(), "slurm", num_nodes, output=_output()))
    return job_folder


def _output() -> str | None:
    """Return the file that this job script prints into; None if that is no file."""
    path = os.readlink("/proc/self/fd/2")
    return path if os.path.isfile(path) else None


def _profile(environment: Mapping[str, str]) -> ClusterProfile:
    """Return the resources of this SLURM job as a profile. The script sets the time limit; the one here is unused."""
    ranks_per_node = int(environment["SLURM_NTASKS"]) // int(environment["SLURM_NNODES"])
    gpus = int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    return ClusterProfile(
        kind="cluster",
        scheduler="slurm",
        gpus_per_node=gpus,
        ranks_per_node=ranks_per_node,
        cpus_per_node=max(ranks_per_node, int(environment["SLURM_CPUS_ON_NODE"])),
        time_limit="1:00:00",
    )


def main() -> None:
    try:
        print(prepare_here(sys.argv[1:]))
    except PomscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
