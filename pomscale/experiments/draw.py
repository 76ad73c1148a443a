"""What an experiment ends in: a table, a plot with the spread of the seeds, and a row for a page of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pomscale.base.files import atomic_write, write_text
from pomscale.experiments.results import Results, Row, Spread, write_results
from pomscale.monitoring.report.plots import run_styles

TABLE_FILE, PLOT_FILE, ROW_FILE = "table.txt", "plot.png", "row.md"


def draw(folder: Path, results: Results) -> str:
    """Write results.json, table.txt, plot.png and row.md to the experiment's folder, and return the table."""
    write_results(folder, results)
    shown = table(results)
    write_text(folder / TABLE_FILE, shown + "\n")
    write_text(folder / ROW_FILE, markdown_row(results) + "\n")
    if results.measured:
        with atomic_write(folder / PLOT_FILE) as stream:
            plot(results).savefig(stream, format="png", dpi=150)
    return shown


def table(results: Results) -> str:
    """Return a table: a row per point, with mean and standard deviation over the seeds of each measure."""
    recipe, rows = results.recipe, results.rows
    measures = recipe.table or list(recipe.measures)
    head = [*recipe.axes, *(_heading(results, name) for name in measures)]
    cells = [[*row.values.values(), *(_cell(results, row, name) for name in measures)] for row in rows]
    widths = [max(len(line[column]) for line in [head, *cells]) for column in range(len(head))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) for line in [head, *cells]]
    return "\n".join([recipe.title or recipe.name, *(line.rstrip() for line in lines), *_notes(results)])


def _notes(results: Results) -> list[str]:
    seeds = len(results.recipe.seeds)
    notes = [f"mean ± standard deviation over {seeds} seeds; {results.command}; commit {results.machine['commit']}"]
    if results.missing:
        total = len(results.missing) + len(results.measured)
        notes.append(f"{len(results.missing)} of {total} points are missing: {', '.join(results.missing)}")
    return notes


def _heading(results: Results, measure: str) -> str:
    return results.recipe.measures[measure].label or measure


def _cell(results: Results, row: Row, measure: str) -> str:
    spread, form = row.spreads[measure], results.recipe.measures[measure].format
    shown = format(spread.mean, form)
    if spread.greatest > spread.least:
        shown += f" ± {format(spread.std, form)}"
    return shown if spread.num == len(results.recipe.seeds) else f"{shown} ({spread.num})"


def markdown_row(results: Results) -> str:
    """Return a row for docs/results.md: what was measured, what came out of the first measure, and the command."""
    recipe = results.recipe
    first = (recipe.table or recipe.plot.y)[0]
    figures = "; ".join(f"{', '.join(row.values.values())}: {_cell(results, row, first)}" for row in results.rows)
    cells = (recipe.title or recipe.name, f"{_heading(results, first)}: {figures}", f"`{results.command}`")
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def plot(results: Results) -> Figure:
    """Return a figure with a panel per measure, the mean of every line in a band from the least to the greatest."""
    recipe, spec = results.recipe, results.recipe.plot
    lines: dict[str, list[Row]] = {}
    for row in results.rows:
        lines.setdefault(", ".join(row.values[axis] for axis in recipe.lines), []).append(row)
    figure = Figure(figsize=(1 + 5 * len(spec.y), 4.2), layout="constrained")
    panels = figure.subplots(1, len(spec.y), squeeze=False)[0]
    for axes, measure in zip(panels, spec.y, strict=True):
        _panel(axes, results, lines, measure)
    figure.suptitle(recipe.title or recipe.name)
    return figure


def _panel(axes: Axes, results: Results, lines: dict[str, list[Row]], measure: str) -> None:
    spec = results.recipe.plot
    ticks = _ticks(results)
    for (name, rows), style in zip(lines.items(), run_styles(list(lines)).values(), strict=True):
        x = [_x(results, row, ticks) for row in rows]
        spreads = [row.spreads[measure] for row in rows]
        axes.plot(x, [spread.mean for spread in spreads], style.dash, color=style.color, marker="o", label=name or None)
        _band(axes, x, spreads, style.color)
    if spec.log_x and not ticks:
        axes.set_xscale("log")
    if spec.log_y:
        axes.set_yscale("log")
    if ticks:
        axes.set_xticks(range(len(ticks)), ticks)
    x_name = spec.x if spec.x in results.recipe.axes else _heading(results, spec.x)
    axes.set(xlabel=x_name, ylabel=_heading(results, measure))
    axes.grid(alpha=0.3)
    if any(lines):
        axes.legend()


def _band(axes: Axes, x: Sequence[float], spreads: Sequence[Spread], color: str) -> None:
    """Draw the least and the greatest of the seeds: as a band, and at each point, since a line may have only one."""
    least, greatest = [one.least for one in spreads], [one.greatest for one in spreads]
    axes.fill_between(x, least, greatest, color=color, alpha=0.2, linewidth=0)
    axes.vlines(x, least, greatest, color=color, linewidth=1)


def _ticks(results: Results) -> list[str]:
    """Return the names along x, if x is an axis whose values are no numbers; else []."""
    spec, axes = results.recipe.plot, results.recipe.axes
    if spec.x not in axes:
        return []
    axis = axes[spec.x]
    return axis.labels if any(axis.number(name) is None for name in axis.labels) else []


def _x(results: Results, row: Row, ticks: list[str]) -> float:
    spec = results.recipe.plot
    if ticks:
        return ticks.index(row.values[spec.x])
    if spec.x in results.recipe.axes:
        return float(row.values[spec.x])
    return row.spreads[spec.x].mean
