"""What `pomscale cluster check` finds on the nodes: written there by cluster_probe, read on the login node. No torch.

FOLDER/rank-00000.json      a rank alone (RankFacts)
FOLDER/world.json           all ranks together (WorldFacts), by rank 0
FOLDER/ready-00000          the rank waits for a signal
FOLDER/signal-00000         it came
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
        """PomscaleError if it cannot be written."""
        write_text(path, json.dumps(asdict(self)))  # type: ignore[call-overload]

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class RankFacts(_Kept):
    """gpu: name and identity of the one that this rank would use. num_cores: that it may run on. folders: what they
    are for -> where; how fast a file is made durable there, or why it cannot be. internet: what did not answer; None
    if all did, or if nothing was asked. The last four are of the first rank of each node.
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
    """problem: what makes a run impossible. warnings: ranks that are slow. matmul_tflops: median and slowest rank.

    inside_gb_per_s: of an all-reduce among the ranks of each node. across_gb_per_s: among all; None on one node.
    seen_after_s: until a file that another node has written is seen, the longest of each node; None if it never is.
    clock_s: ahead of the clock of rank 0.
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
    return folder / f"rank-{rank:05d}.json"


def ready_path(folder: Path, rank: int) -> Path:
    return folder / f"ready-{rank:05d}"


def signal_path(folder: Path, rank: int) -> Path:
    return folder / f"signal-{rank:05d}"


def rank_facts(folder: Path) -> dict[int, RankFacts]:
    """Of the ranks that have told so far."""
    facts: list[Any] = [RankFacts.read(path) for path in sorted(folder.glob("rank-*.json"))]
    return {one.rank: one for one in facts}


def world_facts(folder: Path) -> WorldFacts | None:
    """None as long as the ranks have not found together."""
    path = folder / WORLD_FILE
    return WorldFacts.read(path) if path.is_file() else None
