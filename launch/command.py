"""`pomscale launch`: submit the jobs of a recipe of any kind to a cluster, and print what the user needs to know."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.pipelines.launch import launch_pipeline
from launch.pipelines.sweep import plan_sweep, submit_sweep, sweep_table
from launch.record.job import read_starts
from launch.scheduler import slurm
from launch.scheduler.environment import for_submission
from launch.status.table import shell_path
from launch.submission.freeze import which_code
from launch.submission.prepare import JobRequest, prepare_encode, prepare_train
from launch.submission.prepared import Prepared
from pomscale.base.errors import InputError
from pomscale.config.encode import EncodeRecipe
from pomscale.config.experiment import ExperimentRecipe
from pomscale.config.load import load_cluster, load_recipe
from pomscale.config.pipeline import PipelineRecipe
from pomscale.config.shipped import recipe_file
from pomscale.config.sweep import load_points


@dataclass(frozen=True)
class Launch:
    """Arguments of the command.

    num_nodes, array, time_limit: None if not given. command_line: as typed, to launch the same again.
    """

    recipe: Path
    overrides: list[str]
    cluster: str
    changes: list[str] = field(default_factory=list)
    num_nodes: int | None = None
    time_limit: str | None = None
    array: int | None = None
    dry_run: bool = False
    new_code: bool = False
    command_line: list[str] = field(default_factory=list)


def launch(asked: Launch, check_command: Callable[[list[str]], None]) -> int:
    """Submit the jobs and print what the user needs to know. Return the exit code: 0, or that of a debug job.

    Args:
        asked: The arguments.
        check_command: Raises InputError for words that are no command of pomscale.

    Raises:
        InputError: Before anything is written or submitted, if anything is wrong.
    """
    recipe = load_recipe(asked.recipe, asked.overrides)
    if isinstance(recipe, ExperimentRecipe):
        raise InputError(
            f"{asked.recipe}: an experiment is many jobs; submit them: "
            f"pomscale experiment {shlex.quote(str(asked.recipe))} --cluster {asked.cluster}"
        )
    profile = load_cluster(asked.cluster, asked.changes)
    if asked.time_limit is not None and profile.scheduler != "slurm":
        raise InputError(f"--time: a {profile.scheduler} job has no time limit")
    request = JobRequest(
        profile,
        asked.cluster,
        num_nodes=asked.num_nodes or 1,
        time_limit=asked.time_limit,
        command_line=asked.command_line,
        dry_run=asked.dry_run,
    )
    if isinstance(recipe, PipelineRecipe):
        return _launch_pipeline(asked, recipe, request, check_command)
    if isinstance(recipe, EncodeRecipe):
        return _launch_job(asked, prepare_encode(asked.recipe, asked.overrides, request, array=asked.array))
    if asked.array is not None:
        raise InputError("--array: only an encode is shared by tasks; a training run spans --nodes")
    if recipe.sweep:
        return _launch_sweep(asked, request)
    return _launch_job(asked, prepare_train(asked.recipe, asked.overrides, request))


def _launch_pipeline(
    asked: Launch, recipe: PipelineRecipe, request: JobRequest, check_command: Callable[[list[str]], None]
) -> int:
    given = {"--nodes": asked.num_nodes, "--array": asked.array, "--time": asked.time_limit}
    for option, value in given.items():
        if value is not None:
            raise InputError(f"{option}: every stage of a pipeline says this for itself, in {asked.recipe}")
    lines, refusals = launch_pipeline(
        recipe, recipe_file(asked.recipe), request, check_command, new_code=asked.new_code
    )
    print(lines)
    _raise_refusals(refusals)
    return 0


def _launch_sweep(asked: Launch, request: JobRequest) -> int:
    planned = plan_sweep(load_points(asked.recipe, asked.overrides), request)
    new = [one.prepared for one in planned if one.prepared is not None]
    if new:
        _print_lines(_description(new[0], asked, f"{len(new)} of {len(planned)} runs, each on"))
    jobs = {} if asked.dry_run else submit_sweep(planned, new_code=asked.new_code)
    print(sweep_table(planned, jobs))
    if asked.dry_run or not new:
        print("nothing was submitted" if asked.dry_run else "nothing is left to submit")
        _raise_refusals([f"{one.spec.name}: {refusal}" for one in new for refusal in one.refusals])
    else:
        folder = shell_path(new[0].job_folder.parent)
        _print_lines([("next", f"pomscale runs {folder}"), ("", f"pomscale report {folder}/*")])
    return max(map(_exit_code, jobs), default=0) if request.profile.scheduler == "debug" else 0


def _launch_job(asked: Launch, prepared: Prepared) -> int:
    _print_lines(_description(prepared, asked, "on"))
    if asked.dry_run:
        _print_dry_run(prepared)
        _raise_refusals(prepared.refusals)
        return 0
    job_id = prepared.submit(new_code=asked.new_code)
    if prepared.profile.scheduler == "debug":
        return _exit_code(prepared.job_folder)
    job_folder = shell_path(prepared.job_folder)
    _print_lines(
        [
            ("job", f"{job_id}, {'an array of ' + str(prepared.array) + ' tasks' if prepared.array else 'submitted'}"),
            ("next", f"pomscale watch {job_folder}" if prepared.spec.is_run else f"pomscale runs status {job_folder}"),
            ("", f"pomscale runs logs {job_folder} --follow"),
            ("", f"pomscale runs cancel {job_folder}"),
        ]
    )
    return 0


def _description(prepared: Prepared, asked: Launch, on: str) -> list[tuple[str, str]]:
    """Describe a job, or the first one of a sweep, in lines of (label, text)."""
    spec, limit = prepared.spec, prepared.time_limit or prepared.profile.time_limit
    size = f"{prepared.tasks}{spec.num_nodes} x {spec.ranks_per_node} ranks"
    lines = [
        ("launch", f"{asked.recipe} {on} {asked.cluster}: {size}" + (f", {limit}" if limit else "")),
        ("folder", shell_path(prepared.job_folder)),
        ("code", which_code(prepared.job_folder, new_code=asked.new_code)),
    ]
    lines += [(line[:10].strip(), line[10:]) for line in prepared.plan]
    return lines + [("note", note) for note in prepared.notes]


def _print_dry_run(prepared: Prepared) -> None:
    script = prepared.script()
    if script:
        _print_lines([("SLURM", _test_submission(script))])
        print(f"\n{script}")
    print("nothing was written or submitted")


def _raise_refusals(refusals: Sequence[str]) -> None:
    """Raise InputError, at the end of a dry run, for problems for which jobs would be refused."""
    if refusals:
        raise InputError("this would be refused: " + "\n".join(refusals))


def _test_submission(script: str) -> str:
    """Return what `sbatch --test-only` prints about a job script."""
    if not slurm.is_available():
        return "not on this machine, so the job script was not tested"
    words = ["sbatch", "--test-only"]
    done = subprocess.run(words, input=script, env=for_submission(), capture_output=True, text=True, check=False)
    return "; ".join(line.removeprefix("sbatch: ") for line in done.stderr.splitlines() if line)


def _exit_code(job_folder: Path) -> int:
    """Return the exit code of a job that is over."""
    verdict = read_starts(job_folder)[-1].verdict
    return 1 if verdict is None else verdict.exit_code


def _print_lines(lines: Sequence[tuple[str, str]]) -> None:
    for label, text in lines:
        print(f"{label:<10}{text}".rstrip(), flush=True)
