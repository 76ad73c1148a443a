"""Files that an encode keeps while it runs: its specification, claims of its tasks, and a record per finished part.

OUTPUT/shard-000007.tar          committed first; with several groups shard-000007-GG.tar, one per group
OUTPUT/parts/part-000007.npy     index rows of the part's shards, one after the other
OUTPUT/parts/part-000007.json    the record: committed last, so a part that has one is whole
OUTPUT/parts/plan.json           the specification (`EncodeSpec`)
OUTPUT/parts/claims              empty: byte N is locked by the task that makes part N
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from data_pipelines.shards.statistics import ChannelStatistics
from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import atomic_write, make_folder, remove_leftovers, write_text
from pomscale.config.codecs import CodecConfig, current_codec
from pomscale.config.encode import SourceConfig, TransformConfig
from pomscale.shards.index import index_dtype, map_index, to_npy
from pomscale.shards.schema import ArrayName, ShardInfo, equals, is_none

SPEC_NAME = "plan.json"
PARTS_FOLDER = "parts"

# Fields of a source that say where it lies, and not what it is.
SOURCE_LOCATION = {"path", "root"}

# Further remedy for an encode that an older version of pomscale began.
OLDER_VERSION = "or use the version of pomscale that began it"

# Fields of a specification in which two versions of pomscale may differ.
_VERSIONS = ("transform_version", "text_version")

_SOURCE: TypeAdapter[SourceConfig] = TypeAdapter(SourceConfig)
_CODEC: TypeAdapter[CodecConfig] = TypeAdapter(CodecConfig)

# Fields of a codec that say where its weights lie.
CODEC_LOCATION = {"path", "subfolder"}

_RECORD_NAME = re.compile(r"part-(\d+)\.json")


T = TypeVar("T")


class EncodeSpec(BaseModel):
    """Everything that decides the bytes of the shards. Encodes with equal specifications may share an output folder.

    Paths, threads, device and number of tasks are left out, so they may change when an encode is resumed. With a
    network the last bits of a latent depend on batch and device too: its bytes repeat only where those are the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[2] = 2
    source: dict[str, Any]  # without its path
    source_fingerprint: str
    num_items: int
    shard_samples: int
    seed: int
    codec: dict[str, Any] | None
    codec_identity: str | None
    transform: TransformConfig | None
    transform_version: int = Field(1, exclude_if=equals(1))  # what it was before it was recorded
    text: dict[str, Any] | list[dict[str, Any]] | None  # a list where there are several encoders
    text_version: int = Field(1, exclude_if=equals(1))  # and without embeddings
    text_identity: str | list[str] | None
    captions: str = Field("random", exclude_if=equals("random"))
    features: dict[str, Any] | None = Field(None, exclude_if=is_none)  # teacher without its path, and grid
    features_identity: str | None = Field(None, exclude_if=is_none)

    @field_validator("source")
    @classmethod
    def _complete(cls, source: dict[str, Any]) -> dict[str, Any]:
        """Give the fields that sources have gained since then their defaults, under which an encode goes on."""
        config = _SOURCE.validate_python({**source, "path": ""})
        return config.model_dump(mode="json", exclude=SOURCE_LOCATION)

    @field_validator("codec")
    @classmethod
    def _current(cls, codec: dict[str, Any] | None) -> dict[str, Any] | None:
        """Name the codecs of earlier versions as they are now, and give their new fields the defaults."""
        if codec is None:
            return None
        codec = current_codec(codec)
        config = _CODEC.validate_python({**codec, "path": ""} if codec["name"] == "vae" else codec)
        return config.model_dump(mode="json", exclude=CODEC_LOCATION)


def unlisted(of_encoders: list[T]) -> T | list[T] | None:
    """Return what a specification says of text encoders: of one alone, as it always did, or of several in a list."""
    return of_encoders[0] if len(of_encoders) == 1 else of_encoders or None


class Failure(BaseModel):
    """One item that could not be encoded."""

    model_config = ConfigDict(frozen=True)

    key: str
    path: str
    reason: str


def skipped_exit_code(num_skipped: int, max_skipped: int) -> int:
    """Return 3 if more items were skipped (and listed) than the recipe allows, else 0."""
    return 3 if num_skipped > max_skipped else 0


class PartRecord(BaseModel):
    """The outcome of one part. Its shards are sorted by group; `shards` is empty where every item failed.

    A shard's `group` counts the targets of the transform. `statistics` cover all latents of the part.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: tuple[ShardInfo, ...]
    statistics: ChannelStatistics | None
    failures: tuple[Failure, ...]
    num_incomplete: int = Field(0, exclude_if=equals(0))  # as records were before they had it
    """Clips that end early and were kept."""

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)


def part_of(shard_name: str) -> int:
    """Return the part that a shard belongs to: 7 for shard-000007-01.tar."""
    return int(shard_name.removeprefix("shard-").removesuffix(".tar").split("-")[0])


def record_path(folder: Path, part: int) -> Path:
    """Return the path of a part's record in OUTPUT/parts."""
    return folder / f"part-{part:06d}.json"


class PartStore:
    """The files of an encode in its output folder."""

    def __init__(self, output: Path, arrays: Sequence[ArrayName], num_groups: int) -> None:
        self.output = output
        self.folder = output / PARTS_FOLDER
        self._dtype = index_dtype(arrays)
        self._num_groups = num_groups

    def adopt(self, spec: EncodeSpec) -> None:
        """Bind the folder to a specification. InputError, naming what differs, if it is bound to another one."""
        make_folder(self.folder)
        path = self.folder / SPEC_NAME
        if not path.exists():
            write_text(path, spec.model_dump_json(indent=2))
            return
        try:
            found = EncodeSpec.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise InputError(f"{path} is damaged or of another version; {self._remedy()}") from error
        differences = [
            f"{name} is {getattr(found, name)} there and {getattr(spec, name)} here"
            for name in EncodeSpec.model_fields
            if getattr(found, name) != getattr(spec, name)
        ]
        if differences:
            of_versions = any(getattr(found, name) != getattr(spec, name) for name in _VERSIONS)
            remedy = f"{self._remedy()}, {OLDER_VERSION}" if of_versions else self._remedy()
            raise InputError(f"output: {self.output} holds parts of another encode: {'; '.join(differences)}; {remedy}")

    def shard_path(self, part: int, group: int) -> Path:
        suffix = f"-{group:02d}" if self._num_groups > 1 else ""
        return self.output / f"shard-{part:06d}{suffix}.tar"

    def commit(self, part: int, record: PartRecord, rows: np.ndarray) -> None:
        """Mark a part, whose shards already have their final names, as done."""
        with atomic_write(self._rows_path(part)) as stream:
            stream.write(to_npy(rows))
        write_text(record_path(self.folder, part), record.model_dump_json(indent=2))
        names = {shard.name for shard in record.shards}
        for path in self.output.glob(f"shard-{part:06d}*.tar"):
            # Left from an earlier encode of the part, in which its group had samples.
            if part_of(path.name) == part and path.name not in names:
                path.unlink()

    def clear(self, part: int) -> None:
        """Remove the temporary files that a killed task left of a part. Only for the task that has claimed it."""
        for start in (f"shard-{part:06d}.", f"shard-{part:06d}-"):
            remove_leftovers(self.output, start)
        remove_leftovers(self.folder, f"part-{part:06d}.")

    def forget(self, part: int) -> None:
        """Mark a part as not done; its shards stay until they are replaced."""
        record_path(self.folder, part).unlink(missing_ok=True)

    def recorded(self) -> set[int]:
        """Return the parts that have a record, by one listing; `read` tells whether all of a part is present."""
        names = (_RECORD_NAME.fullmatch(entry.name) for entry in os.scandir(self.folder))
        return {int(match[1]) for match in names if match}

    def read(self, part: int) -> PartRecord | None:
        """Return the record of a part; None if record, rows or a shard is missing or has another size."""
        try:
            record = PartRecord.model_validate_json(record_path(self.folder, part).read_bytes())
            map_index(self._rows_path(part), record.num_samples, self._dtype)
            if any((self.output / shard.name).stat().st_size != shard.num_bytes for shard in record.shards):
                return None
        except (OSError, ValueError):
            return None
        return record

    def read_rows(self, part: int, num_rows: int) -> np.ndarray:
        try:
            return map_index(self._rows_path(part), num_rows, self._dtype).copy()
        except (OSError, ValueError) as error:
            raise PomscaleError(
                f"{self._rows_path(part)}: cannot be read: {error}; run the same command again to make the part again"
            ) from error

    def _rows_path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.npy"

    def _remedy(self) -> str:
        return "choose another output, or delete that folder"
