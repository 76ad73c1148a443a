"""Several jobs as one wish: the stages of a pipeline recipe, each a job that waits for those before it.

    OUTPUT/NAME/pipeline.json     the stages: their homes, what they wait for, what they were made from
    OUTPUT/NAME/STAGE/            home of a stage; of one that trains it is the run folder instead

The id of a stage's job, and how it ended, are in the stage's home. Launching again is going on: stages that have
succeeded are left alone, and so are those that still wait or run.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch.pipelines.plan import PipelinePlan, PlannedStage
from launch.record.job import read_submissions
from launch.record.pipeline import write_pipeline
from launch.record.result import final_verdict, is_success
from launch.scheduler import slurm
from launch.submission.control import cancel
from launch.submission.prepare import resolved_output
from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.cluster import ClusterProfile
from pomscale.config.pipeline import PipelineRecipe


def launch_pipeline(
    recipe: PipelineRecipe,
    path: Path,
    profile: ClusterProfile,
    cluster_name: str,
    *,
    dry_run: bool,
    command_line: list[str],
    check_command: Callable[[list[str]], None],
    new_code: bool = False,
) -> str:
    """Submit the stages that are not done; what to tell people. All of them are checked before the first is submitted.

    path: of the pipeline's file; recipes of its stages are relative to it. check_command: raises InputError for words
    that are no command of pomscale. new_code: as Prepared.submit. If one stage is refused, those before it are
    cancelled.

    Raises InputError, naming the stage, for whatever is wrong with one; PomscaleError for one that fails, where jobs
    run in the foreground.
    """
    folder = resolved_output(recipe.output, profile) / recipe.name
    plan = PipelinePlan(recipe, path, folder, profile, cluster_name, command_line, check_command)
    planned = [plan.add(stage) for stage in recipe.stages]
    if dry_run:
        return _table(f"pipeline {recipe.name} on {cluster_name}, not submitted", planned, {})
    to_submit = [stage for stage in planned if stage.prepared is not None]
    if not to_submit:
        return _table(f"pipeline {recipe.name}: nothing to submit", planned, {})
    for stage in planned:
        if stage.replaces is not None:
            slurm.cancel(stage.replaces)
    jobs = _submit(plan, planned, new_code)
    if profile.scheduler == "debug":
        _raise_failure(to_submit)
    lines = [_table(f"pipeline {recipe.name} on {cluster_name}: {folder}", planned, jobs)]
    lines += dict.fromkeys(note for stage in to_submit if stage.prepared is not None for note in stage.prepared.notes)
    first = shell_path(Path(to_submit[0].record.job_folder))
    lines += [
        f"next      pomscale runs {shell_path(folder)}",
        f"          pomscale runs logs {first} --follow",
        f"          pomscale runs cancel {first}    # and with it what waits for it",
        f"          {shlex.join(command_line)}    # again: goes on with what is not done",
    ]
    return "\n".join(lines)


def shell_path(folder: Path) -> str:
    """As people name it here, for a shell."""
    here = Path.cwd()
    return shlex.quote(str(folder.relative_to(here) if folder.is_relative_to(here) else folder))


def _submit(plan: PipelinePlan, planned: Sequence[PlannedStage], new_code: bool) -> dict[str, str]:
    """Stage -> job id, of all that wait or run now. All of the new ones are submitted, or none."""
    jobs: dict[str, str] = {stage.record.name: stage.job_id for stage in planned if stage.job_id is not None}
    job_folders = {stage.record.name: stage.record.job_folder for stage in planned}
    submitted: list[PlannedStage] = []
    for stage in planned:
        if stage.prepared is None:
            continue
        name, after = stage.record.name, stage.record.after
        try:
            if plan.profile.scheduler == "slurm":
                # What is done already needs no waiting for.
                waits_for = {jobs[before]: condition for before, condition in after.items() if before in jobs}
                jobs[name] = stage.prepared.submit(after=waits_for, new_code=new_code)
            else:
                waiting = stage.prepared.waiting_for(
                    {job_folders[before]: condition for before, condition in after.items()}
                )
                jobs[name] = waiting.submit(new_code=new_code)
        except PomscaleError as error:
            raise InputError(f"stage {name}: {error}\n{_take_back(submitted)}") from error
        except KeyboardInterrupt:
            # Its job is there and on record before Ctrl-C comes through.
            if len(read_submissions(stage.prepared.job_folder)) > stage.prepared.num_before:
                submitted.append(stage)
            print(_take_back(submitted), file=sys.stderr)
            raise
        submitted.append(stage)
        write_pipeline(plan.folder, plan.pipeline({stage.record.name for stage in submitted}))
    return jobs


def _raise_failure(stages: Sequence[PlannedStage]) -> None:
    """Debug jobs are over when they have been submitted."""
    for stage in stages:
        verdict = final_verdict(Path(stage.record.job_folder))
        if verdict is not None and not is_success(verdict):
            raise PomscaleError(
                f"stage {stage.record.name}: {verdict.reason}; see {verdict.log or stage.record.job_folder}"
            )


def _take_back(submitted: Sequence[PlannedStage]) -> str:
    """Cancel, the last first, so that none of them begins since the one before it has ended. What to tell people."""
    problems = []
    for stage in reversed(submitted):
        try:
            cancel(Path(stage.record.job_folder))
        except PomscaleError as problem:
            problems.append(f"stage {stage.record.name} could not be cancelled: {problem}; do it yourself")
    if not submitted:
        return "nothing was submitted"
    names = ", ".join(stage.record.name for stage in submitted)
    return "\n".join(problems or [f"nothing is left in the queue: {names} had been submitted, and were cancelled"])


# --- telling it ------------------------------------------------------------------------------------------------------


def _table(title: str, planned: Sequence[PlannedStage], jobs: Mapping[str, str]) -> str:
    head = ["stage", "job", "waits for", "runs on", "limit", "what"]
    rows = [[*_cells(stage, jobs)] for stage in planned]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


def _cells(stage: PlannedStage, jobs: Mapping[str, str]) -> list[str]:
    waits_for = ", ".join(
        name if condition == "ok" else f"{name} (however it ends)" for name, condition in stage.record.after.items()
    )
    config = stage.config
    what = shlex.join([config.recipe, *config.overrides]) if config.recipe else "; ".join(config.run)
    job = jobs.get(stage.record.name) or (stage.state if stage.prepared is None else "-")
    return [stage.record.name, job, waits_for or "-", _size(stage), _limit(stage), what]


def _size(stage: PlannedStage) -> str:
    if stage.prepared is None:
        return "-"
    spec, tasks = stage.prepared.spec, stage.prepared.array
    nodes = f"{spec.num_nodes} x {spec.ranks_per_node}"
    return f"{tasks} tasks of {nodes}" if tasks else nodes


def _limit(stage: PlannedStage) -> str:
    if stage.prepared is None or stage.prepared.profile.scheduler != "slurm":
        return "-"
    return stage.prepared.time_limit or stage.prepared.profile.time_limit or "-"
