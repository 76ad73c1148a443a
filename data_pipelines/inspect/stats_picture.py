"""Draw the distributions of a dataset as one PNG."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_pipelines.inspect.stats import DatasetStats

_NUM_BINS = 120
_SHOWN_STDS = 6.0


def draw_stats(report: DatasetStats, path: Path) -> None:
    """Write a PNG of the distributions that the dataset has: latents, features, classes, characters and tokens per caption."""
    panels = []
    if report.channels:
        panels.append(_draw_channels)
    if report.manifest.features is not None:
        panels.append(_draw_features)
    if report.manifest.num_classes:
        panels.append(_draw_classes)
    if report.counts.captions:
        panels.append(_draw_captions)
    if report.counts.texts:
        panels.append(_draw_texts)
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for number, panel in enumerate(panels):
        panel(figure.add_subplot(1, len(panels), number + 1), report)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


def _draw_channels(axes: Axes, report: DatasetStats) -> None:
    least = min(channel.mean - _SHOWN_STDS * channel.std for channel in report.channels)
    most = max(channel.mean + _SHOWN_STDS * channel.std for channel in report.channels)
    edges = np.linspace(least, max(most, least + 1e-6), _NUM_BINS + 1)
    finite = np.isfinite(report.values)
    for number in range(len(report.channels)):
        counts = report.counts.patterns[number, finite]
        density, _ = np.histogram(report.values[finite], edges, weights=counts)
        axes.plot((edges[1:] + edges[:-1]) / 2, density / counts.sum() / np.diff(edges), lw=1, label=str(number))
    axes.set(title="Latents by channel", xlabel="value, unscaled", ylabel="density")
    axes.legend(fontsize=6, ncols=2)


def _draw_features(axes: Axes, report: DatasetStats) -> None:
    finite = np.isfinite(report.values)
    values, counts = report.values[finite], report.counts.patterns[0, finite]
    occurring = counts > 0
    axes.hist(values[occurring], bins=_NUM_BINS, weights=counts[occurring], density=True)
    axes.set(title="Features", xlabel="value", ylabel="density")


def _draw_classes(axes: Axes, report: DatasetStats) -> None:
    counts = np.sort(report.class_counts)[::-1]
    axes.fill_between(np.arange(len(counts) + 1), np.append(counts, counts[-1]), step="post")
    axes.set(title="Samples per class", xlabel="classes, largest first", ylabel="samples", ylim=(0, None))


def _draw_captions(axes: Axes, report: DatasetStats) -> None:
    _draw_lengths(axes, report.counts.captions)
    axes.set(title="Captions", xlabel="characters", ylabel="captions")


def _draw_texts(axes: Axes, report: DatasetStats) -> None:
    _draw_lengths(axes, report.counts.texts)
    axes.set(title="Text embeddings", xlabel="tokens", ylabel="captions")


def _draw_lengths(axes: Axes, lengths: Counter[int]) -> None:
    axes.hist(list(lengths), bins=min(_NUM_BINS, max(lengths) - min(lengths) + 1), weights=list(lengths.values()))
