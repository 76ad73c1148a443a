"""A dataset for human eyes: what it is, and what it looks like."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from pomscale.codecs import Codec
from pomscale.data.dataset import LatentDataset
from pomscale.data.schema import FAILURES_NAME, Normalization, read_manifest
from pomscale.errors import InputError
from pomscale.keyed_random import Stream, keyed_generator
from pomscale.monitoring.media import save_grid


def info(folder: str | Path) -> str:
    """The manifest as a table for people."""
    manifest = read_manifest(folder)
    latent = manifest.latent
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    transform = manifest.transform
    size, flips = f"{transform.size}x{transform.size}", ", flipped copies" if transform.flip else ""
    rows = {
        "dataset": str(folder),
        "samples": f"{manifest.num_samples:,} in {manifest.num_classes:,} classes",
        "shards": f"{len(manifest.shards):,}, {num_bytes / 1e9:.3f} GB, {num_bytes // manifest.num_samples:,} B/sample",
        "failures": f"{manifest.num_failures:,}" + (f", see {FAILURES_NAME}" if manifest.num_failures else ""),
        "pictures": f"{size}, {transform.filter}{flips}",
        "codec": f"{manifest.codec.config.model_dump()}, identity {manifest.codec.identity[:12]}",
        "latents": f"{latent.shape} {latent.dtype}, {'moments' if latent.stores_moments else 'samples'}, unscaled",
        "mean": _numbers(latent.mean),
        "std": _numbers(latent.std),
        "scaling": f"(latent - {manifest.codec.shift:g}) * {manifest.codec.scaling_factor:g}",
        "source": f"fingerprint {manifest.source_fingerprint[:12]}",
        "written by": f"pomscale {manifest.pomscale_version}, schema version {manifest.schema_version}",
    }
    return "\n".join(f"{name:<11}{value}" for name, value in rows.items())


def show(folder: str | Path, codec: Codec, num_samples: int, path: Path, seed: int = 0) -> str:
    """Decodes `num_samples` records, drawn without repetition, into a grid of pictures.

    Returns a line that says how many of which class. InputError if `codec` is not the one that made the latents.
    """
    manifest = read_manifest(folder)
    if codec.identity() != manifest.codec.identity:
        raise InputError(f"dataset {folder}: this codec {codec.name} is not the one that made the latents")
    channels = manifest.latent.shape[0]
    unscaled = Normalization((0.0,) * channels, (1.0,) * channels)
    dataset = LatentDataset(folder, manifest, unscaled)
    count = min(num_samples, len(dataset))
    # Subindex 2 keeps this draw apart from the encoder's item order.
    chosen = keyed_generator(seed, Stream.DATASET, 0, 2).choice(len(dataset), count, replace=False)
    latents, labels = dataset.read(chosen, np.arange(count), seed=seed, flip_probability=0.0)
    by_class = np.argsort(labels, kind="stable")
    images = codec.decode(torch.from_numpy(latents[by_class]))
    save_grid(images, path, num_columns=math.ceil(math.sqrt(count)))
    counts = Counter(labels[by_class].tolist())
    shown = ", ".join(f"{manifest.class_names[label]}: {number}" for label, number in counts.items())
    return f"{path}: {count} samples, sorted by class ({shown})"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
