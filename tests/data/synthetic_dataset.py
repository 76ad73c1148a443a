"""A small dataset whose every value tells which record it belongs to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from data_pipelines.common.shards import Record, ShardWriter
from pomscale.config.schema import ImageTransformConfig, PixelCodecConfig
from pomscale.data.index import to_npy
from pomscale.data.schema import INDEX_NAME, MANIFEST_NAME, CodecInfo, IndexInfo, LatentInfo, Manifest, ShardInfo

LATENT_SHAPE = (4, 2, 3)


def write_dataset(folder: Path, shard_sizes: list[int], *, flip: bool = False, moments: bool = False) -> Manifest:
    """Record number r has label r % 5 and latent r everywhere; its flipped copy is -r - 1; log-variances are 0."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, rows, record = [], [], 0
    for number, size in enumerate(shard_sizes):
        path = folder / f"shard-{number:06d}.tar"
        with path.open("w+b") as stream:
            writer = ShardWriter(stream)
            for _ in range(size):
                latent = np.full(LATENT_SHAPE, record, np.float16)
                mirrored = -latent - 1
                if moments:
                    latent, mirrored = (np.concatenate([x, np.zeros_like(x)]) for x in (latent, mirrored))
                writer.add(Record(f"c/{record:05d}", latent, mirrored if flip else None, record % 5, {}))
                record += 1
            shard_rows = writer.finish()
        shard_rows["shard"] = number
        rows.append(shard_rows)
        payload = path.read_bytes()
        shards.append(
            ShardInfo(
                name=path.name, num_samples=size, num_bytes=len(payload), sha256=hashlib.sha256(payload).hexdigest()
            )
        )
    index = write_index(folder, np.concatenate(rows))
    manifest = Manifest(
        pomscale_version="test",
        modality="image",
        codec=CodecInfo(
            config=PixelCodecConfig(name="pixel", block=2, channels=1), identity="x", scaling_factor=1.0, shift=0.0
        ),
        latent=LatentInfo(
            shape=LATENT_SHAPE, dtype="float16", stores_moments=moments, mean=(0.0,) * 4, std=(1.0, 2.0, 4.0, 8.0)
        ),
        transform=ImageTransformConfig(size=4, flip=flip),
        class_names=tuple("abcde"),
        num_samples=record,
        num_failures=0,
        source_fingerprint="x",
        shards=tuple(shards),
        index=index,
        recipe={},
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return manifest


def write_index(folder: Path, rows: np.ndarray) -> IndexInfo:
    payload = to_npy(rows)
    (folder / INDEX_NAME).write_bytes(payload)
    return IndexInfo(num_bytes=len(payload), sha256=hashlib.sha256(payload).hexdigest())


def replace_index(folder: Path, rows: np.ndarray) -> None:
    """As if the encoder itself had written other rows."""
    change_manifest(folder, "index", value=write_index(folder, rows).model_dump())


def change_manifest(folder: Path, *keys: str | int, value: object) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
