"""What an encode keeps on disk while it runs: its plan, and one record per finished part.

OUTPUT/shard-000007.tar          committed first
OUTPUT/parts/part-000007.npy     index rows of the shard
OUTPUT/parts/part-000007.json    the record: committed last, so a part that has one is whole
OUTPUT/parts/plan.json           what all of this was made from
OUTPUT/parts/lock                held by the encode that is at work
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipelines.common.statistics import ChannelStatistics
from pomscale.config.schema import ImageTransformConfig
from pomscale.data.index import map_index, to_npy
from pomscale.data.schema import ShardInfo
from pomscale.errors import InputError, PomscaleError
from pomscale.files import atomic_write, make_folder, remove_leftovers, write_text


class Plan(BaseModel):
    """Everything that decides the bytes of the shards. Two encodes with equal plans may share an output folder.

    What is not here (paths, batch, threads, device) may change between the start of an encode and its resumption.
    With a VAE the last bits of a latent depend on batch and device too: its bytes repeat only where those are the same.
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

    @contextmanager
    def claim(self, plan: Plan) -> Iterator[None]:
        """Makes the output folder this plan's, and this process's while the block runs.

        InputError if another process is at work there, or, naming what differs, if it is another plan's.
        """
        make_folder(self._folder)
        path = self._folder / "lock"
        try:
            lock = path.open("w")
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error}; choose another output") from error
        with lock:  # closing it, also by the death of the process, releases it
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"output: another encode is at work in {self.output}; wait for its end") from None
            except OSError as error:  # a parallel file system that was mounted without locks
                print(f"warning: {path}: {error}; do not start a second encode on this output", file=sys.stderr)
            else:
                remove_leftovers(self.output)
                remove_leftovers(self._folder)
            self._compare_or_write(plan)
            yield

    def _compare_or_write(self, plan: Plan) -> None:
        path = self._folder / "plan.json"
        if not path.exists():
            write_text(path, plan.model_dump_json(indent=2))
            return
        try:
            found = Plan.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
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
            stream.write(to_npy(rows))
        write_text(self._record_path(part), record.model_dump_json(indent=2))

    def read(self, part: int) -> PartRecord | None:
        """The record of a part; None if it is not done, or record, rows or shard is missing or has another size."""
        try:
            record = PartRecord.model_validate_json(self._record_path(part).read_bytes())
            if record.shard is not None:
                map_index(self._rows_path(part), record.shard.num_samples)
                if self.shard_path(part).stat().st_size != record.shard.num_bytes:
                    return None
        except (OSError, ValueError):
            return None
        return record

    def read_rows(self, part: int, num_rows: int) -> np.ndarray:
        try:
            return map_index(self._rows_path(part), num_rows).copy()
        except (OSError, ValueError) as error:
            raise PomscaleError(
                f"{self._rows_path(part)}: cannot be read: {error}; run the same command again, it makes it anew"
            ) from error

    def _record_path(self, part: int) -> Path:
        return self._folder / f"part-{part:06d}.json"

    def _rows_path(self, part: int) -> Path:
        return self._folder / f"part-{part:06d}.npy"

    def _remedy(self) -> str:
        return "choose another output, or delete that folder"
