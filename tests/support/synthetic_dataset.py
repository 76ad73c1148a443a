"""A small dataset whose every value tells which record it belongs to."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.shards.writers import Record, ShardWriter
from pomscale.config.codecs import PixelCodecConfig
from pomscale.config.encode import ImageTransformConfig
from pomscale.config.text import TextEncoderConfig
from pomscale.shards.index import to_npy
from pomscale.shards.schema import (
    INDEX_NAME,
    MANIFEST_NAME,
    TEXT_ARRAYS,
    ArrayName,
    CodecInfo,
    GroupInfo,
    IndexInfo,
    LatentInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    TextInfo,
)

LATENT_SHAPE = (4, 2, 3)
TEXT_DIM = 5


def write_dataset(
    folder: Path,
    shard_sizes: Sequence[int],
    *,
    flip: bool = False,
    moments: bool = False,
    text: bool = False,
    latents: bool = True,
    shapes: Sequence[tuple[int, ...]] = (LATENT_SHAPE,),
    shard_groups: Sequence[int] | None = None,
    first_record: int = 0,
    captions: int = 1,
) -> Manifest:
    """Record r has key c/r (five digits), label r % 5 and latent r everywhere; its flipped copy is -r - 1.

    Log-variances are 0. With `text`, its embedding is r in 1 + r % 3 rows, and its caption "caption r"; there are
    1 + r % captions of them, number k with r + 256 k in place of r. Shard i has latents of shape
    shapes[shard_groups[i]]; without latents it is a companion set. r counts from `first_record`.
    """
    names = [*(["latent"] if latents else []), *(["flip"] if latents and flip else []), *TEXT_ARRAYS[: captions * text]]
    folder.mkdir(parents=True, exist_ok=True)
    shards, rows, record = [], [], first_record
    groups = shard_groups or [0] * len(shard_sizes)
    for number, size in enumerate(shard_sizes):
        path = folder / f"shard-{number:06d}.tar"
        with path.open("w+b") as stream:
            writer = ShardWriter(stream, names)
            for _ in range(size):
                arrays: dict[ArrayName, np.ndarray] = {}
                if latents:
                    latent = np.full(shapes[groups[number]], record, np.float16)
                    mirrored = -latent - 1
                    if moments:
                        latent, mirrored = (np.concatenate([x, np.zeros_like(x)]) for x in (latent, mirrored))
                    arrays["latent"] = latent
                    if flip:
                        arrays["flip"] = mirrored
                texts = [record + 256 * number for number in range(1 + record % captions)] if text else []
                for name, value in zip(TEXT_ARRAYS, texts, strict=False):
                    arrays[name] = np.full((1 + record % 3, TEXT_DIM), value, np.float16)
                caption = f"caption {record}" if text else None
                info = {"captions": [f"caption {value}" for value in texts]} if len(texts) > 1 else {}
                writer.add(Record(f"c/{record:05d}", arrays, record % 5 if latents else None, caption, info))
                record += 1
            shard_rows = writer.finish()
        shard_rows["shard"] = number
        rows.append(shard_rows)
        payload = path.read_bytes()
        sha256 = hashlib.sha256(payload).hexdigest()
        shards.append(
            ShardInfo(name=path.name, num_samples=size, num_bytes=len(payload), sha256=sha256, group=groups[number])
        )
    num_samples = record - first_record
    codec = PixelCodecConfig(name="pixel", block=2, channels=1)
    manifest = Manifest(
        pomscale_version="test",
        codec=CodecInfo(config=codec, identity="x", scaling_factor=1.0, shift=0.0) if latents else None,
        latent=LatentInfo(
            stores_moments=moments, has_flip=flip, num_values=record, mean=(0.0,) * 4, std=(1.0, 2.0, 4.0, 8.0)
        )
        if latents
        else None,
        transform=ImageTransformConfig(size=4, flip=flip) if latents else None,
        text=TextInfo(
            config=TextEncoderConfig(path="x"),
            identity="t",
            dim=TEXT_DIM,
            null_length=1,
            null_embedding=base64.b64encode(np.full((1, TEXT_DIM), -1, "<f2").tobytes()).decode(),
            num_captions=captions,
        )
        if text
        else None,
        has_captions=text,
        class_names=tuple("abcde") if latents else (),
        num_samples=num_samples,
        num_failures=0,
        source=SourceInfo(fingerprint="x", num_items=num_samples),
        groups=tuple(GroupInfo(shape=shape, target=(4, 4)) for shape in shapes)
        if latents
        else (GroupInfo(shape=(), target=()),),
        shards=tuple(shards),
        keys_sha256=hashlib.sha256(np.concatenate(rows)["key"].tobytes()).hexdigest(),
        index=write_index(folder, np.concatenate(rows)),
        recipe={},
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return manifest


def write_index(folder: Path, rows: np.ndarray) -> IndexInfo:
    payload = to_npy(rows)
    (folder / INDEX_NAME).write_bytes(payload)
    return IndexInfo(num_bytes=len(payload), sha256=hashlib.sha256(payload).hexdigest())


def replace_index(folder: Path, rows: np.ndarray) -> None:
    """Replace the index, as if the encoder itself had written other rows."""
    change_manifest(folder, "index", value=write_index(folder, rows).model_dump())


def change_manifest(folder: Path, *keys: str | int, value: object) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
