"""Plots of the report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pomscale.base.console import format_count, format_duration
from pomscale.runs.ledger import Goodput

INK, MUTED, RULE = "#1f2733", "#5f6b7a", "#e3e7ed"

# Colours of Okabe and Ito, which colour-blind people can tell apart too, without their yellow, which is invisible on
# white. Those that differ most come first.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":")

# Green is the time that counts, grey the time that is not the fault of the run.
_TIME_COLORS = {
    "productive": "#009e73",
    "lost": "#b3261e",
    "queue": "#c9d0da",
    "down": "#9aa4b2",
    "start_up": "#0072b2",
    "compile": "#56b4e9",
    "data_wait": "#d55e00",
    "checkpoint_stall": "#8a4fbf",
    "evaluation": "#e69f00",
    "rollback": "#e58a8a",
    "other": "#56606f",
}
_DPI = 150
_MAX_LABEL = 28


@dataclass(frozen=True)
class Style:
    """Colour and dashes of a line."""

    color: Any
    dash: str = "-"


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: title.
        lines: label -> (x, y).
        noisy: show a running mean over a faint curve.
        x_name: "samples", or the name of other numbers on the x axis.
        bands: label of a line -> (x, low, high) of an area around it.
    """

    title: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    noisy: bool = False
    x_name: str = "samples"
    bands: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]] = field(default_factory=dict)

    @property
    def varies(self) -> bool:
        """Whether the lines have more than one value."""
        return len({value for _, y in self.lines.values() for value in y}) > 1


def run_styles(names: Sequence[str]) -> dict[str, Style]:
    """Return a style for each run, the same in every plot."""
    return {
        name: Style(COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)])
        for number, name in enumerate(names)
    }


def draw_overview(
    title: str,
    panels: Sequence[Panel],
    times: Mapping[str, Goodput],
    *,
    resumed_at: Sequence[int] = (),
    styles: Mapping[str, Style] | None = None,
) -> bytes:
    """Return a PNG of all panels, two in a row, with the wall time of each run below them."""
    num_rows = -(-len(panels) // 2)
    heights = [3.1] * num_rows + ([_times_height(len(times))] if times else [])
    figure = Figure(figsize=(12, 0.6 + sum(heights)), layout="constrained")
    figure.suptitle(title, color=INK, fontsize=14, fontweight="bold", parse_math=False)
    if not heights:  # the run has not taken its first step
        return _png(figure)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for index, panel in enumerate(panels):
        _draw(figure.add_subplot(grid[index // 2, index % 2]), panel, resumed_at, styles)
    if times:
        _draw_times(figure.add_subplot(grid[-1, :]), times)
    return _png(figure)


def draw_panel(panel: Panel, resumed_at: Sequence[int] = (), styles: Mapping[str, Style] | None = None) -> bytes:
    """Return a PNG of one panel."""
    figure = Figure(figsize=(5.2, 3), layout="constrained")
    _draw(figure.add_subplot(), panel, resumed_at, styles)
    return _png(figure)


def draw_times(times: Mapping[str, Goodput]) -> bytes:
    """Return a PNG of all wall time as one bar per run."""
    figure = Figure(figsize=(10.6, _times_height(len(times))), layout="constrained")
    _draw_times(figure.add_subplot(), times)
    return _png(figure)


def _times_height(num_runs: int) -> float:
    return 1.0 + 0.3 * num_runs


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _draw(axes: Axes, panel: Panel, resumed_at: Sequence[int], styles: Mapping[str, Style] | None) -> None:
    # Up to four lines differ by hue; more are an ordered family of bins, and differ by lightness.
    ordered = styles is None and len(panel.lines) > 4
    if ordered:
        ramp = colormaps["viridis"](np.linspace(0.0, 0.85, len(panel.lines)))
        styles = {label: Style(color) for label, color in zip(panel.lines, ramp, strict=True)}
    styles = styles or run_styles(list(panel.lines))
    for label, band in panel.bands.items():
        axes.fill_between(*band, color=styles[label].color, alpha=0.15, linewidth=0)
    for label, (x, y) in panel.lines.items():
        _draw_line(axes, label, np.asarray(x, float), np.asarray(y, float), styles[label], panel.noisy)
    for number, samples in enumerate(resumed_at if panel.x_name == "samples" else ()):
        axes.axvline(samples, color=MUTED, linewidth=0.7, linestyle=":", label="resumed" if number == 0 else None)
    if _spans_decades([y for _, y in panel.lines.values()]):
        axes.set_yscale("log")
    axes.set_title(panel.title, loc="left", color=INK, fontsize=11, fontweight="bold", parse_math=False)
    axes.set_xlabel(panel.x_name, color=MUTED, fontsize=8.5)
    if panel.x_name == "samples":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda samples, _: format_count(samples)))
    elif all(float(value).is_integer() for x, _ in panel.lines.values() for value in x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(which="both", colors=MUTED, labelsize=8.5, length=0)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        labels = [_short(label) for label in labels]
        legend = axes.legend(handles, labels, frameon=False, fontsize=8, labelcolor=MUTED, ncols=3 if ordered else 1)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _draw_line(axes: Axes, label: str, x: np.ndarray, y: np.ndarray, style: Style, noisy: bool) -> None:
    window = len(y) // 40
    if noisy and window >= 3:
        axes.plot(x, y, color=style.color, linewidth=0.8, alpha=0.25)
        y = np.convolve(y, np.full(window, 1 / window), mode="valid")
        x = x[window // 2 :][: len(y)]
    marker = "o" if len(y) < 15 else None
    axes.plot(x, y, color=style.color, linestyle=style.dash, linewidth=1.6, label=label, marker=marker, markersize=3)


def _draw_times(axes: Axes, times: Mapping[str, Goodput]) -> None:
    labelled: set[str] = set()
    for row, of_run in enumerate(times.values()):
        total, begin = sum(of_run.seconds.values()), 0.0
        for kind, seconds in of_run.seconds.items():
            if not seconds:
                continue
            label = kind.replace("_", " ")
            if len(times) == 1:
                label += f" {seconds / total:.1%}"
            axes.barh(
                row,
                seconds / total,
                left=begin,
                height=0.72,
                color=_TIME_COLORS[kind],
                label=None if kind in labelled else label,
            )
            labelled.add(kind)
            begin += seconds / total
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    words = {
        name: f"{format_duration(sum(of.seconds.values()))}, {of.productive_share:.1%}" for name, of in times.items()
    }
    if len(times) == 1:
        (only,) = words.values()
        title = f"wall time {only.replace(', ', ', productive ')}"
        axes.set_axis_off()
    else:
        title = "wall time, and how much of it was productive"
        axes.set_yticks(
            range(len(times)), [f"{_short(name)}\n{text}" for name, text in words.items()], parse_math=False
        )
        axes.tick_params(colors=MUTED, labelsize=8.5, length=0, labelbottom=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.legend(frameon=False, fontsize=8, labelcolor=MUTED, ncols=6, loc="upper left", bbox_to_anchor=(0, 0))


def _short(label: str) -> str:
    """Shorten a label in the middle: names of runs mostly differ at their beginning or end."""
    half = _MAX_LABEL // 2
    return label if len(label) <= _MAX_LABEL else f"{label[:half]}…{label[1 - half :]}"


def _spans_decades(lines: Sequence[Sequence[float]]) -> bool:
    """Whether a logarithmic axis is better: all values are positive, and the largest is over 30 times the smallest."""
    values = np.concatenate([np.asarray(line, float) for line in lines])
    values = values[np.isfinite(values)]
    return values.size > 0 and values.min() > 0 and values.max() > 30 * values.min()
