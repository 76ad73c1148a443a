"""Show samples of a dataset: decoded pictures or clips as a PNG, captions as text."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data_pipelines.shards.readers import TarRecord, open_index, read_records, stored_array, text_lengths
from pomscale.base.errors import InputError
from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.codecs import Codec
from pomscale.media.sheets import pad_to_largest, save_captioned_clips, save_grid
from pomscale.shards.schema import ARRAY_MEMBERS, FeaturesInfo, Manifest, read_manifest

# Subindex of Stream.DATASET; the encoder uses 1 for the order of items.
_SHOWN = 2

_NUM_FRAMES = 8
_DECODED_AT_ONCE = 8
_MAX_CAPTION = 200  # characters, where captions are printed


def show(folder: str | Path, codec: Codec | None, num_samples: int, path: Path, seed: int = 0) -> str:
    """Draw records without repetition and write them to a PNG: pictures as a grid, clips as rows.

    A companion set needs no codec and writes no file: captions, or figures of features, are returned. Raises InputError
    if `codec` is not the one that made the latents.

    Args:
        folder: The dataset.
        codec: The codec that made the latents; None for a companion set.
        num_samples: Number of records, at most.
        path: The PNG.
        seed: Seed of the draw.

    Returns:
        A text for people.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    index = open_index(folder, manifest)
    count = min(num_samples, len(index))
    chosen = keyed_generator(seed, Stream.DATASET, 0, _SHOWN).choice(len(index), count, replace=False)
    # By class, then by their order in the index.
    rows = index[np.sort(chosen)]
    rows = rows[np.argsort(rows["label"], kind="stable")]
    records = list(read_records(folder, manifest, rows))
    if manifest.features is not None:
        return "\n".join(_feature_line(manifest, manifest.features, record) for record in records)
    if manifest.codec is None:
        return "\n".join(line for record in records for line in _caption_lines(manifest, record))
    if codec is None or codec.identity() != manifest.codec.identity:
        name = codec.name if codec else "none"
        raise InputError(f"dataset {folder}: this codec ({name}) is not the one that made the latents")
    groups = [manifest.shards[number].group for number in rows["shard"]]
    media = _decode(manifest, codec, records, groups)
    if manifest.modality == "video":
        save_captioned_clips(media, [_caption(record) for record in records], path, _NUM_FRAMES)
        return f"{path}: {count} clips, {_NUM_FRAMES} frames of each"
    save_grid(pad_to_largest(media), path, num_columns=math.ceil(math.sqrt(count)))
    return f"{path}: {count} samples{_class_counts(manifest, rows['label'])}"


def _class_counts(manifest: Manifest, labels: np.ndarray) -> str:
    if not manifest.num_classes:
        return ""
    shown = ", ".join(f"{manifest.class_names[label]}: {count}" for label, count in Counter(labels.tolist()).items())
    return f", sorted by class ({shown})"


def _caption(record: TarRecord) -> str:
    """Return the captions, or the key where there are none."""
    return " | ".join(record.captions()) or record.key


def _caption_lines(manifest: Manifest, record: TarRecord) -> Iterator[str]:
    """Yield a line per embedding; the texts of one that is not of a single caption are in one line."""
    lengths = text_lengths(manifest, record)
    captions = record.captions() if len(lengths) > 1 else [_caption(record)]
    for num_tokens, caption in zip(lengths, captions, strict=True):
        yield f"{record.key}  {num_tokens:>4} tokens  {textwrap.shorten(caption, _MAX_CAPTION)}"


def _feature_line(manifest: Manifest, info: FeaturesInfo, record: TarRecord) -> str:
    """Return a line of a record's features: how long its tokens are, and how much alike neighbours in a row."""
    features = stored_array(manifest, 0, "features", record.payload(ARRAY_MEMBERS["features"])).astype(np.float32)
    norms = np.linalg.norm(features, axis=1)
    units = (features / np.maximum(norms, 1e-12)[:, None]).reshape(-1, info.grid[-1], info.dim)
    alike = (units[:, 1:] * units[:, :-1]).sum(-1)
    neighbours = f", cosine of neighbours {alike.mean():.3f}" if alike.size else ""
    return f"{record.key}  {len(features):>4} tokens, norm {norms.mean():.3g} (std {norms.std():.2g}){neighbours}"


def _decode(manifest: Manifest, codec: Codec, records: list[TarRecord], groups: list[int]) -> list[np.ndarray]:
    """Return pictures (c, h, w) or clips (c, f, h, w) of the records, in [0, 1]; of moments the mean is decoded."""
    channels = manifest.latents.num_channels
    media: list[np.ndarray] = [np.empty(0)] * len(records)
    suffix = manifest.array_members["latent"]
    for group in sorted(set(groups)):
        mine = [i for i, other in enumerate(groups) if other == group]
        for begin in range(0, len(mine), _DECODED_AT_ONCE):
            batch = mine[begin : begin + _DECODED_AT_ONCE]
            arrays = [stored_array(manifest, group, "latent", records[i].payload(suffix)) for i in batch]
            latents = np.stack([array[:channels] for array in arrays]).astype(np.float32)
            with torch.inference_mode():
                decoded = codec.decode(torch.from_numpy(latents).to(codec.device)).cpu().numpy()
            for i, one in zip(batch, decoded, strict=True):
                media[i] = one
    return media
