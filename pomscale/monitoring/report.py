"""`pomscale report`: a run folder as one picture and one self-contained HTML page.

Only files of the run folder are read, so it works without a network, on a run that is still going, and on one that
was killed. Next to metrics.jsonl these are shown where they exist: recipe.yaml, outcome.json, code.json,
incarnations.jsonl, events.jsonl, samples/*.png and checkpoints/*/.
"""

from __future__ import annotations

import base64
import io
import json
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pomscale.errors import InputError
from pomscale.monitoring.history import History, read_history
from pomscale.monitoring.ledger import Goodput, goodput
from pomscale.monitoring.names import VALIDATION_BIN_PREFIX, WALL_TIME, describe
from pomscale.monitoring.text import format_count, format_duration

NUM_SAMPLE_GRIDS = 4

_INK, _MUTED, _RULE = "#1f2733", "#6b7686", "#e3e7ed"
_LINE_COLORS = ("#2563c9", "#d9622b", "#2a9d6f", "#8a4fbf")
# Green is what counts; everything else is told apart by hue, what is nobody's fault in greys.
_TIME_COLORS = {
    "productive": "#2a9d6f",
    "lost": "#b3261e",
    "queue": "#c9d0da",
    "down": "#9aa4b2",
    "start_up": "#2563c9",
    "compile": "#7aa2e8",
    "data_wait": "#d9622b",
    "checkpoint_stall": "#8a4fbf",
    "evaluation": "#e3b341",
    "rollback": "#e58a8a",
    "other": "#56606f",
}


@dataclass(frozen=True)
class ReportPaths:
    png: Path
    html: Path


@dataclass(frozen=True)
class Panel:
    """One plot. lines: label -> (samples, values); noisy: show a running mean over a faint curve."""

    title: str
    lines: dict[str, tuple[list[int], list[float]]]
    noisy: bool = False


def write_report(run_folder: Path, out: Path | None = None) -> ReportPaths:
    """Write report.png and report.html into the folder `out` (default: the run folder).

    Raises InputError when the run has logged nothing yet.
    """
    history = read_history(run_folder)
    if not history.series:
        raise InputError(f"no metrics in {run_folder}: nothing was logged yet")
    out = out or run_folder
    out.mkdir(parents=True, exist_ok=True)
    paths = ReportPaths(png=out / "report.png", html=out / "report.html")
    panels = _panels(history)
    times = goodput(run_folder)
    paths.png.write_bytes(_render_overview(run_folder.resolve().name, panels, history.resumed_at, times))
    paths.html.write_text(_render_page(run_folder.resolve(), history, panels, times), encoding="utf-8")
    return paths


def _panels(history: History) -> list[Panel]:
    """The plots for which the run has data, in reading order."""

    def lines(names: dict[str, str]) -> dict[str, tuple[list[int], list[float]]]:
        return {label: history.series[name] for name, label in names.items() if name in history.series}

    bins = sorted(name for name in history.series if name.startswith(VALIDATION_BIN_PREFIX))
    panels = [
        Panel("loss", lines({"train/loss": "training", "validation/loss": "validation"}), noisy=True),
        Panel(
            "validation loss by time bin, 0 = nearest to the data",
            lines({name: f"bin {name.removeprefix(VALIDATION_BIN_PREFIX)}" for name in bins}),
        ),
        Panel("gradient norm", lines({"train/grad_norm": "gradient norm"}), noisy=True),
        Panel("learning rate", lines({"train/learning_rate": "learning rate"})),
        Panel("speed, samples/s", lines({"speed/samples_per_s": "speed"}), noisy=True),
        Panel("share of time waiting for data", lines({"speed/data_wait_share": "data wait"}), noisy=True),
        Panel(
            "memory, GiB",
            lines({"memory/peak_gib": "peak", "host/memory_gib": "host", "host/process_memory_gib": "process"}),
        ),
    ]
    return [panel for panel in panels if panel.lines]


# --- plots ---------------------------------------------------------------------------------------------------------


def _render_overview(name: str, panels: list[Panel], resumed_at: list[int], times: Goodput | None) -> bytes:
    num_rows = -(-len(panels) // 2)
    heights = [3.1] * num_rows + ([1.3] if times is not None else [])
    figure = Figure(figsize=(12, 0.6 + sum(heights)), layout="constrained")
    figure.suptitle(name, color=_INK, fontsize=14, fontweight="bold", parse_math=False)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for index, panel in enumerate(panels):
        _draw(figure.add_subplot(grid[index // 2, index % 2]), panel, resumed_at)
    if times is not None:
        _draw_times(figure.add_subplot(grid[-1, :]), times)
    return _png(figure)


def _render_times(times: Goodput) -> bytes:
    figure = Figure(figsize=(10.6, 1.3), layout="constrained")
    _draw_times(figure.add_subplot(), times)
    return _png(figure)


def _render_panel(panel: Panel, resumed_at: list[int]) -> bytes:
    figure = Figure(figsize=(5.2, 3), layout="constrained")
    _draw(figure.add_subplot(), panel, resumed_at)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _draw(axes: Axes, panel: Panel, resumed_at: list[int]) -> None:
    # A handful of quantities are told apart by hue, an ordered family of bins by lightness.
    ordered = len(panel.lines) > len(_LINE_COLORS)
    ramp = colormaps["viridis"](np.linspace(0.0, 0.85, len(panel.lines)))
    for (label, (samples, values)), color in zip(panel.lines.items(), ramp if ordered else _LINE_COLORS, strict=False):
        _draw_line(axes, label, np.asarray(samples), np.asarray(values), color, panel.noisy)
    for number, samples_at_resume in enumerate(resumed_at):
        axes.axvline(
            samples_at_resume, color=_MUTED, linewidth=0.7, linestyle=":", label="resumed" if number == 0 else None
        )
    if _spans_decades([values for _, values in panel.lines.values()]):
        axes.set_yscale("log")
    axes.set_title(panel.title, loc="left", color=_INK, fontsize=10, fontweight="bold")
    axes.set_xlabel("samples", color=_MUTED, fontsize=8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda samples, _: format_count(samples)))
    axes.tick_params(which="both", colors=_MUTED, labelsize=8, length=0)
    axes.grid(color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_RULE)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=7, labelcolor=_MUTED, ncols=3 if ordered else 1)


def _draw_line(axes: Axes, label: str, samples: np.ndarray, values: np.ndarray, color: Any, noisy: bool) -> None:
    window = len(values) // 40
    if noisy and window >= 3:
        axes.plot(samples, values, color=color, linewidth=0.8, alpha=0.3)
        values = np.convolve(values, np.full(window, 1 / window), mode="valid")
        samples = samples[window // 2 :][: len(values)]
    marker = "o" if len(values) < 15 else None
    axes.plot(samples, values, color=color, linewidth=1.6, label=label, marker=marker, markersize=3)


def _draw_times(axes: Axes, times: Goodput) -> None:
    """All wall time as one bar."""
    total, begin = sum(times.seconds.values()), 0.0
    for kind, seconds in times.seconds.items():
        if not seconds:
            continue
        label = f"{kind.replace('_', ' ')} {seconds / total:.1%}"
        axes.barh(0, seconds / total, left=begin, color=_TIME_COLORS[kind], label=label)
        begin += seconds / total
    title = f"wall time {format_duration(total)}, productive {times.productive_share:.1%}"
    axes.set_title(title, loc="left", color=_INK, fontsize=10, fontweight="bold")
    axes.set_xlim(0, 1)
    axes.set_axis_off()
    axes.legend(frameon=False, fontsize=7, labelcolor=_MUTED, ncols=6, loc="upper left", bbox_to_anchor=(0, 0))


def _spans_decades(lines: list[list[float]]) -> bool:
    """Whether a logarithmic axis shows more: all values positive, the largest 30 times the smallest."""
    values = np.concatenate(lines)
    values = values[np.isfinite(values)]
    return values.size > 0 and values.min() > 0 and values.max() > 30 * values.min()


# --- page ----------------------------------------------------------------------------------------------------------

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f9; color: #1f2733; font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 16px 48px; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 1.1rem; }
.sub { margin: 4px 0 20px; color: #6b7686; }
.badge { display: inline-block; margin-left: 8px; padding: 2px 10px; border-radius: 99px; background: #e3ebf8;
         color: #2456a6; font-size: .8rem; font-weight: 600; vertical-align: middle; }
.note { padding: 8px 12px; border-left: 3px solid #d9622b; background: #fff; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 12px; }
.grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: 12px; }
.card, .tile, figure { margin: 0; padding: 12px; border: 1px solid #e3e7ed; border-radius: 10px; background: #fff; }
.card { overflow-x: auto; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span, figcaption { color: #6b7686; font-size: .82rem; overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; }
img.small { image-rendering: pixelated; }
table { width: 100%; border-collapse: collapse; font-size: .88rem; }
td, th { padding: 5px 10px 5px 0; border-bottom: 1px solid #eef1f5; text-align: left; vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th { color: #6b7686; font-weight: 600; }
.keys th { width: 25%; min-width: 8em; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { display: block; color: #6b7686; }
.keys td { overflow-wrap: anywhere; }
pre { margin: 0; font: .82rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
"""


def _render_page(run_folder: Path, history: History, panels: list[Panel], times: Goodput | None) -> str:
    """The page. Its content security policy forbids everything but inline styles and inline pictures."""
    title = escape(run_folder.name)
    outcome = _read_json(run_folder / "outcome.json")
    sections = [
        _header(run_folder.name, outcome, history),
        _tiles(history, times),
        _section("Samples", _sample_grids(run_folder)),
        _section("Curves", _plots(panels, history.resumed_at)),
        _section("Wall time", _wall_time(times)),
        _section("Last metrics", _metrics_table(history)),
        _section("Outcome", _key_values(outcome)),
        _section("Starts", _starts(history)),
        _section("Checkpoints", _checkpoints(run_folder)),
        _section("Data", _key_values(_data_card(run_folder))),
        _section("Code", _key_values(_read_json(run_folder / "code.json"))),
        _section("Versions", _key_values(history.incarnations[-1].get("versions", {}) if history.incarnations else {})),
        _section("Recipe", _recipe(run_folder)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{title} · pomscale report</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>" if body else ""


def _header(name: str, outcome: dict[str, Any], history: History) -> str:
    state = str(outcome.get("state", "outcome unreadable")) if outcome else "no outcome yet: running or killed"
    facts = [f"resumes: {len(history.resumed_at)}"]
    if history.last_time_unix_s is not None:
        facts.insert(0, f"last metrics {_utc(history.last_time_unix_s)}")
    note = ""
    if history.num_unreadable:
        note = f'<p class="note">{history.num_unreadable} unreadable lines of metrics.jsonl are left out.</p>'
    return (
        f'<h1>{escape(name)}<span class="badge">{escape(state)}</span></h1>'
        f'<p class="sub">{escape(" · ".join(facts))}</p>{note}'
    )


def _utc(time_unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time_unix_s))


def _tiles(history: History, times: Goodput | None) -> str:
    last_samples = max(samples[-1] for samples, _ in history.series.values())
    shown = [("samples seen", format_count(last_samples))]
    for label, name in (
        ("training loss", "train/loss"),
        ("validation loss", "validation/loss"),
        ("samples per second", "speed/samples_per_s"),
        ("peak memory, GiB", "memory/peak_gib"),
    ):
        if name in history.series:
            shown.append((label, f"{history.series[name][1][-1]:.4g}"))
    if times is not None:
        shown.append(("of the wall time was productive", f"{times.productive_share:.1%}"))
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in shown
    )
    return f'<div class="tiles">{tiles}</div>'


def _picture(png: bytes, alt: str, caption: str = "") -> str:
    width = int.from_bytes(png[16:20], "big")  # of the PNG header
    kind = ' class="small"' if width < 400 else ""  # a grid of tiny pictures is enlarged: show its pixels, no blur
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img{kind} src="{source}" alt="{escape(alt)}">{caption}</figure>'


def _plots(panels: list[Panel], resumed_at: list[int]) -> str:
    plots = "".join(_picture(_render_panel(panel, resumed_at), panel.title) for panel in panels)
    return f'<div class="plots">{plots}</div>'


def _sample_grids(run_folder: Path) -> str:
    """The newest grids first; file names begin with the samples seen, so their order is that of the run."""
    paths = sorted((run_folder / "samples").glob("*.png"))[: -NUM_SAMPLE_GRIDS - 1 : -1]
    grids = "".join(_picture(path.read_bytes(), f"sample grid {path.stem}", path.name) for path in paths)
    return f'<div class="grids">{grids}</div>' if grids else ""


def _wall_time(times: Goodput | None) -> str:
    """Where the time went, over all incarnations, and what happened."""
    if times is None:
        return ""
    total = sum(times.seconds.values())
    rows = "".join(
        f"<tr><td>{kind.replace('_', ' ')}<small>{WALL_TIME[kind]}</small></td>"
        f'<td class="number">{format_duration(seconds)}</td><td class="number">{seconds / total:.2%}</td></tr>'
        for kind, seconds in times.seconds.items()
        if seconds
    )
    events = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in sorted(times.events.items()))
    note = f'<p class="note">{escape(events)}</p>' if events else ""
    bar = _picture(_render_times(times), f"productive {times.productive_share:.1%} of the wall time")
    head = "<tr><th>spent on</th><th>time</th><th>share</th></tr>"
    return f'{bar}{note}<div class="card"><table>{head}{rows}</table></div>'


def _metrics_table(history: History) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}<small>{escape(describe(name))}</small></td>"
        f'<td class="number">{values[-1]:.5g}</td><td class="number">{format_count(samples[-1])}</td></tr>'
        for name, (samples, values) in sorted(history.series.items())
    )
    head = "<tr><th>metric</th><th>last value</th><th>at samples</th></tr>"
    return f'<div class="card"><table>{head}{rows}</table></div>'


def _key_values(content: dict[str, Any]) -> str:
    if not content:
        return ""
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in _flatten(content))
    return f'<div class="card keys"><table>{rows}</table></div>'


def _flatten(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _starts(history: History) -> str:
    rows = [
        [_utc(start["started_unix_s"]), format_count(start["start_samples"]), str(start["num_ranks"]), start["host"]]
        for start in history.incarnations
    ]
    return _table(["started", "from samples", "ranks", "host"], rows)


def _checkpoints(run_folder: Path) -> str:
    rows = []
    for folder in _checkpoint_folders(run_folder):
        try:
            size_mib = sum(file.stat().st_size for file in folder.rglob("*")) / 2**20
        except FileNotFoundError:
            continue  # the run that is going on has just replaced it by a newer one
        state = "complete" if (folder / "COMPLETE").exists() else "incomplete, never loaded"
        rows.append([folder.name, f"{size_mib:.1f} MiB", state])
    return _table(["folder", "size", "state"], rows)


def _checkpoint_folders(run_folder: Path) -> list[Path]:
    return sorted(path for path in (run_folder / "checkpoints").glob("*") if path.is_dir())


def _data_card(run_folder: Path) -> dict[str, Any]:
    """Where the training data lay, its fingerprint and how it was normalised, by the newest readable checkpoint."""
    for folder in reversed(_checkpoint_folders(run_folder)):
        meta = _read_json(folder / "checkpoint.json")
        if "data" in meta:
            shown = ("codec", "codec_identity", "latent_mean", "latent_std")
            datasets = {f"dataset {number}": dataset for number, dataset in enumerate(meta["data"])}
            return {**datasets, **{key: meta["card"][key] for key in shown if key in meta["card"]}}
    return {}


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="card"><table><tr>{cells}</tr>{body}</table></div>'


def _recipe(run_folder: Path) -> str:
    path = run_folder / "recipe.yaml"
    return f'<div class="card"><pre>{escape(path.read_text(encoding="utf-8"))}</pre></div>' if path.exists() else ""


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty without the file, and the reason when it was cut off by a kill."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {"unreadable": str(error)}
    return content if isinstance(content, dict) else {path.stem: content}
