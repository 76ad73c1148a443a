"""The job script: made from a job and a cluster profile by submitit's SlurmExecutor."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from launch.record.job import Condition, JobSpec
from pomscale.base.errors import InputError
from pomscale.base.installation import slurm_folder
from pomscale.config.cluster import ClusterProfile, ContainerConfig, expanded, minutes_of
from pomscale.runs.layout import CODE_FOLDER, SUBMITIT_FOLDER

_DEPENDENCIES: dict[Condition, str] = {"ok": "afterok", "any": "afterany"}


@dataclass(frozen=True)
class SubmitOptions:
    """Options of one submission of a job.

    time_limit, gpus_per_node: replace the profile's. after: the condition by id, for SLURM jobs to wait for. array:
    number of tasks that share the work. exclude: hosts to avoid.
    """

    time_limit: str | None = None
    after: Mapping[str, Condition] = field(default_factory=dict)
    array: int | None = None
    gpus_per_node: int | None = None
    exclude: Sequence[str] = ()


def slurm_executor(spec: JobSpec, profile: ClusterProfile, options: SubmitOptions) -> _Executor:
    """Return an executor that is ready to submit. It has written nothing yet, and needs no SLURM on this machine.

    InputError for a job folder whose path SLURM would change.
    """
    if "%" in spec.job_folder:
        raise InputError(f"{spec.job_folder}: SLURM replaces % and what follows; choose a path without it")
    python = _python(profile, has_gpus=_num_gpus(profile, options) > 0)
    executor = _Executor(Path(spec.job_folder) / SUBMITIT_FOLDER, python=python)
    executor.update_parameters(**_resources(spec, profile, options), **_options(spec, profile, options))
    return executor


def job_script(spec: JobSpec, profile: ClusterProfile, options: SubmitOptions) -> str:
    """Return the text of the job script."""
    executor = slurm_executor(spec, profile, options)
    if options.array is not None and options.array > 1:
        executor.parameters["map_count"] = options.array
    return executor.script()


class _Executor(SlurmExecutor):
    """Executor that also works where there is no srun, as for a dry run on a laptop; submitit's refuses that."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def _num_gpus(profile: ClusterProfile, options: SubmitOptions) -> int:
    return profile.gpus_per_node if options.gpus_per_node is None else options.gpus_per_node


def _resources(spec: JobSpec, profile: ClusterProfile, options: SubmitOptions) -> dict[str, Any]:
    """Return the resources of a node. A job that uses a share of its GPUs gets the same share of cores and memory."""
    num_gpus = _num_gpus(profile, options)
    share = num_gpus / profile.gpus_per_node if num_gpus and profile.gpus_per_node else 1.0
    tasks_per_node = spec.ranks_per_node if spec.ranks_by == "srun" else 1
    limit = options.time_limit or profile.time_limit
    assert limit is not None  # ClusterProfile asks for one
    return {
        "nodes": spec.num_nodes,
        "ntasks_per_node": tasks_per_node,
        "cpus_per_task": max(1, int(profile.cpus_per_node * share) // tasks_per_node),
        "gpus_per_node": num_gpus or None,
        "mem": None if profile.memory_gib is None else f"{int(profile.memory_gib * share * 1024)}M",
        "exclusive": (profile.exclusive and share == 1.0) or None,
        "time": minutes_of(limit),
        "signal_delay_s": profile.signal_lead_s,
    }


def _options(spec: JobSpec, profile: ClusterProfile, options: SubmitOptions) -> dict[str, Any]:
    further: dict[str, Any] = {"requeue": True}
    if options.after:
        further["kill-on-invalid-dep"] = "yes"
    for name, value in profile.sbatch.items():
        further.pop(name.removeprefix("no-") if name.startswith("no-") else f"no-{name}", None)  # sbatch takes the last
        further[name] = value or True
    dependencies = (f"{_DEPENDENCIES[condition]}:{job_id}" for job_id, condition in options.after.items())
    return {
        "job_name": spec.name,
        "partition": profile.partition,
        "account": None if profile.account is None else expanded(profile.account, "account"),
        "qos": profile.qos,
        "constraint": profile.constraint,
        "wckey": profile.wckey,  # submitit's own default is refused by sites that check
        "exclude": ",".join(options.exclude) or None,
        "dependency": ",".join(dependencies) or None,
        "setup": _setup(spec, profile),
        "teardown": _end(spec),
        "srun_args": _srun(spec, profile, options),
        "array_parallelism": max_parallel_tasks(profile, options.array),  # submitit's own default is 256
        "stderr_to_stdout": True,
        "additional_parameters": further,
    }


def max_parallel_tasks(profile: ClusterProfile, array: int | None) -> int:
    """Return how many tasks of an array may run at once: all, unless the profile has a limit."""
    return min(array or 1, profile.max_array_tasks or array or 1)


def _srun(spec: JobSpec, profile: ClusterProfile, options: SubmitOptions) -> list[str]:
    # srun does not take the cores per task from sbatch everywhere, and one core would starve the reader threads.
    # --export: a site, or a user, may have told sbatch or srun to export nothing (SBATCH_EXPORT, SLURM_EXPORT_ENV); the
    # ranks need what this script has set.
    cpus_per_task = _resources(spec, profile, options)["cpus_per_task"]
    words = ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus_per_task}", "--export=ALL"]
    container = profile.container
    if container is not None and container.kind == "pyxis":
        words.append(f"--container-image={expanded(container.image, 'container.image')}")
        if container.mounts:
            words.append(f"--container-mounts={_mounts(container)}")
        words += container.options
    return words + profile.srun


def _python(profile: ClusterProfile, *, has_gpus: bool) -> str:
    """Return the command that starts Python on a node, quoted for the shell."""
    container = profile.container
    if container is None:
        return shlex.quote(sys.executable if profile.python is None else expanded(profile.python, "python"))
    if container.kind == "pyxis":
        return shlex.quote(container.python)
    words = ["apptainer", "exec", *(["--nv"] if has_gpus else [])]
    if container.mounts:
        words += ["--bind", _mounts(container)]
    return shlex.join([*words, *container.options, expanded(container.image, "container.image"), container.python])


def _mounts(container: ContainerConfig) -> str:
    return expanded(",".join(container.mounts), "container.mounts")


def _end(spec: JobSpec) -> list[str]:
    """Return the lines after srun: they carry out the verdict, and the script ends with srun's exit code."""
    text = (slurm_folder() / "requeue.sh").read_text(encoding="utf-8")
    function = [line for line in text.splitlines() if not line.startswith("#")]
    return ["code=$?", *function, f'pomscale_end "$code" {shlex.quote(spec.job_folder)}']


def _setup(spec: JobSpec, profile: ClusterProfile) -> list[str]:
    """Return the lines before srun, which passes the variables that they set to the ranks."""
    lines = []
    if profile.modules:
        lines += ["command -v module > /dev/null || source /etc/profile", "module purge"]
        lines += [f"module load {module} || exit 1" for module in profile.modules]
    lines += [*profile.setup, "set +e"] if profile.setup else []  # else a rank that fails would skip the end of the job
    code = Path(spec.job_folder) / CODE_FOLDER
    lines.append(f"if [ -d {shlex.quote(str(code))} ]; then")
    lines.append(f"  export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1")
    lines.append("fi")
    if profile.local_disk is not None:
        lines.append(f'export TMPDIR="{profile.local_disk}"')  # a variable in it is expanded on the node
    return lines + [f"export {name}={shlex.quote(value)}" for name, value in spec.environment.items()]
