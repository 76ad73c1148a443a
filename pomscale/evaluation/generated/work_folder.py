"""The folder that processes share while they measure, so that a killed evaluation continues.

WORK/plan.json                  everything that decides the figures: parts of another plan are refused
WORK/claims                     empty: byte N is locked by the process that measures part N
WORK/parts/SIDE-000007.npz      sums of part 7 of SIDE, "source" or "reference"
WORK/parts/SIDE-000007.KEY.npy  its features, where a metric needs all of them
WORK/parts/SIDE-000007.pixels   its pictures as bytes, where an npz file is to be written
WORK/parts/SIDE-000007.json     the record: written last, so a part that has one is whole
WORK/failures.jsonl             pictures that could not be read
WORK/result.json                the result; the parts are deleted once it is there
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import atomic_write, make_folder, write_text
from pomscale.evaluation.generated.metric_choice import Want
from pomscale.evaluation.generated.sums import Arrays, Sum, pack, unpack

Side = Literal["source", "reference"]

PLAN, RESULT, FAILURES = "plan.json", "result.json", "failures.jsonl"
_PARTS = "parts"


@dataclass(frozen=True)
class PartRecord:
    """Facts of a measured part.

    Attributes:
        count: Pictures that were measured.
        sha256: Hash (hex) of their numbers and bytes, see `pictures_hash.add_hashes`.
        labels: Number of pictures by class; empty without classes.
        failures: (name, reason) of the pictures that could not be read.
    """

    count: int
    sha256: str
    labels: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)


class PartFiles:
    """The files of the parts of one side."""

    def __init__(self, work: Path, side: Side) -> None:
        self._folder = work / _PARTS
        self._side = side

    def pixels(self, part: int) -> Path:
        """Return the path of a part's pictures."""
        return self._path(part, "pixels")

    def is_done(self, part: int) -> bool:
        return self._path(part, "json").exists()

    def commit(
        self, part: int, record: PartRecord, sums: Mapping[Want, Sum], features: Mapping[Want, np.ndarray], more: Arrays
    ) -> None:
        """Write the files of a part; `more` are arrays beside the sums."""
        for want, array in features.items():
            with atomic_write(self._path(part, f"{want.key}.npy")) as stream:
                np.save(stream, array, allow_pickle=False)
        with atomic_write(self._path(part, "npz")) as stream:
            np.savez(stream, **pack(sums), **more)  # type: ignore[arg-type]
        write_text(self._path(part, "json"), json.dumps(asdict(record)))

    def record(self, part: int) -> PartRecord:
        """Return the record of a part that is done."""
        found = json.loads(self._path(part, "json").read_text(encoding="utf-8"))
        return PartRecord(**found)

    def sums(self, part: int, wants: Sequence[Want]) -> dict[Want, Sum]:
        """Return the sums of a part that is done."""
        return unpack(self._arrays(part), wants)

    def labels(self, parts: Sequence[int]) -> np.ndarray | None:
        """Return the classes of the pictures of some parts (n,), or None if they have none."""
        found = [labels for part in parts if (labels := self._arrays(part).get("labels")) is not None]
        return np.concatenate(found) if found else None

    def features(self, part: int, want: Want) -> np.ndarray:
        """Return the features of a part that has pictures (b, d), memory-mapped. PomscaleError if they are damaged."""
        path = self._path(part, f"{want.key}.npy")
        try:
            found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(part, path, error) from error
        return found

    def _arrays(self, part: int) -> dict[str, np.ndarray]:
        path = self._path(part, "npz")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise self._damaged(part, path, error) from error

    def _damaged(self, part: int, path: Path, error: Exception) -> PomscaleError:
        return PomscaleError(f"{path}: cannot be read: {error}; delete {self._path(part, 'json')} and run again")

    def _path(self, part: int, suffix: str) -> Path:
        return self._folder / f"{self._side}-{part:06d}.{suffix}"


def adopt(work: Path, plan: Mapping[str, Any]) -> None:
    """Bind the folder to a plan. InputError, naming what differs, if it has another one.

    Only one process at a time may be in here.
    """
    path = work / PLAN
    text = json.dumps(plan, indent=1, sort_keys=True)
    if not path.exists():
        write_text(path, text)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is damaged; delete {work}, or choose another --work") from error
    differing = [key for key in {**found, **plan} if found.get(key) != json.loads(text).get(key)]
    if differing:
        raise InputError(
            f"--work {work}: holds parts of an evaluation with another {', '.join(sorted(differing))} (see {path}); "
            f"choose another folder, or delete this one"
        )


def make_parts_folder(work: Path) -> None:
    """Make the folder of the parts, which is not there where somebody has deleted a result, to measure again."""
    make_folder(work / _PARTS)


def drop_parts(work: Path) -> None:
    """Delete the parts, once there is a result."""
    shutil.rmtree(work / _PARTS, ignore_errors=True)
