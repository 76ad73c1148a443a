"""The picture of a sweep: a panel per setting, time over tokens, a line per contender."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pomscale.benchmarks.operators.cases import Case
from pomscale.benchmarks.operators.measurer import Row
from pomscale.monitoring.report.plots import COLORS

_COLUMNS = 4


def draw(curves: Mapping[Case, Mapping[int, Sequence[Row]]]) -> Figure:
    """Draw the busy time of forward and backward of each contender, by curve and number of tokens."""
    names = sorted({row.contender for points in curves.values() for rows in points.values() for row in rows})
    styles = {name: (COLORS[number % len(COLORS)], "o^sv"[number // len(COLORS)]) for number, name in enumerate(names)}
    num_columns = min(_COLUMNS, len(curves))
    num_rows = math.ceil(len(curves) / num_columns)
    figure = Figure(figsize=(4 * num_columns, 3.4 * num_rows + 0.6), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes, (curve, points) in zip(panels, curves.items(), strict=False):
        for name in names:
            line = [(n, row.times["training"].busy_s) for n, rows in points.items() for row in rows
                    if row.contender == name and row.times]  # fmt: skip
            if line:
                color, marker = styles[name]
                axes.plot(*zip(*sorted(line), strict=True), label=name, color=color, marker=marker, markersize=3)
        _label(axes, _title(curve, next(iter(curves))))
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def _title(curve: Case, base: Case) -> str:
    """Return what differs from the first curve, or the whole setting of the first."""
    differs = [
        f"{f.name} {getattr(curve, f.name)}" for f in fields(curve) if getattr(curve, f.name) != getattr(base, f.name)
    ]
    return ", ".join(differs) or str(curve).removeprefix("N 0 ")


def _label(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=8)
    axes.set(xlabel="tokens", ylabel="forward and backward, s")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
