"""Sweeps of sampling options over one checkpoint: `pomscale evaluate images SOURCE --sweep guidance=0,1,2 ...`.

Each point of the grid is an evaluation of its own, with a work folder of its own, so that a sweep goes on point by
point after a kill, and its points may be jobs.

    FOLDER/POINT/RESULT      metrics and settings of a point, e.g. in guidance=1_interval=0-0.9
    FOLDER/sweep.json, .csv  the table of all points
    FOLDER/sweep.png         quality against guidance, or against another axis of numbers
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write, write_text
from pomscale.evaluation.generated.work_folder import RESULT
from pomscale.monitoring.report.plots import Panel, draw_panel
from pomscale.runs.metric_names import QUALITY

SEED = "seed"
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")
# Axes that vary how is measured, and not what: figures of two of their values cannot be better or worse.
_OF_MEASUREMENT = {
    "any-crop", "extractor", "filter", "fit", "fps", "frame-stride", "grey", "kid-subsets", "measured-frames",
    "num-reference", "num-samples", "reference", "splits",
}  # fmt: skip
_FIRST_CHOICE = "guidance"  # of the axis to draw quality against
_HIGHER_IS_BETTER = ("inception_score", "clip_score", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class SweepResult:
    """Values of a point by axis, and its result; None while there is none."""

    point: dict[str, str]
    metrics: dict[str, float] | None = None
    settings: dict[str, Any] | None = None


def parse_axes(words: Sequence[str]) -> dict[str, list[str]]:
    """Read axes such as "guidance=0,1,2"; one word may hold several: "guidance=0,1,interval=0:1,0:0.9".

    Raises:
        InputError: A word has no axis, or an axis has no value, the same one twice, or is there twice.
    """
    axes: dict[str, list[str]] = {}
    for word in words:
        axis = ""
        for part in word.split(","):
            name, has_name, value = part.partition("=")
            if has_name:
                axis = name.strip()
                if not axis or axis in axes:
                    raise InputError(f"--sweep {word}: {axis or 'an axis without a name'} is there twice or is empty")
                axes[axis] = []
            elif not axis:
                raise InputError(f"--sweep {word}: say what is varied, such as guidance=0,1,2")
            value = (value if has_name else part).strip()
            if not value or value in axes[axis]:
                raise InputError(f"--sweep {word}: {axis} has an empty value or the same one twice")
            axes[axis].append(value)
    return axes


def grid(axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Return all points; the last axis varies fastest. InputError if two values cannot be told apart as folders."""
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len({point_name(point) for point in points}) < len(points):
        raise InputError("--sweep: two values differ only in characters that cannot be in the name of a folder")
    return points


def point_name(point: Mapping[str, str]) -> str:
    """Return the name of a point's folder. A colon would end a path in PYTHONPATH, and a slash one in the folder."""
    return "_".join(f"{axis}={_NOT_IN_NAMES.sub('-', value)}" for axis, value in point.items())


def read_results(folder: Path, points: Sequence[Mapping[str, str]]) -> list[SweepResult]:
    """Return the results so far. InputError for a result that cannot be read."""
    found = []
    for point in points:
        path = folder / point_name(point) / RESULT
        if not path.is_file():
            found.append(SweepResult(dict(point)))
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append(SweepResult(dict(point), content["metrics"], content["settings"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a result ({error!r}); delete it, and run again") from error
    return found


def metric_names(results: Sequence[SweepResult]) -> list[str]:
    """Return the metrics that were measured, in the order of the results."""
    return list(dict.fromkeys(name for result in results for name in result.metrics or {}))


def text_table(results: Sequence[SweepResult]) -> str:
    """Return the table for people. The best of the foremost metric is marked; points without a result are listed."""
    metrics = metric_names(results)
    best = best_point(results)
    rows = [[*results[0].point, *metrics, ""]]
    for result in results:
        cells = ["-" if result.metrics is None else _cell(result.metrics.get(name)) for name in metrics]
        mark = "no result yet" if result.metrics is None else "best" if result is best else ""
        rows.append([*result.point.values(), *cells, mark])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def best_point(results: Sequence[SweepResult]) -> SweepResult | None:
    """Return the point with the best foremost metric; None before there are two results that are numbers.

    None also where points were measured differently, such as on more frames.
    """
    if any(axis in _OF_MEASUREMENT for axis in results[0].point):
        return None
    figure = _foremost(results)
    done = [result for result in results if math.isfinite((result.metrics or {}).get(figure or "", math.nan))]
    if figure is None or len(done) < 2:
        return None
    sign = -1.0 if figure in _HIGHER_IS_BETTER else 1.0
    return min(done, key=lambda result: sign * (result.metrics or {})[figure])


def _foremost(results: Sequence[SweepResult]) -> str | None:
    metrics = metric_names(results)
    return next((figure for figure in QUALITY if figure in metrics), metrics[0] if metrics else None)


def write_tables(folder: Path, results: Sequence[SweepResult]) -> list[Path]:
    """Write sweep.json, sweep.csv, and sweep.png if there is something to draw. Return their paths."""
    paths = [folder / "sweep.json", folder / "sweep.csv", folder / "sweep.png"]
    rows = [{"point": one.point, "metrics": one.metrics, "settings": one.settings} for one in results]
    write_text(paths[0], json.dumps(rows, indent=1) + "\n")
    metrics, written = metric_names(results), io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow([*results[0].point, *metrics])
    for result in results:
        table.writerow([*result.point.values(), *((result.metrics or {}).get(name, "") for name in metrics)])
    write_text(paths[1], written.getvalue())
    panel = quality_panel(results)
    if panel is None:
        return paths[:2]
    with atomic_write(paths[2]) as stream:
        stream.write(draw_panel(panel))
    return paths


def quality_panel(results: Sequence[SweepResult]) -> Panel | None:
    """Return the foremost metric against guidance, or the first axis of numbers: the U-curve.

    A line per point of the other axes. Seeds are no axis of lines: their mean is drawn, with an area of one standard
    deviation around it. None if fewer than two values of the axis have results.
    """
    figure, axis = _foremost(results), _drawn_axis(results)
    if figure is None or axis is None:
        return None
    lines: dict[str, dict[float, list[float]]] = {}
    for result in results:
        if result.metrics is not None and figure in result.metrics:
            rest = [f"{name} {value}" for name, value in result.point.items() if name not in (axis, SEED)]
            values = lines.setdefault(", ".join(rest) or figure, {})
            values.setdefault(float(result.point[axis]), []).append(result.metrics[figure])
    if max((len(line) for line in lines.values()), default=0) < 2:
        return None
    panel_lines, bands = {}, {}
    for label, line in lines.items():
        x = sorted(line)
        mean = [fmean(line[at]) for at in x]
        spread = [stdev(line[at]) if len(line[at]) > 1 else 0.0 for at in x]
        panel_lines[label] = (x, mean)
        if any(spread):
            low = [value - by for value, by in zip(mean, spread, strict=True)]
            bands[label] = (x, low, [value + by for value, by in zip(mean, spread, strict=True)])
    return Panel(f"{figure} against {axis}", panel_lines, x_name=axis, bands=bands)


def _drawn_axis(results: Sequence[SweepResult]) -> str | None:
    axes = list(results[0].point)
    numbers = [
        axis
        for axis in axes
        if axis != SEED
        and all(_is_number(result.point[axis]) for result in results)
        and len({result.point[axis] for result in results}) > 1
    ]
    return _FIRST_CHOICE if _FIRST_CHOICE in numbers else next(iter(numbers), None)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
