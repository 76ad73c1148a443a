"""A cluster as data: what `pomscale launch --cluster NAME` needs to know of it. slurm/clusters/NAME.yaml."""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pomscale.base.errors import InputError
from pomscale.config.section import PositiveFloat, Section

# Not 20:00, which SLURM takes for 20 minutes.
_TIME_LIMIT = r"^(\d+-\d{1,2}:\d{2}(:\d{2})?|\d{1,3}:\d{2}:\d{2})$"

TimeLimit = Annotated[str, Field(pattern=_TIME_LIMIT, description="HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES.")]


def is_time_limit(text: str) -> bool:
    return re.match(_TIME_LIMIT, text) is not None


def minutes_of(limit: str) -> int:
    """Of a TimeLimit, rounded up."""
    days, _, rest = limit.rpartition("-")
    hours, minutes, seconds = (*map(int, rest.split(":")), 0)[:3]
    return int(days or 0) * 1440 + hours * 60 + minutes + (seconds > 0)


# What only SLURM, or its job script, would do anything about.
_OF_SLURM = (
    "partition", "account", "qos", "constraint", "wckey", "exclusive", "sbatch", "srun", "memory_gib", "time_limit",
    "modules", "setup", "container",
)  # fmt: skip


def expanded(text: str, key: str) -> str:
    """With the $VARIABLES of this process. InputError, naming the profile's key, for one that is not set."""
    found = os.path.expandvars(text)
    if "$" in found:
        raise InputError(f"{key}: {found}: this variable is not set here; set it, or write the value into the profile")
    return found


class ContainerConfig(Section):
    """Every rank runs inside an image."""

    kind: Literal["pyxis", "apptainer"]
    image: str = Field(description="pyxis: as --container-image takes it; apptainer: path of the .sif file.")
    mounts: list[str] = Field([], description="HOST:CONTAINER; the folder of the run must be among them or be there.")
    options: list[str] = Field([], description="Further words for srun (pyxis) or `apptainer exec`.")
    python: str = Field("python", description="The interpreter inside the image.")


class ClusterProfile(Section):
    """How jobs are asked for on one cluster, and what they find there."""

    kind: Literal["cluster"]
    scheduler: Literal["slurm", "local", "debug"] = Field(
        description="local: processes on this machine, in the background; debug: the same, in the foreground."
    )
    description: str = ""

    partition: str | None = None
    account: str | None = Field(None, description="$VARIABLES count.")
    qos: str | None = None
    constraint: str | None = None
    wckey: str | None = None
    exclusive: bool = Field(False, description="Ask for whole nodes.")
    sbatch: dict[str, str] = Field({}, description="Further options of sbatch, without the dashes; '' = no value.")
    srun: list[str] = Field([], description="Further words for srun.")

    gpus_per_node: NonNegativeInt = Field(description="0 = train on CPUs. local: those of this machine at most.")
    gpu: Literal["a100", "h100", "h200"] | None = Field(None, description="For the plan; null = no plan of memory.")
    cpus_per_node: PositiveInt = Field(description="Cores that a job gets on a node; shared by its ranks.")
    memory_gib: PositiveFloat | None = Field(None, description="Per node; null = what the scheduler gives by itself.")
    ranks_per_node: PositiveInt | None = Field(None, description="null: one per GPU; needed where there are none.")
    ranks_by: Literal["srun", "torchrun"] = Field(
        "srun", description="srun: one task per rank. torchrun: one task per node, which starts its ranks."
    )

    time_limit: TimeLimit | None = Field(None, description="Of a job, unless --time says otherwise. SLURM needs one.")
    signal_lead_s: PositiveInt = Field(180, description="Before the time limit, to save and stop.")
    max_idle_requeues: NonNegativeInt = Field(3, description="Starts in a row that may make no progress.")

    modules: list[str] = Field([], description="For `module load`, after `module purge`.")
    setup: list[str] = Field([], description="Lines of the job script before the ranks start.")
    python: str | None = Field(
        None, description="Interpreter on the nodes; $VARIABLES count; null = that of this command."
    )
    container: ContainerConfig | None = None
    environment: dict[str, str] = Field({}, description="Variables of every rank, e.g. NCCL_DEBUG.")
    network_interface: str | None = Field(None, description="Between nodes: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME.")

    scratch: str | None = Field(None, description="Shared folder for relative outputs. $VARIABLES count.")
    local_disk: str | None = Field(None, description="Disk of each node: TMPDIR of the ranks. $VARIABLES count.")
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
        if self.container is not None and self.python is not None:
            raise ValueError("python: in a container it is container.python that counts")
        return self

    @property
    def num_ranks_per_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node
