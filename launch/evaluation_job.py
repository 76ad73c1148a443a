"""Submission of the evaluation of one checkpoint.

    python -m launch.evaluation_job RUN NAME SAMPLES

This is a separate process so that the supervisor of a run neither waits for a slow scheduler nor keeps in memory what
the submission of a job needs.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from launch.node.evaluations import evaluation_folder
from launch.record.job import JobSpec, LaunchedAs
from launch.submission.checks import launched_profile
from launch.submission.prepare import JobRequest, prepare_commands
from launch.submission.prepared import Prepared
from pomscale.base.errors import PomscaleError
from pomscale.config.evaluation import FIGURES, EvaluationConfig
from pomscale.config.load import load_train_recipe
from pomscale.runs.layout import CODE_FOLDER, EVALUATED_FOLDER, JOB_FILE, LAUNCH_FILE


def submit_evaluation(run: Path, name: str, samples: int) -> str:
    """Submit the job of an evaluation whose checkpoint is in its job folder already. Return the job id.

    Raises PomscaleError if the run folder lacks something, and what `launch.submission.submit` raises.
    """
    launched = LaunchedAs.read(run / LAUNCH_FILE)
    profile = launched_profile(run, launched)
    if profile.scheduler == "debug":  # a job in the foreground would block the supervisor
        profile = profile.model_copy(update={"scheduler": "local"})
    config = _config(run, launched, name)
    time_limit = config.time_limit or launched.time_limit
    prepared = prepare_evaluation(run, config, samples, JobRequest(profile, launched.cluster, time_limit=time_limit))
    job_folder = prepared.job_folder
    if (run / CODE_FOLDER).is_dir() and not (job_folder / CODE_FOLDER).exists():
        # The evaluation uses the code that the run was launched with.
        (job_folder / CODE_FOLDER).symlink_to(os.path.relpath(run / CODE_FOLDER, job_folder))
    cwd = JobSpec.read(run / JOB_FILE).cwd
    return replace(prepared, spec=replace(prepared.spec, cwd=cwd)).submit()


def prepare_evaluation(run: Path, config: EvaluationConfig, samples: int, request: JobRequest) -> Prepared:
    """Prepare the job of an evaluation: one process, with one GPU if the nodes have any."""
    one_process = replace(request, gpus_per_node=min(request.profile.gpus_per_node, 1), ranks_per_node=1)
    return prepare_commands(
        f"{run.name}-{config.name}-{samples}",
        evaluation_folder(run, config.name, samples),
        evaluation_commands(config, run, samples),
        one_process,
    )


def evaluation_commands(config: EvaluationConfig, run: Path, samples: int) -> list[list[str]]:
    """Return the commands of the recipe, filled in, and one that records their result."""
    job_folder = evaluation_folder(run, config.name, samples)
    filled = {"checkpoint": str(job_folder / EVALUATED_FOLDER), "samples": samples, "folder": str(job_folder)}
    commands = [[word.format(**filled) for word in shlex.split(command)] for command in config.run]
    record = ["evaluate", "record", str(run), config.name, str(samples), str(job_folder / FIGURES)]
    return [*commands, [*record, "--evaluated", str(job_folder / EVALUATED_FOLDER)]]


def _config(run: Path, launched: LaunchedAs, name: str) -> EvaluationConfig:
    evaluations = load_train_recipe(run / launched.recipe).evaluations if launched.recipe else []
    for config in evaluations:
        if config.name == name:
            return config
    raise PomscaleError(f"{run}: its recipe has no evaluation {name!r}")


def main() -> None:
    run, name, samples = sys.argv[1:]
    try:
        submit_evaluation(Path(run), name, int(samples))
    except PomscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
