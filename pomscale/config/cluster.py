"""Cluster profiles, slurm/clusters/NAME.yaml: all that `pomscale launch --cluster NAME` knows about a cluster."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pomscale.base.errors import InputError
from pomscale.config.section import PositiveFloat, Section, Text

# 20:00 is refused, since SLURM takes it for 20 minutes.
_TIME_LIMIT = r"^(\d+-\d{1,2}:\d{2}(:\d{2})?|\d{1,3}:\d{2}:\d{2})$"

TimeLimit = Annotated[str, Field(pattern=_TIME_LIMIT, description="HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES.")]


def is_time_limit(text: str) -> bool:
    return re.match(_TIME_LIMIT, text) is not None


def minutes_of(limit: str) -> int:
    """Return the minutes of a TimeLimit, rounded up."""
    days, _, rest = limit.rpartition("-")
    hours, minutes, seconds = (*map(int, rest.split(":")), 0)[:3]
    return int(days or 0) * 1440 + hours * 60 + minutes + (seconds > 0)


# Fields that only SLURM, or its job script, acts on.
_OF_SLURM = (
    "partition", "account", "qos", "constraint", "wckey", "exclusive", "sbatch", "srun", "memory_gib", "time_limit",
    "modules", "setup", "container", "max_array_tasks",
)  # fmt: skip


_SAID_BY_FIELDS = ("partition", "account", "qos", "constraint", "wckey", "time_limit")


def expanded(text: str, key: str) -> str:
    """Return `text` with the $VARIABLES of this process filled in.

    Raises InputError, which names the profile's key, for a variable that is not set.
    """
    found = os.path.expandvars(text)
    if "$" in found:
        raise InputError(f"{key}: {found}: this variable is not set here; set it, or write the value into the profile")
    return found


class ContainerConfig(Section):
    """Image of a container in which every rank runs."""

    kind: Literal["pyxis", "apptainer"]
    image: str = Field(description="pyxis: as --container-image takes it; apptainer: path of the .sif file.")
    mounts: list[str] = Field([], description="HOST:CONTAINER; the folder of the run must be among them or be there.")
    options: list[str] = Field([], description="Further words for srun (pyxis) or `apptainer exec`.")
    python: str = Field("python", description="Interpreter inside the image.")


def _check_export(srun: Sequence[str]) -> None:
    """Raise ValueError if srun would keep from the ranks what the job script sets."""
    for word, following in pairwise([*srun, ""]):
        name, equals, exported = word.partition("=")
        exported = exported if equals else following
        if name == "--export" and "ALL" not in exported.split(","):
            raise ValueError(
                f"srun: --export={exported}: the ranks need what the job script sets; write --export=ALL,NAME=VALUE"
            )


def _check_sbatch(profile: ClusterProfile) -> None:
    """Raise ValueError if `sbatch` says again what has a field or an option of its own: sbatch would take the last."""
    for name in profile.sbatch:
        field = {"time": "time_limit"}.get(name, name)
        if name in ("array", "nodes"):
            raise ValueError(f"sbatch.{name}: leave it out; `pomscale launch --{name}` says how many")
        if field in _SAID_BY_FIELDS and getattr(profile, field) is not None:
            raise ValueError(
                f"sbatch.{name}: {field} says it already, {getattr(profile, field)!r}; leave one of them out"
            )


class ClusterProfile(Section):
    """Resources that jobs ask for on one cluster, and the environment that they find there."""

    kind: Literal["cluster"]
    scheduler: Literal["slurm", "local", "debug"] = Field(
        description="local: processes on this machine, in the background; debug: the same, in the foreground."
    )
    description: str = ""

    partition: str | None = None
    account: str | None = Field(None, description="Account to charge; $VARIABLES are filled in.")
    qos: str | None = None
    constraint: str | None = None
    wckey: str | None = None
    exclusive: bool = Field(False, description="Ask for whole nodes.")
    sbatch: dict[str, Text] = Field({}, description="Further options of sbatch, without the dashes; empty = no value.")
    srun: list[str] = Field([], description="Further words for srun.")

    gpus_per_node: NonNegativeInt = Field(
        description="GPUs of a node; 0 = train on CPUs. local: at most this machine's."
    )
    gpu: Literal["a100", "h100", "h200"] | None = Field(None, description="Kind of GPU; null = memory is not planned.")
    cpus_per_node: PositiveInt = Field(description="Cores of a job on each node, shared by its ranks.")
    memory_gib: PositiveFloat | None = Field(None, description="Memory per node; null = the scheduler's default.")
    ranks_per_node: PositiveInt | None = Field(None, description="Ranks per node; null = one per GPU.")
    ranks_by: Literal["srun", "torchrun"] = Field(
        "srun", description="srun: one task per rank. torchrun: one task per node, which starts its ranks."
    )

    max_array_tasks: PositiveInt | None = Field(
        None, description="Tasks of an array that may run at once; null = all that --array asks for."
    )
    time_limit: TimeLimit | None = Field(None, description="Time limit of a job without --time. SLURM needs one.")
    signal_lead_s: PositiveInt = Field(180, description="Time before the limit, to save and stop.")
    max_idle_requeues: NonNegativeInt = Field(3, description="Starts in a row that may make no progress.")

    modules: list[str] = Field([], description="Modules to load, after `module purge`.")
    setup: list[str] = Field([], description="Lines of the job script before the ranks start.")
    python: str | None = Field(
        None, description="Interpreter on the nodes; $VARIABLES are filled in; null = that of this command."
    )
    container: ContainerConfig | None = None
    environment: dict[str, Text] = Field({}, description="Variables of every rank, e.g. NCCL_DEBUG.")
    network_interface: str | None = Field(
        None, description="Network between nodes: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME."
    )

    scratch: str | None = Field(None, description="Shared folder for relative outputs; $VARIABLES are filled in.")
    local_disk: str | None = Field(
        None, description="Disk of each node: TMPDIR of the ranks; $VARIABLES are filled in."
    )
    offline: bool = Field(False, description="Nodes without internet: wandb offline, `pomscale runs sync` afterwards.")

    @model_validator(mode="after")
    def _check(self) -> ClusterProfile:
        if self.scheduler != "slurm":
            for key in _OF_SLURM:
                if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                    raise ValueError(f"{key}: means nothing without SLURM; leave it out, or set it to null")
        if self.scheduler == "slurm" and self.time_limit is None:
            raise ValueError("time_limit: missing; a SLURM job needs one")
        if self.gpus_per_node == 0 and self.ranks_per_node is None:
            raise ValueError("ranks_per_node: missing; it follows gpus_per_node only where there are GPUs")
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ValueError("ranks_per_node: a rank has one GPU; leave it out, or change gpus_per_node")
        if self.cpus_per_node < self.num_ranks_per_node:
            raise ValueError(
                f"cpus_per_node: {self.cpus_per_node} cores are not enough for {self.num_ranks_per_node} ranks"
            )
        if self.scheduler == "slurm" and minutes_of(self.time_limit or "") * 60 <= self.signal_lead_s:
            raise ValueError("signal_lead_s: not shorter than time_limit, so a job would stop as soon as it starts")
        _check_export(self.srun)
        _check_sbatch(self)
        if self.container is not None and self.python is not None:
            raise ValueError("python: in a container it is container.python that counts")
        return self

    @property
    def num_ranks_per_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node
