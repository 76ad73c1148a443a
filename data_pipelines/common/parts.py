"""What an encode keeps on disk while it runs: its plan, and one record per finished part.

OUTPUT/shard-000007.tar          committed first
OUTPUT/parts/part-000007.npy     index rows of the shard
OUTPUT/parts/part-000007.json    the record: committed last, so a part that has one is whole
OUTPUT/parts/plan.json           what all of this was made from
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipelines.common.files import atomic_write
from data_pipelines.common.statistics import ChannelStatistics
from pomscale.config.schema import ImageTransformConfig
from pomscale.data.schema import ShardInfo
from pomscale.errors import InputError


class Plan(BaseModel):
    """Everything that decides the bytes of the shards. Two encodes with equal plans may share an output folder.

    What is not here (paths, batch, threads, device) may change between the start of an encode and its resumption.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    source_fingerprint: str
    num_items: int
    shard_samples: int
    seed: int
    codec: dict[str, Any]
    codec_identity: str
    transform: ImageTransformConfig


class Failure(BaseModel):
    """One item that could not be encoded."""

    model_config = ConfigDict(frozen=True)

    key: str
    path: str
    reason: str


class PartRecord(BaseModel):
    """The outcome of one part. `shard` and `statistics` are null where every item failed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: ShardInfo | None
    statistics: ChannelStatistics | None
    failures: tuple[Failure, ...]


class PartStore:
    """The files of an encode in its output folder."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._folder = output / "parts"

    def claim(self, plan: Plan) -> None:
        """Makes the output folder this plan's. InputError, naming what differs, if it is another plan's."""
        path = self._folder / "plan.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output: cannot make the folder {self._folder}: {error}") from error
        if not path.exists():
            with atomic_write(path) as stream:
                stream.write(plan.model_dump_json(indent=2).encode())
            return
        try:
            found = Plan.model_validate_json(path.read_text())
        except ValidationError as error:
            raise InputError(f"{path} is damaged or of another version; {self._remedy()}") from error
        differences = [
            f"{name} is {getattr(found, name)} there and {getattr(plan, name)} here"
            for name in Plan.model_fields
            if getattr(found, name) != getattr(plan, name)
        ]
        if differences:
            raise InputError(
                f"output: {self.output} holds parts of another encode: {'; '.join(differences)}; {self._remedy()}"
            )

    def shard_path(self, part: int) -> Path:
        return self.output / f"shard-{part:06d}.tar"

    def commit(self, part: int, record: PartRecord, rows: np.ndarray) -> None:
        """Marks a part, whose shard already has its final name, as done."""
        with atomic_write(self._rows_path(part)) as stream:
            np.save(stream, rows)
        with atomic_write(self._record_path(part)) as stream:
            stream.write(record.model_dump_json(indent=2).encode())

    def read(self, part: int) -> PartRecord | None:
        """The record of a part; None if it is not done or its shard is missing or has another size."""
        path = self._record_path(part)
        if not path.exists():
            return None
        try:
            record = PartRecord.model_validate_json(path.read_text())
        except ValidationError as error:
            raise InputError(f"{path} is damaged; delete it and its part is encoded again") from error
        shard = self.shard_path(part)
        whole = record.shard is None or (shard.exists() and shard.stat().st_size == record.shard.num_bytes)
        return record if whole else None

    def read_rows(self, part: int) -> np.ndarray:
        return np.load(self._rows_path(part))

    def _record_path(self, part: int) -> Path:
        return self._folder / f"part-{part:06d}.json"

    def _rows_path(self, part: int) -> Path:
        return self._folder / f"part-{part:06d}.npy"

    def _remedy(self) -> str:
        return "choose another output, or delete that folder"
