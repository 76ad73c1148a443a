"""Findings of `pomscale cluster check` on the nodes: cluster_probe writes them, the login node reads them. No torch.

FOLDER/rank-00000.json      findings of one rank alone (RankFacts)
FOLDER/world.json           findings of all ranks together (WorldFacts), by rank 0
FOLDER/ready-00000          the rank waits for a signal
FOLDER/signal-00000         the signal has reached the rank
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from pomscale.base.files import write_text

WORLD_FILE = "world.json"


class _Kept:
    def keep(self, path: Path) -> None:
        """Write the findings as JSON. Raises PomscaleError if that is impossible."""
        write_text(path, json.dumps(asdict(self)))  # type: ignore[call-overload]

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class RankFacts(_Kept):
    """Findings of one rank alone.

    Attributes:
        rank: number of the rank.
        node: name of its node.
        python: version of Python.
        executable: path of the Python interpreter.
        torch: version of torch.
        nccl: version of NCCL; None without a GPU.
        gpu: name and identity of the GPU that this rank would use.
        num_gpus: GPUs that the process sees.
        num_cores: cores that the process may run on.
        interfaces: names of the network interfaces.
        folders: purpose -> path of the folders that runs write into. This field and those after it are filled in by
            the first rank of each node.
        write_gb_per_s: purpose -> speed at which a file is written and made durable there.
        cannot_write: purpose -> why nothing can be written there.
        internet: servers that did not answer; None if all did, or if none was asked.
    """

    rank: int
    node: str
    python: str
    executable: str
    torch: str
    nccl: str | None
    gpu: tuple[str, str] | None
    num_gpus: int
    num_cores: int
    interfaces: list[str]
    folders: dict[str, str] = field(default_factory=dict)
    write_gb_per_s: dict[str, float] = field(default_factory=dict)
    cannot_write: dict[str, str] = field(default_factory=dict)
    internet: str | None = None


@dataclass(frozen=True)
class WorldFacts(_Kept):
    """Findings of all ranks together.

    Attributes:
        num_ranks: number of ranks.
        join_s: seconds until all ranks had found each other.
        problem: what makes a run impossible; None if nothing does.
        warnings: ranks that are slow.
        matmul_tflops: TFLOP/s of the median and of the slowest rank; empty if there is a problem.
        across_gb_per_s: bus bandwidth of an all-reduce among all ranks; None on one node.
        inside_gb_per_s: node -> bus bandwidth of an all-reduce among its ranks.
        seen_after_s: node -> longest time until it sees a file that another node has written; None if it never does.
        clock_s: node -> seconds that its clock is ahead of the clock of rank 0.
    """

    num_ranks: int
    join_s: float
    problem: str | None
    warnings: list[str]
    matmul_tflops: list[float]
    across_gb_per_s: float | None
    inside_gb_per_s: dict[str, float]
    seen_after_s: dict[str, float | None]
    clock_s: dict[str, float]


def rank_path(folder: Path, rank: int) -> Path:
    """Findings of a rank alone."""
    return folder / f"rank-{rank:05d}.json"


def ready_path(folder: Path, rank: int) -> Path:
    """Mark of a rank that waits for a signal."""
    return folder / f"ready-{rank:05d}"


def signal_path(folder: Path, rank: int) -> Path:
    """Mark of a rank that a signal has reached."""
    return folder / f"signal-{rank:05d}"


def rank_facts(folder: Path) -> dict[int, RankFacts]:
    """Return the findings of the ranks that have written theirs so far, by rank."""
    facts: list[Any] = [RankFacts.read(path) for path in sorted(folder.glob("rank-*.json"))]
    return {one.rank: one for one in facts}


def world_facts(folder: Path) -> WorldFacts | None:
    """Return the findings of all ranks together; None as long as the ranks have not found each other."""
    path = folder / WORLD_FILE
    return WorldFacts.read(path) if path.is_file() else None
