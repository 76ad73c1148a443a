"""A job and a cluster profile -> submitit's SlurmExecutor, and with it the job script."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from submitit import SlurmExecutor

from launch.record.job import CODE, SUBMITIT, JobSpec
from pomscale.base.errors import InputError
from pomscale.base.installation import slurm_folder
from pomscale.config.cluster import ClusterProfile, ContainerConfig, expanded, minutes_of

Condition = Literal["ok", "any"]

_DEPENDENCIES: dict[Condition, str] = {"ok": "afterok", "any": "afterany"}


@dataclass(frozen=True)
class Wish:
    """What one submission asks for beside the job itself.

    time_limit, gpus_per_node: instead of the profile's. after: SLURM jobs that must have ended before ("ok": well).
    array: so many tasks, which share the work. exclude: hosts to avoid.
    """

    time_limit: str | None = None
    after: Mapping[str, Condition] = field(default_factory=dict)
    array: int | None = None
    gpus_per_node: int | None = None
    exclude: Sequence[str] = ()


def slurm_executor(spec: JobSpec, profile: ClusterProfile, wish: Wish) -> _Executor:
    """Ready to submit. Writes nothing yet, and needs no SLURM here. InputError for a home that SLURM cannot name."""
    if "%" in spec.home:
        raise InputError(f"{spec.home}: SLURM puts other things in the place of %; choose a path without it")
    executor = _Executor(Path(spec.home) / SUBMITIT, python=_python(profile, has_gpus=_num_gpus(profile, wish) > 0))
    executor.update_parameters(**_resources(spec, profile, wish), **_options(spec, profile, wish))
    return executor


def job_script(spec: JobSpec, profile: ClusterProfile, wish: Wish) -> str:
    """The text that sbatch is given."""
    executor = slurm_executor(spec, profile, wish)
    if wish.array is not None and wish.array > 1:
        executor.parameters["map_count"] = wish.array
    return executor.script()


class _Executor(SlurmExecutor):
    """submitit's refuses to be where there is no srun: a dry run on a laptop needs none."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def _num_gpus(profile: ClusterProfile, wish: Wish) -> int:
    return profile.gpus_per_node if wish.gpus_per_node is None else wish.gpus_per_node


def _resources(spec: JobSpec, profile: ClusterProfile, wish: Wish) -> dict[str, Any]:
    """Of a node with only some of its GPUs, the same share of cores and memory."""
    num_gpus = _num_gpus(profile, wish)
    share = num_gpus / profile.gpus_per_node if num_gpus and profile.gpus_per_node else 1.0
    tasks_per_node = spec.ranks_per_node if spec.ranks_by == "srun" else 1
    limit = wish.time_limit or profile.time_limit
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


def _options(spec: JobSpec, profile: ClusterProfile, wish: Wish) -> dict[str, Any]:
    further: dict[str, Any] = {"requeue": True}
    if wish.after:
        further["kill-on-invalid-dep"] = "yes"
    further |= {name: value or True for name, value in profile.sbatch.items()}
    dependencies = (f"{_DEPENDENCIES[condition]}:{job_id}" for job_id, condition in wish.after.items())
    return {
        "job_name": spec.name,
        "partition": profile.partition,
        "account": None if profile.account is None else expanded(profile.account, "account"),
        "qos": profile.qos,
        "constraint": profile.constraint,
        "wckey": profile.wckey,  # submitit's own default is refused by sites that check
        "exclude": ",".join(wish.exclude) or None,
        "dependency": ",".join(dependencies) or None,
        "setup": _setup(spec, profile),
        "teardown": _end(spec),
        "srun_args": _srun(spec, profile, wish),
        "stderr_to_stdout": True,
        "additional_parameters": further,
    }


def _srun(spec: JobSpec, profile: ClusterProfile, wish: Wish) -> list[str]:
    # srun does not take the cores per task from sbatch everywhere, and one core would starve the reader threads.
    words = ["--kill-on-bad-exit=1", f"--cpus-per-task={_resources(spec, profile, wish)['cpus_per_task']}"]
    container = profile.container
    if container is not None and container.kind == "pyxis":
        words.append(f"--container-image={expanded(container.image, 'container.image')}")
        if container.mounts:
            words.append(f"--container-mounts={_mounts(container)}")
        words += container.options
    return words + profile.srun


def _python(profile: ClusterProfile, *, has_gpus: bool) -> str:
    """The command that starts Python on a node, as the shell reads it."""
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
    """Lines behind srun: what the supervisor has decided is done, and the script ends with srun's exit code."""
    text = (slurm_folder() / "requeue.sh").read_text(encoding="utf-8")
    function = [line for line in text.splitlines() if not line.startswith("#")]
    return ["code=$?", *function, f'pomscale_end "$code" {shlex.quote(spec.home)}']


def _setup(spec: JobSpec, profile: ClusterProfile) -> list[str]:
    """Lines before srun, which hands the variables on to the ranks."""
    lines = []
    if profile.modules:
        lines += ["command -v module > /dev/null || source /etc/profile", "module purge"]
        lines += [f"module load {module} || exit 1" for module in profile.modules]
    lines += [*profile.setup, "set +e"] if profile.setup else []  # or a rank that fails would skip what ends the job
    code = Path(spec.home) / CODE
    lines.append(f"if [ -d {shlex.quote(str(code))} ]; then")
    lines.append(f"  export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1")
    lines.append("fi")
    if profile.local_disk is not None:
        lines.append(f'export TMPDIR="{profile.local_disk}"')  # a variable in it is that of the node
    return lines + [f"export {name}={shlex.quote(value)}" for name, value in spec.environment.items()]
