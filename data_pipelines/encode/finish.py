"""Puts the parts of a dataset together: failures, index, and last the manifest, which declares it complete."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipelines.encode.job import EncodeJob, Variant
from data_pipelines.shards.part_writer import num_bytes_and_sha256
from data_pipelines.shards.parts import PLAN_NAME, PartRecord, PartStore
from data_pipelines.shards.statistics import ChannelStatistics
from pomscale import __version__
from pomscale.base.errors import PomscaleError
from pomscale.base.files import atomic_write, remove_leftovers, write_text
from pomscale.config.encode import has_captions
from pomscale.shards.index import index_dtype, npy_header
from pomscale.shards.schema import (
    FAILURES_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    CodecInfo,
    GroupInfo,
    IndexInfo,
    LatentInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    TextInfo,
)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A shard, and where its rows are among those of its part."""

    info: ShardInfo
    part: int
    first_row: int
    num_rows_of_part: int


def finish(job: EncodeJob, variant: Variant, store: PartStore) -> Manifest:
    """The manifest, written. Memory: one part's rows at a time, and a line per shard.

    PomscaleError if a part vanished in the meantime, or nothing could be encoded at all.
    """
    output = store.output
    for name in (MANIFEST_NAME, INDEX_NAME, FAILURES_NAME):
        remove_leftovers(output, name)
    remove_leftovers(store.folder, PLAN_NAME)  # every task has long found the plan
    placed: list[_Placed] = []
    statistics: ChannelStatistics | None = None
    num_failures, first_failure = 0, ""
    with atomic_write(output / FAILURES_NAME) as stream:
        for part, record in _records(job, store):
            first_row = 0
            for shard in record.shards:
                placed.append(_Placed(shard, part, first_row, record.num_samples))
                first_row += shard.num_samples
            if record.statistics is not None:
                statistics = record.statistics if statistics is None else statistics.merge(record.statistics)
            for failure in record.failures:
                first_failure = first_failure or f"{failure.path}: {failure.reason}"
                stream.write(f"{failure.model_dump_json()}\n".encode())
            num_failures += len(record.failures)
    if not num_failures:
        (output / FAILURES_NAME).unlink()
    if not placed:
        raise PomscaleError(
            f"none of the {num_failures:,} items could be encoded; the reasons are in {output / FAILURES_NAME}, "
            f"the first is: {first_failure}"
        )
    placed.sort(key=lambda shard: (shard.info.group, shard.part))
    index, keys_sha256 = _write_index(job, store, placed)
    # Only groups that have shards are told, renumbered from 0.
    used = sorted({shard.info.group for shard in placed})
    manifest = Manifest(
        pomscale_version=__version__,
        codec=_codec_info(job),
        latent=_latent_info(job, statistics),
        transform=variant.transform,
        text=_text_info(job),
        has_captions=has_captions(job.recipe.source),
        class_names=job.table.class_names,
        num_samples=sum(shard.info.num_samples for shard in placed),
        num_failures=num_failures,
        source=SourceInfo(fingerprint=job.table.fingerprint, num_items=len(job.table)),
        groups=tuple(GroupInfo(shape=variant.latent_shapes[group], target=variant.targets[group]) for group in used),
        shards=tuple(s.info.model_copy(update={"group": used.index(s.info.group)}) for s in placed),
        keys_sha256=keys_sha256,
        index=index,
        recipe=_recipe_of(job, variant),
    )
    write_text(output / MANIFEST_NAME, manifest.model_dump_json(indent=2))
    return manifest


def _records(job: EncodeJob, store: PartStore) -> Iterator[tuple[int, PartRecord]]:
    for part in range(job.num_parts):
        record = store.read(part)
        if record is None:
            raise PomscaleError(f"{store.output}: a part vanished while others were made; run the same command again")
        yield part, record


def _write_index(job: EncodeJob, store: PartStore, placed: list[_Placed]) -> tuple[IndexInfo, str]:
    """The index, and the sha256 of its key column."""
    num_samples = sum(shard.info.num_samples for shard in placed)
    keys = hashlib.sha256()
    with atomic_write(store.output / INDEX_NAME) as stream:
        stream.write(npy_header((num_samples,), index_dtype(job.encoders.arrays)))
        for number, shard in enumerate(placed):
            rows = store.read_rows(shard.part, shard.num_rows_of_part)
            rows = rows[shard.first_row : shard.first_row + shard.info.num_samples]
            rows["shard"] = number
            keys.update(rows["key"].tobytes())
            stream.write(rows.tobytes())
        num_bytes, sha256 = num_bytes_and_sha256(stream)
    return IndexInfo(num_bytes=num_bytes, sha256=sha256), keys.hexdigest()


def _codec_info(job: EncodeJob) -> CodecInfo | None:
    codec = job.encoders.codec
    if codec is None or job.encoders.codec_identity is None:
        return None
    return CodecInfo(
        config=codec.config,
        identity=job.encoders.codec_identity,
        scaling_factor=codec.scaling_factor,
        shift=codec.shift,
    )


def _latent_info(job: EncodeJob, statistics: ChannelStatistics | None) -> LatentInfo | None:
    codec = job.encoders.codec
    if codec is None or statistics is None:
        return None
    return LatentInfo(
        stores_moments=codec.stores_moments,
        has_flip="flip" in job.encoders.arrays,
        num_values=statistics.count,
        mean=statistics.mean,
        std=statistics.std,
    )


def _text_info(job: EncodeJob) -> TextInfo | None:
    """With what the encoder makes of an empty caption: what guidance and condition dropout put in its place."""
    encoder = job.encoders.text
    if encoder is None or job.encoders.text_identity is None:
        return None
    (embedding,) = encoder.encode([""])
    return TextInfo(
        config=encoder.config,
        identity=job.encoders.text_identity,
        dim=encoder.dim,
        null_length=len(embedding),
        null_embedding=base64.b64encode(embedding.astype("<f2").tobytes()).decode(),
    )


def _recipe_of(job: EncodeJob, variant: Variant) -> dict[str, object]:
    """The recipe that makes this dataset alone."""
    recipe = job.recipe.model_copy(update={"transform": variant.transform, "output": str(variant.output)})
    return recipe.model_dump(mode="json")
