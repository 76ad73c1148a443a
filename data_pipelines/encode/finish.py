"""Put the parts of a dataset together: failures, index, and last the manifest, which declares it complete."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from data_pipelines.encode.setup import EncodeSetup, Variant
from data_pipelines.shards.parts import SPEC_NAME, PartStore
from data_pipelines.shards.statistics import ChannelStatistics
from data_pipelines.shards.writers import write_index
from pomscale import __version__
from pomscale.base.errors import PomscaleError
from pomscale.base.files import atomic_write, remove_leftovers, write_text
from pomscale.config.encode import has_captions, text_version, transform_version
from pomscale.shards.schema import (
    FAILURES_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    CodecInfo,
    FeaturesInfo,
    GroupInfo,
    LatentInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    TextInfo,
)


@dataclass(frozen=True, slots=True)
class _PartShard:
    """A shard, and the position of its rows among those of its part."""

    info: ShardInfo
    part: int
    first_row: int
    num_rows_of_part: int


@dataclass
class _Collected:
    """Sums over the records of all parts."""

    shards: list[_PartShard] = field(default_factory=list)
    statistics: ChannelStatistics | None = None
    num_failures: int = 0
    num_incomplete: int = 0
    first_failure: str = ""


def finish(setup: EncodeSetup, variant: Variant, store: PartStore) -> Manifest:
    """Write failures, index and manifest of a dataset; return the manifest.

    Memory holds one part's rows at a time, and a line per shard. Raises PomscaleError if a part vanished in the
    meantime, or nothing could be encoded at all.
    """
    output = store.output
    for name in (MANIFEST_NAME, INDEX_NAME, FAILURES_NAME):
        remove_leftovers(output, name)
    remove_leftovers(store.folder, SPEC_NAME)  # by now every task has read the specification
    parts = _collect_parts(setup, store)
    if not parts.num_failures:
        (output / FAILURES_NAME).unlink()
    if not parts.shards:
        raise PomscaleError(
            f"none of the {parts.num_failures:,} items could be encoded; the reasons are in {output / FAILURES_NAME}, "
            f"the first is: {parts.first_failure}"
        )
    shards = sorted(parts.shards, key=lambda shard: (shard.info.group, shard.part))
    num_samples = sum(shard.info.num_samples for shard in shards)
    index, keys_sha256 = write_index(output, setup.arrays, num_samples, _rows(store, shards))
    # The manifest has the groups that have shards, renumbered from 0.
    used = sorted({shard.info.group for shard in shards})
    manifest = Manifest(
        pomscale_version=__version__,
        codec=_codec_info(setup),
        latent=_latent_info(setup, parts.statistics),
        transform=variant.transform,
        transform_version=transform_version(variant.transform),
        text=_text_info(setup),
        text_version=text_version(setup.recipe.texts),
        features=_features_info(setup, variant),
        has_captions=has_captions(setup.recipe.source),
        class_names=setup.table.class_names,
        num_samples=num_samples,
        num_failures=parts.num_failures,
        num_incomplete=parts.num_incomplete,
        source=SourceInfo(
            fingerprint=setup.table.fingerprint,
            num_items=len(setup.table),
            num_filtered=setup.table.num_filtered,
        ),
        groups=tuple(GroupInfo(shape=variant.latent_shapes[group], target=variant.targets[group]) for group in used),
        shards=tuple(s.info.model_copy(update={"group": used.index(s.info.group)}) for s in shards),
        keys_sha256=keys_sha256,
        index=index,
        recipe=_recipe_of(setup, variant),
    )
    write_text(output / MANIFEST_NAME, manifest.model_dump_json(indent=2))
    return manifest


def _collect_parts(setup: EncodeSetup, store: PartStore) -> _Collected:
    """Read the records of all parts in order, and write their failures."""
    parts = _Collected()
    with atomic_write(store.output / FAILURES_NAME) as stream:
        for part in range(setup.num_parts):
            record = store.read(part)
            if record is None:
                raise PomscaleError(
                    f"{store.output}: a part vanished while others were made; run the same command again"
                )
            first_row = 0
            for shard in record.shards:
                parts.shards.append(_PartShard(shard, part, first_row, record.num_samples))
                first_row += shard.num_samples
            if record.statistics is not None:
                before = parts.statistics
                parts.statistics = record.statistics if before is None else before.merge(record.statistics)
            for failure in record.failures:
                parts.first_failure = parts.first_failure or f"{failure.path}: {failure.reason}"
                stream.write(f"{failure.model_dump_json()}\n".encode())
            parts.num_failures += len(record.failures)
            parts.num_incomplete += record.num_incomplete
    return parts


def _rows(store: PartStore, shards: list[_PartShard]) -> Iterator[np.ndarray]:
    """Yield the index rows of the shards, with the number that each shard now has."""
    for number, shard in enumerate(shards):
        rows = store.read_rows(shard.part, shard.num_rows_of_part)
        rows = rows[shard.first_row : shard.first_row + shard.info.num_samples]
        rows["shard"] = number
        yield rows


def _codec_info(setup: EncodeSetup) -> CodecInfo | None:
    codec = setup.encoders.codec
    if codec is None or setup.encoders.codec_identity is None:
        return None
    return CodecInfo(
        config=codec.config,
        identity=setup.encoders.codec_identity,
        scaling_factor=codec.scaling_factor,
        shift=codec.shift,
    )


def _latent_info(setup: EncodeSetup, statistics: ChannelStatistics | None) -> LatentInfo | None:
    codec = setup.encoders.codec
    if codec is None or statistics is None:
        return None
    return LatentInfo(
        dtype=codec.stored_dtype,
        coding=setup.coding,
        stores_moments=codec.stores_moments,
        has_flip=setup.encoders.has_flip,
        num_values=statistics.count,
        mean=statistics.mean,
        std=statistics.std,
    )


def _text_info(setup: EncodeSetup) -> TextInfo | None:
    """Describe the text encoders, with their embeddings of an empty caption, for guidance and condition dropout."""
    infos = [
        TextInfo(
            config=encoder.config,
            identity=identity,
            dim=encoder.dim,
            null_length=len(null),
            null_embedding=base64.b64encode(null.astype("<f2").tobytes()).decode(),
            num_captions=setup.num_captions,
        )
        for encoder, identity, null in zip(
            setup.encoders.texts, setup.encoders.text_identities, setup.encoders.null_embeddings, strict=True
        )
    ]
    return TextInfo.of(infos) if infos else None


def _features_info(setup: EncodeSetup, variant: Variant) -> FeaturesInfo | None:
    encoder, config = setup.encoders.features, setup.recipe.features
    if encoder is None or config is None or setup.encoders.features_identity is None:
        return None
    target = variant.targets[0]
    return FeaturesInfo.model_validate(
        {
            "teacher": config.teacher_name,
            "identity": setup.encoders.features_identity,
            "dim": encoder.dim(*target[-2:]),
            "grid": encoder.grid(*target),
            "has_flip": setup.encoders.has_flip,
        }
    )


def _recipe_of(setup: EncodeSetup, variant: Variant) -> dict[str, object]:
    """Return the recipe that makes this dataset alone."""
    recipe = setup.recipe.model_copy(update={"transform": variant.transform, "output": str(variant.output)})
    return recipe.model_dump(mode="json")
