"""Launch of a pipeline: each of its stages is a job that waits for those before it.

    OUTPUT/NAME/pipeline.json     the stages: their job folders, what they wait for, what they were made from
    OUTPUT/NAME/STAGE/            job folder of a stage; a stage that trains has its run folder instead

The id of a stage's job, and how it ended, are in the stage's job folder. Launching again continues the pipeline: stages
that have succeeded are left alone, and so are those that still wait or run.
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
from launch.status.table import shell_path, table
from launch.submission.control import cancel
from launch.submission.prepare import JobRequest, resolved_output
from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.pipeline import PipelineRecipe


def launch_pipeline(
    recipe: PipelineRecipe,
    path: Path,
    request: JobRequest,
    check_command: Callable[[list[str]], None],
    *,
    new_code: bool = False,
) -> tuple[str, list[str]]:
    """Submit the stages that are not done. Return lines for the user, and for a dry run what would be refused.

    All stages are checked before the first is submitted. If one is refused, those submitted before it are cancelled.

    Args:
        recipe: The pipeline.
        path: File of the recipe; recipes of its stages are relative to it.
        request: Cluster, command line, whether to submit at all; each stage says the rest for itself.
        check_command: Raises InputError for words that are no command of pomscale.
        new_code: See Prepared.submit.

    Raises:
        InputError: Naming the stage, if anything is wrong with one.
        PomscaleError: If jobs run in the foreground and one fails.
    """
    profile, cluster_name = request.profile, request.cluster_name
    folder = resolved_output(recipe.output, profile) / recipe.name
    plan = PipelinePlan(recipe, path, folder, request, check_command)
    planned = [plan.add(stage) for stage in recipe.stages]
    if request.dry_run:
        shown = _stage_table(f"pipeline {recipe.name} on {cluster_name}, not submitted", planned, {})
        prepared = {stage.record.name: stage.prepared for stage in planned if stage.prepared is not None}
        return shown, [f"stage {name}: {refusal}" for name, one in prepared.items() for refusal in one.refusals]
    to_submit = [stage for stage in planned if stage.prepared is not None]
    if not to_submit:
        return _stage_table(f"pipeline {recipe.name}: nothing to submit", planned, {}), []
    for stage in planned:
        if stage.replaces is not None:
            slurm.cancel(stage.replaces)
    jobs = _submit(plan, planned, with_slurm=profile.scheduler == "slurm", new_code=new_code)
    if profile.scheduler == "debug":
        _raise_failure(to_submit)
    lines = [_stage_table(f"pipeline {recipe.name} on {cluster_name}: {folder}", planned, jobs)]
    lines += dict.fromkeys(note for stage in to_submit if stage.prepared is not None for note in stage.prepared.notes)
    first = shell_path(Path(to_submit[0].record.job_folder))
    lines += [
        f"next      pomscale runs {shell_path(folder)}",
        f"          pomscale runs logs {first} --follow",
        f"          pomscale runs cancel {first}    # and with it the stages that wait for it",
        f"          {shlex.join(request.command_line)}    # again: continues with the stages that are not done",
    ]
    return "\n".join(lines), []


def _submit(plan: PipelinePlan, planned: Sequence[PlannedStage], *, with_slurm: bool, new_code: bool) -> dict[str, str]:
    """Submit all new stages, or none. Return the job id by stage, for all stages that wait or run now."""
    jobs: dict[str, str] = {stage.record.name: stage.job_id for stage in planned if stage.job_id is not None}
    job_folders = {stage.record.name: stage.record.job_folder for stage in planned}
    submitted: list[PlannedStage] = []
    for stage in planned:
        if stage.prepared is None:
            continue
        name, after = stage.record.name, stage.record.after
        try:
            if with_slurm:
                # A stage that is done already has no job to wait for.
                conditions = {before: condition for before, condition in after.items() if before in jobs}
            else:
                conditions = after
            prepared = stage.prepared.waiting_for({job_folders[before]: one for before, one in conditions.items()})
            waits_for = {jobs[before]: one for before, one in conditions.items()} if with_slurm else None
            jobs[name] = prepared.submit(after=waits_for, new_code=new_code)
        except PomscaleError as error:
            raise InputError(f"stage {name}: {error}\n{_take_back(submitted)}") from error
        except KeyboardInterrupt:
            # If the job was submitted, it is on record before Ctrl-C has an effect.
            if len(read_submissions(stage.prepared.job_folder)) > stage.prepared.num_before:
                submitted.append(stage)
            print(_take_back(submitted), file=sys.stderr)
            raise
        submitted.append(stage)
        write_pipeline(plan.folder, plan.pipeline({stage.record.name for stage in submitted}))
    return jobs


def _raise_failure(stages: Sequence[PlannedStage]) -> None:
    """Raise PomscaleError for the first stage that has failed; debug jobs are over once they have been submitted."""
    for stage in stages:
        verdict = final_verdict(Path(stage.record.job_folder))
        if verdict is not None and not is_success(verdict):
            see = verdict.log or stage.record.job_folder
            raise PomscaleError(f"stage {stage.record.name}: {verdict.reason}; see {see}")


def _take_back(submitted: Sequence[PlannedStage]) -> str:
    """Cancel stages, the last first, so that none of them begins when the one before it ends. Return lines."""
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


def _stage_table(title: str, planned: Sequence[PlannedStage], jobs: Mapping[str, str]) -> str:
    lines = table(["stage", "job", "waits for", "runs on", "limit", "what"], [_cells(stage, jobs) for stage in planned])
    return "\n".join([title, *(f"  {line}" for line in lines.splitlines())])


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
    spec = stage.prepared.spec
    return f"{stage.prepared.tasks}{spec.num_nodes} x {spec.ranks_per_node}"


def _limit(stage: PlannedStage) -> str:
    if stage.prepared is None or stage.prepared.profile.scheduler != "slurm":
        return "-"
    return stage.prepared.time_limit or stage.prepared.profile.time_limit or "-"
