"""Measure a dataset in one pass: its latents by channel, its classes, its texts, its bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from data_pipelines.shards.readers import TarReader, TarRecord, open_shard, stored_array, text_lengths
from data_pipelines.shards.workers import over_shards
from pomscale.base.errors import PomscaleError
from pomscale.shards.schema import FEATURE_ARRAYS, REMEDY, Manifest, read_manifest

# float16 has 65,536 values, uint8 256. Their counts give every statistic of a channel, exactly and in any order.
_VALUES = {
    "float16": np.arange(1 << 16, dtype="<u2").view("<f2").astype(np.float64),
    "uint8": np.arange(1 << 8, dtype=np.float64),
}

# Values that are counted together. Many, since each time all counts are added to the table.
_VALUES_AT_ONCE = 1 << 22

_OUTLIER = 5.0
# Allowed distance from the manifest's figures, sums of the same values in another order, in standard deviations.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ChannelStats:
    """One channel of the unscaled latents; of moments the posterior means, with the `std` of posterior samples."""

    mean: float
    std: float
    least: float
    most: float
    outlier_share: float  # share of values with |z| > 5 by mean and std of the manifest
    manifest_mean: float
    manifest_std: float

    @property
    def agrees(self) -> bool:
        """Whether the manifest has the same mean and std, up to the order of summation."""
        error = max(abs(self.mean - self.manifest_mean), abs(self.std - self.manifest_std))
        return error <= _TOLERANCE * max(self.std, abs(self.mean))


@dataclass
class Counts:
    """Counts of a shard, or of all shards together."""

    patterns: np.ndarray  # int64 (stored channels, 65536 or 256): how often each float16 or uint8 occurs
    members: Counter[str] = field(default_factory=Counter)  # suffix -> bytes of payload
    classes: Counter[int] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)  # characters -> captions
    texts: Counter[int] = field(default_factory=Counter)  # tokens -> texts

    def add(self, other: Counts) -> None:
        self.patterns += other.patterns
        self.members += other.members
        self.classes += other.classes
        self.captions += other.captions
        self.texts += other.texts


@dataclass(frozen=True)
class DatasetStats:
    """Measured statistics of a dataset."""

    folder: Path
    manifest: Manifest
    counts: Counts
    channels: list[ChannelStats]

    @property
    def disagreeing(self) -> list[int]:
        """Channels whose mean or std in the manifest is not that of the shards."""
        return [number for number, channel in enumerate(self.channels) if not channel.agrees]

    @property
    def values(self) -> np.ndarray:
        """The values that `counts.patterns` counts, float64 (65536,) or (256,), some of which are not finite."""
        return _values(self.manifest)

    @property
    def num_not_finite(self) -> int:
        return int(self.counts.patterns[:, ~np.isfinite(self.values)].sum())

    @property
    def class_counts(self) -> np.ndarray:
        """Samples of each class, (num_classes,)."""
        return np.array([self.counts.classes[label] for label in range(self.manifest.num_classes)], np.int64)

    @property
    def exit_code(self) -> int:
        return 1 if self.disagreeing or self.num_not_finite else 0

    def __str__(self) -> str:
        lines = [*_member_lines(self), *_channel_lines(self.channels)]
        if self.manifest.num_classes:
            counts = Counter(self.class_counts.tolist())
            lines.append(f"{'classes':<15}{self.manifest.num_classes:,}; samples in each: {_spread(counts)}")
        lines += _feature_lines(self)
        for name, unit, lengths in (
            ("captions", "characters", self.counts.captions),
            ("texts", "tokens", self.counts.texts),
        ):
            if lengths:
                lines.append(f"{name:<15}{lengths.total():,}; {unit} in each: {_spread(lengths)}")
        if self.num_not_finite:
            lines.append(f"{self.num_not_finite:,} values are not finite; {REMEDY}")
        if self.disagreeing:
            channels = ", ".join(map(str, self.disagreeing))
            lines.append(
                f"mean or std of channels {channels} are not the manifest's: `normalization: dataset` would be wrong; "
                f"run `pomscale data verify`, then make the dataset again"
            )
        return "\n".join(lines)


def stats(folder: str | Path, *, num_workers: int | None = None, progress: bool = True) -> DatasetStats:
    """Read all shards once, in `num_workers` processes. Raises PomscaleError, naming the shard, if one is damaged."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    total = Counts(_no_patterns(manifest))
    for counts in over_shards(
        partial(_count_shard, folder, manifest),
        range(len(manifest.shards)),
        [shard.num_bytes for shard in manifest.shards],
        label="stats",
        num_workers=num_workers,
        progress=progress,
    ):
        total.add(counts)
    return DatasetStats(folder, manifest, total, _channels(manifest, total.patterns))


def _channels(manifest: Manifest, patterns: np.ndarray) -> list[ChannelStats]:
    if manifest.latent is None:
        return []
    latent = manifest.latent
    # Values that are not finite are reported by themselves.
    all_values = _values(manifest)
    is_finite = np.isfinite(all_values)
    values, counts = all_values[is_finite], patterns[:, is_finite]
    channels = []
    for number, (mean, std) in enumerate(zip(latent.mean, latent.std, strict=True)):
        mine = counts[number]
        measured = float(np.average(values, weights=mine))
        variance = np.average((values - measured) ** 2, weights=mine)
        if latent.stores_moments:
            # Law of total variance. Log-variances that float64 cannot take to an exponent do not occur.
            logvar = counts[number + latent.num_channels]
            occurring = logvar > 0
            variance += np.average(np.exp(values[occurring]), weights=logvar[occurring])
        occurring_values = values[mine > 0]
        outliers = mine[np.abs(values - mean) > _OUTLIER * std].sum()
        channels.append(
            ChannelStats(
                mean=measured,
                std=float(np.sqrt(variance)),
                least=float(occurring_values.min()),
                most=float(occurring_values.max()),
                outlier_share=float(outliers / mine.sum()),
                manifest_mean=mean,
                manifest_std=std,
            )
        )
    return channels


# -- one shard, in a process of its own --------------------------------------------------------------------------------


def _values(manifest: Manifest) -> np.ndarray:
    """Return the values of the dtype of the latents, float64, in the order of their bit patterns."""
    return _VALUES["float16" if manifest.latent is None else manifest.latent.dtype]


def _no_patterns(manifest: Manifest) -> np.ndarray:
    channels = manifest.stored_shape(0)[0] if manifest.latent is not None else int(manifest.features is not None)
    return np.zeros((channels, len(_values(manifest))), np.int64)


def _count_shard(folder: Path, manifest: Manifest, number: int) -> Counts:
    shard = manifest.shards[number]
    counts = Counts(_no_patterns(manifest))
    waiting: list[np.ndarray] = []
    try:
        with open_shard(folder / shard.name) as stream:
            reader = TarReader(stream)
            for record in reader:
                waiting += _count_record(manifest, shard.group, record, counts)
                if sum(array.size for array in waiting) >= _VALUES_AT_ONCE:
                    _count_values(waiting, counts.patterns)
                    waiting = []
            _count_values(waiting, counts.patterns)
    except (OSError, ValueError, KeyError) as error:
        raise PomscaleError(f"{folder / shard.name}: cannot be read: {error}; {REMEDY}") from error
    if reader.damages:
        raise PomscaleError(f"{folder / shard.name}: {reader.damages[0]}; {REMEDY}")
    return counts


def _count_record(manifest: Manifest, group: int, record: TarRecord, counts: Counts) -> list[np.ndarray]:
    """Count all but the values of the latents or features, and return those."""
    latents = []
    for suffix, (begin, end) in record.members.items():
        counts.members[suffix] += end - begin
    if manifest.num_classes:
        counts.classes[record.label()] += 1
    if manifest.has_captions:
        counts.captions.update(map(len, record.captions()))
    counts.texts.update(text_lengths(manifest, record))
    for name, suffix in manifest.array_members.items():
        if name not in manifest.text_arrays:
            array = stored_array(manifest, group, name, record.payload(suffix))
            latents.append(array.reshape(1, -1) if name in FEATURE_ARRAYS else array)  # features count together
    return latents


def _count_values(arrays: list[np.ndarray], patterns: np.ndarray) -> None:
    """Add the bit patterns of arrays (channels, ...) to the table (channels, 65536 or 256)."""
    if not arrays:
        return
    channels, num_patterns = patterns.shape
    bits = np.dtype(f"<u{arrays[0].itemsize}")
    values = np.concatenate([array.view(bits).reshape(channels, -1) for array in arrays], axis=1)
    cells = values + np.arange(0, patterns.size, num_patterns)[:, None]
    patterns += np.bincount(cells.ravel(), minlength=patterns.size).reshape(patterns.shape)


# -- the table for people ----------------------------------------------------------------------------------------------


def _member_lines(report: DatasetStats) -> list[str]:
    manifest = report.manifest
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    payload = report.counts.members.total()
    parts = {**report.counts.members, "tar": num_bytes - payload}
    per_sample = ", ".join(f"{name.lstrip('.')} {size / manifest.num_samples:,.1f}" for name, size in parts.items())
    return [
        f"{'dataset':<15}{report.folder}: {manifest.num_samples:,} samples, {num_bytes / 1e9:.3f} GB",
        f"{'bytes/sample':<15}{num_bytes / manifest.num_samples:,.1f}: {per_sample}",
    ]


def _channel_lines(channels: list[ChannelStats]) -> list[str]:
    if not channels:
        return []
    head = f"{'channel':<15}{'mean':>10}{'std':>10}{'min':>10}{'max':>10}{'|z| > 5':>10}   manifest: mean, std"
    rows = (
        f"{number:<15}{c.mean:>10.4f}{c.std:>10.4f}{c.least:>10.3f}{c.most:>10.3f}{c.outlier_share:>10.2e}   "
        f"{'the same' if c.agrees else f'{c.manifest_mean:.4f}, {c.manifest_std:.4f}: DIFFER'}"
        for number, c in enumerate(channels)
    )
    return [head, *rows]


def _feature_lines(report: DatasetStats) -> list[str]:
    """Return a line of all values of the features together."""
    if report.manifest.features is None:
        return []
    finite = np.isfinite(report.values)
    values, counts = report.values[finite], report.counts.patterns[0, finite]
    occurring = values[counts > 0]
    mean = float(np.average(values, weights=counts))
    std = float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))
    return [f"{'features':<15}mean {mean:.4f}, std {std:.4f}, min {occurring.min():.3f}, max {occurring.max():.3f}"]


def _spread(values: Counter[int]) -> str:
    """Return range and median of values, given how often each occurs."""
    ordered = sorted(values)
    middle = np.searchsorted(np.cumsum([values[value] for value in ordered]), values.total() / 2)
    return f"{ordered[0]:,} to {ordered[-1]:,}, median {ordered[middle]:,}"
