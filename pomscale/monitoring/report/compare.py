"""Report of several runs side by side: how their recipes and their results differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import yaml

from pomscale.base.console import format_count, format_duration
from pomscale.monitoring.report import html
from pomscale.monitoring.report.plots import Panel, Style, draw_overview, draw_panel, draw_times, run_styles
from pomscale.monitoring.report.run import (
    V_LOSS_TITLE,
    Run,
    evaluation_figures,
    read_object,
    sample_grids,
    sample_prompts,
)
from pomscale.runs.evaluation_log import CurveNames
from pomscale.runs.layout import CODE_STATE_FILE, RECIPE_FILE
from pomscale.runs.metric_names import (
    EVALUATION_PREFIX,
    GOODPUT_PREFIX,
    VALIDATION_BIN_PREFIX,
    WALL_TIME,
    describe,
    evaluation_of,
    plain_figure,
)
from pomscale.runs.result_settings import result_key, what_differs

# Metrics that most readers compare; all others that were logged are one click away.
_FOREMOST = (
    "train/loss", "validation/loss", "validation/v_loss", "speed/samples_per_s", "speed/mfu", "memory/peak_gib",
)  # fmt: skip

_LOSSES = (("training loss", "train/loss", True), ("held-out loss", "validation/loss", False))
_CURVES = (
    ("speed, samples/s", "speed/samples_per_s", True),
    ("model FLOP/s over the devices' peak", "speed/mfu", True),
    ("gradient norm", "train/grad_norm", True),
    ("learning rate", "train/learning_rate", False),
    ("share of time waiting for data", "speed/data_wait_share", True),
    ("peak memory, GiB", "memory/peak_gib", False),
)
_CSS_DASHES = {"-": "solid", "--": "dashed", ":": "dotted"}


def overview(runs: Sequence[Run]) -> bytes:
    """Return a PNG of all curves."""
    named = _named(runs)
    return draw_overview(_title(named), _panels(named), _times(named), styles=run_styles(list(named)))


def page(runs: Sequence[Run]) -> str:
    """Return the page as HTML."""
    named = _named(runs)
    styles = run_styles(list(named))
    plots = [html.plot(draw_panel(panel, styles=styles), panel.title) for panel in _panels(named)]
    return html.page(
        _title(named),
        [
            f'<h1>{len(named)} runs compared</h1><p class="sub">Every value and curve by samples seen.</p>',
            _legend(named, styles),
            html.section("Runs", _runs_table(named)),
            html.section("Curves", html.grid("plots", plots)),
            html.section("Last figures", _figures(named)),
            html.section("What was asked for differently", _differences(named)),
            html.section("Newest samples", html.grid("grids", _samples(named))),
            html.section("Wall time", _wall_time(named)),
        ],
    )


def _title(names: Iterable[str]) -> str:
    return " · ".join(names)


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Name each run by the last parts of its path, as many as it takes to tell them apart.

    Evaluations are named over all runs, so that runs have a figure in common only if they share its settings.
    """
    names, num_parts = CurveNames(), 1
    while len({_tail(run.folder, num_parts) for run in runs}) < len(runs):
        num_parts += 1
    return {_tail(run.folder, num_parts): _with_common_names(run, names) for run in runs}


def _with_common_names(run: Run, names: CurveNames) -> Run:
    history = run.history
    keys = {curve: result_key(settings) for curve, settings in history.settings.items()}
    renamed = {
        name: names.name(plain_figure(name), keys[evaluation_of(name)])
        for name in history.series
        if name.startswith(EVALUATION_PREFIX)
    }
    return replace(
        run,
        history=replace(
            history,
            series={renamed.get(name, name): curve for name, curve in history.series.items()},
            evaluations=[
                replace(one, metrics={renamed[name]: value for name, value in one.metrics.items()}, pictures={})
                for one in history.evaluations
            ],
        ),
    )


def _tail(folder: Path, num_parts: int) -> str:
    return "/".join(folder.parts[-num_parts:])


def _panels(named: Mapping[str, Run]) -> list[Panel]:
    """Return a panel for every curve that at least one run has."""
    lines = partial(_lines, named)
    metrics = {metric for run in named.values() for metric in run.history.series}
    single = [names[0] for names in evaluation_figures(metrics) if len(names) == 1]
    panels = [
        *_loss_panels(named),
        Panel(V_LOSS_TITLE, lines("validation/v_loss")),
        *(panel for panel in _evaluation_panels(named, single, lines) if panel.varies),
        *(Panel(title, lines(metric), noisy) for title, metric, noisy in _CURVES),
    ]
    return [panel for panel in panels if panel.lines]


def _lines(named: Mapping[str, Run], metric: str) -> dict[str, tuple[list[int], list[float]]]:
    return {name: run.history.series[metric] for name, run in named.items() if metric in run.history.series}


def _loss_panels(named: Mapping[str, Run]) -> list[Panel]:
    """Return panels of the losses of training; runs whose losses are of different things do not share one."""
    spaces: dict[str, dict[str, Run]] = {}
    for name, run in named.items():
        spaces.setdefault(run.loss_space, {})[name] = run
    panels = []
    for space, runs in spaces.items():
        of_space = f", {space}" if len(spaces) > 1 else ""
        panels += [Panel(title + of_space, _lines(runs, metric), noisy) for title, metric, noisy in _LOSSES]
        by_bin = f"last held-out loss by time bin, 0 = nearest to the data{of_space}"
        panels.append(Panel(by_bin, _by_bin(runs), x_name="time bin"))
    return panels


def _evaluation_panels(
    named: Mapping[str, Run], metrics: Sequence[str], lines: Callable[[str], dict[str, tuple[list[int], list[float]]]]
) -> list[Panel]:
    """Return a panel per figure and settings; where settings differ, the titles say in what."""
    settings = {curve: found for run in named.values() for curve, found in run.history.settings.items()}
    by_figure: dict[str, list[str]] = {}
    for metric in metrics:
        by_figure.setdefault(plain_figure(metric), []).append(metric)
    panels = []
    for figure, same in by_figure.items():
        labels = what_differs([settings[evaluation_of(metric)] for metric in same]) if len(same) > 1 else [""]
        for metric, label in zip(same, labels, strict=True):
            title = figure.removeprefix(EVALUATION_PREFIX) + (f": {label}" if label else "")
            panels.append(Panel(title, lines(metric)))
    return panels


def _by_bin(named: Mapping[str, Run]) -> dict[str, tuple[list[int], list[float]]]:
    found = {}
    for name, run in named.items():
        bins = sorted(metric for metric in run.history.series if metric.startswith(VALIDATION_BIN_PREFIX))
        if bins:
            numbers = [int(metric.removeprefix(VALIDATION_BIN_PREFIX)) for metric in bins]
            found[name] = (numbers, [run.history.series[metric][1][-1] for metric in bins])
    return found


def _times(named: Mapping[str, Run]) -> dict[str, Any]:
    return {name: run.times for name, run in named.items() if run.times is not None}


def _legend(named: Mapping[str, Run], styles: Mapping[str, Style]) -> str:
    entries = (
        f'<span><i class="key" style="border-top: 3px {_CSS_DASHES[styles[name].dash]} {styles[name].color}"></i>'
        f"{escape(name)}</span>"
        for name in named
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def _runs_table(named: Mapping[str, Run]) -> str:
    rows = []
    for name, run in named.items():
        times, last = run.times, run.history.last_time_unix_s
        rows.append(
            [
                name,
                run.state,
                format_count(run.last_samples),
                format_duration(sum(times.seconds.values())) if times is not None else html.MISSING,
                f"{times.productive_share:.1%}" if times is not None else html.MISSING,
                str(len(run.history.starts)),
                html.utc(last) if last is not None else html.MISSING,
            ]
        )
    head = ["run", "state", "samples", "wall time", "productive", "starts", "last metrics"]
    return html.table(head, rows, numbers_from=2, wide=True)


def _figures(named: Mapping[str, Run]) -> str:
    metrics = sorted({metric for run in named.values() for metric in run.history.series})
    foremost = [metric for metric in _FOREMOST if metric in metrics]
    evaluations = [names[0] for names in evaluation_figures(metrics) if len(names) == 1]
    rest = [metric for metric in metrics if metric not in {*foremost, *evaluations}]
    rest = [metric for metric in rest if not metric.startswith(GOODPUT_PREFIX)]  # the table of wall time shows these
    return _figures_table(named, [*foremost, *evaluations]) + html.folded(
        f"{len(rest)} more", _figures_table(named, rest)
    )


def _figures_table(named: Mapping[str, Run], metrics: Sequence[str]) -> str:
    rows = [
        [html.described(metric, describe(metric)), *(_last(run, metric) for run in named.values())]
        for metric in metrics
    ]
    return html.table(["metric", *named], rows, numbers_from=1, wide=True)


def _last(run: Run, metric: str) -> str:
    if metric not in run.history.series:
        return html.MISSING
    samples, values = run.history.series[metric]
    return html.described(f"{values[-1]:.5g}", f"at {format_count(samples[-1])}")


def _differences(named: Mapping[str, Run]) -> str:
    """Return a table of keys of recipe, code and versions that differ; a run that lacks a key counts as different."""
    asked = {name: _asked_for(run) for name, run in named.items()}
    keys = dict.fromkeys(key for content in asked.values() for key in content)
    rows = []
    for key in keys:
        values = [content.get(key, html.MISSING) for content in asked.values()]
        if len(set(values)) > 1:
            rows.append([key, *values])
    if not rows:
        return html.note("Nothing: recipes, code and versions are the same.")
    return html.table(["key", *named], rows, wide=True)


def _asked_for(run: Run) -> dict[str, str]:
    recipe = run.folder / RECIPE_FILE
    content: dict[str, Any] = {}
    if recipe.is_file():
        content = _without_lists(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    code = read_object(run.folder / CODE_STATE_FILE)
    if "git_commit" in code:
        content["code"] = {"git_commit": str(code["git_commit"])[:12], "dirty": code.get("dirty", False)}
    if run.history.starts:
        newest = run.history.starts[-1]
        content |= {"num_ranks": newest["num_ranks"], "versions": newest.get("versions", {})}
    return dict(html.flatten(content))


def _without_lists(recipe: Any) -> Any:
    """Return the recipe with each list as one value, since positions in a list have no names."""
    if isinstance(recipe, dict):
        return {str(key): _without_lists(value) for key, value in recipe.items()}
    return json.dumps(recipe) if isinstance(recipe, list) else recipe


def _samples(named: Mapping[str, Run]) -> list[str]:
    newest = {name: (run.folder, path) for name, run in named.items() for path in sample_grids(run.folder)[:1]}
    return [
        html.medium(path, f"{name}, {path.stem}", sample_prompts(folder)) for name, (folder, path) in newest.items()
    ]


def _wall_time(named: Mapping[str, Run]) -> str:
    times = _times(named)
    if not times:
        return ""
    rows = []
    for kind, meaning in WALL_TIME.items():
        if any(of_run.seconds[kind] for of_run in times.values()):
            cells = (
                html.described(format_duration(of_run.seconds[kind]), f"{of_run.seconds[kind] / total:.1%}")
                if (total := sum(of_run.seconds.values()))
                else html.MISSING
                for of_run in times.values()
            )
            rows.append([html.described(kind.replace("_", " "), meaning), *cells])
    return html.plot(draw_times(times), "wall time by run") + html.table(
        ["spent on", *times], rows, numbers_from=1, wide=True
    )
