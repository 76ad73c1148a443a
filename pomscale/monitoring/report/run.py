"""Report of one run.

Beside metrics.jsonl these are shown where they exist: recipe.yaml, outcome.json, code.json, incarnations.jsonl,
events.jsonl, evaluations.jsonl, evaluations/*/*/failed.json, samples/ and checkpoints/*/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pomscale.base.console import format_count, format_duration
from pomscale.base.jsonl import read_json_lines
from pomscale.config.train import DiffusionConfig
from pomscale.monitoring.report import html
from pomscale.monitoring.report.plots import Panel, draw_overview, draw_panel, draw_times
from pomscale.runs.checkpoint_folder import is_complete
from pomscale.runs.evaluation_log import IMAGES, VIDEOS, Evaluation
from pomscale.runs.history import History
from pomscale.runs.layout import (
    CHECKPOINT_META,
    CHECKPOINTS_FOLDER,
    CODE_STATE_FILE,
    EVALUATIONS_FOLDER,
    EVENTS_FILE,
    FAILED_FILE,
    OUTCOME_FILE,
    RECIPE_FILE,
    SAMPLES_FOLDER,
)
from pomscale.runs.ledger import Goodput
from pomscale.runs.metric_names import (
    EVALUATION_PREFIX,
    VALIDATION_BIN_PREFIX,
    WALL_TIME,
    describe,
    evaluation_of,
    plain_figure,
)
from pomscale.runs.result_settings import what_differs

NUM_SAMPLE_GRIDS = 4
_NUM_ALERTS = 20

FAMILY = re.compile(r"(.+)_\d+$")

V_LOSS_TITLE = "held-out loss in v, the same for every objective"


@dataclass(frozen=True)
class Run:
    """Content of a run folder; times is None without a ledger."""

    folder: Path
    history: History
    times: Goodput | None

    @property
    def outcome(self) -> dict[str, Any]:
        """Content of outcome.json; empty without the file."""
        return read_object(self.folder / OUTCOME_FILE)

    @property
    def state(self) -> str:
        """State in which the newest start ended, in words."""
        outcome = self.outcome
        return str(outcome.get("state", "outcome unreadable")) if outcome else "no outcome yet: running or killed"

    @property
    def last_samples(self) -> int:
        """Samples of the last row that counts."""
        return max(samples[-1] for samples, _ in self.history.series.values())

    @property
    def loss_space(self) -> str:
        """What the training loss is measured of, by the recipe; see DiffusionConfig.loss_space."""
        recipe = self.folder / RECIPE_FILE
        try:
            diffusion = yaml.safe_load(recipe.read_bytes())["diffusion"]
            return DiffusionConfig.model_validate(diffusion).loss_space
        except (FileNotFoundError, yaml.YAMLError, KeyError, TypeError, ValidationError):
            return "not known of what"

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric; None if it was never logged."""
        series = self.history.series.get(metric)
        return series[1][-1] if series else None


def overview(run: Run) -> bytes:
    """Return a PNG of all curves."""
    times = {run.folder.name: run.times} if run.times is not None else {}
    return draw_overview(run.folder.name, _panels(run.history), times, resumed_at=run.history.resumed_at)


def page(run: Run) -> str:
    """Return the page as HTML."""
    history, folder = run.history, run.folder
    versions = history.starts[-1].get("versions", {}) if history.starts else {}
    recipe = folder / RECIPE_FILE
    return html.page(
        folder.name,
        [
            _header(run),
            _tiles(run),
            html.section("Samples", html.grid("grids", _samples(folder))),
            html.section("Curves", _plots(_panels(history), history)),
            html.section("Evaluations of checkpoints", _evaluations(run)),
            html.section("Wall time", _wall_time(run.times)),
            html.section("Alerts", _alerts(folder)),
            html.section("Last metrics", _metrics_table(history)),
            html.section("Outcome", html.key_values(run.outcome)),
            html.section("Starts", _starts(history)),
            html.section("Checkpoints", _checkpoints(folder)),
            html.section("Data", html.key_values(_data_card(folder))),
            html.section("Code", html.key_values(read_object(folder / CODE_STATE_FILE))),
            html.section("Versions", html.key_values(versions)),
            html.section(
                "Recipe",
                html.preformatted(recipe.read_text(encoding="utf-8", errors="replace")) if recipe.exists() else "",
            ),
        ],
    )


def sample_grids(folder: Path) -> list[Path]:
    """Return the newest sample grids and clips, newest first; their names begin with the samples seen."""
    media = [path for path in (folder / SAMPLES_FOLDER).glob("*") if path.suffix.lower() in IMAGES + VIDEOS]
    return sorted(html.without_posters(media))[: -NUM_SAMPLE_GRIDS - 1 : -1]


def sample_prompts(folder: Path) -> list[str]:
    """Return the prompts of the rows of what the run draws, by its recipe; empty for classes or a damaged recipe."""
    recipe = folder / RECIPE_FILE
    try:
        content = yaml.safe_load(recipe.read_bytes())
        return [str(prompt) for prompt in content["sampling"]["prompts"]]
    except (FileNotFoundError, yaml.YAMLError, KeyError, TypeError):
        return []


def _samples(folder: Path) -> list[str]:
    prompts = sample_prompts(folder)
    return [html.medium(path, path.name, prompts) for path in sample_grids(folder)]


def evaluation_figures(series: Iterable[str]) -> list[list[str]]:
    """Return the names of evaluations' figures, grouped by family (KEY_00, KEY_01, ...)."""
    families: dict[str, list[str]] = {}
    for name in sorted(name for name in series if name.startswith(EVALUATION_PREFIX)):
        family = FAMILY.fullmatch(name)
        families.setdefault(family[1] if family else name, []).append(name)
    return list(families.values())


def _panels(history: History) -> list[Panel]:
    """Return the panels for which the run has data, in reading order."""

    def lines(names: Mapping[str, str]) -> dict[str, tuple[list[int], list[float]]]:
        return {label: history.series[name] for name, label in names.items() if name in history.series}

    bins = sorted(name for name in history.series if name.startswith(VALIDATION_BIN_PREFIX))
    panels = [
        Panel("loss", lines({"train/loss": "training", "validation/loss": "held-out"}), noisy=True),
        Panel(V_LOSS_TITLE, lines({"validation/v_loss": "held-out"})),
        Panel(
            "held-out loss by time bin, 0 = nearest to the data",
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
        # Figures of real pictures are the same at each evaluation: they are shown in the tables only.
        *(panel for panel in _evaluation_panels(history) if panel.varies),
    ]
    return [panel for panel in panels if panel.lines]


def _evaluation_panels(history: History) -> list[Panel]:
    """Return a panel per figure or family; results of other settings are lines of their own, with what differs."""
    panels, by_figure = [], dict[str, list[str]]()
    for names in evaluation_figures(history.series):
        family = FAMILY.fullmatch(names[0])
        if family:
            lines = {name.rpartition("_")[2]: history.series[name] for name in names}
            panels.append(Panel(family[1].removeprefix(EVALUATION_PREFIX), lines))
        else:
            by_figure.setdefault(plain_figure(names[0]), []).append(names[0])
    for figure, names in by_figure.items():
        title = figure.removeprefix(EVALUATION_PREFIX)
        labels = [title] if len(names) == 1 else what_differs([history.settings[evaluation_of(name)] for name in names])
        panels.append(Panel(title, {label: history.series[name] for label, name in zip(labels, names, strict=True)}))
    return panels


def _plots(panels: list[Panel], history: History) -> str:
    return html.grid("plots", [html.plot(draw_panel(panel, history.resumed_at), panel.title) for panel in panels])


def _header(run: Run) -> str:
    history = run.history
    facts = [f"resumes: {len(history.resumed_at)}"]
    if history.last_time_unix_s is not None:
        facts.insert(0, f"last metrics {html.utc(history.last_time_unix_s)}")
    left_out = f"{history.num_unreadable} unreadable lines of metrics.jsonl are left out."
    return (
        f'<h1>{escape(run.folder.name)}<span class="badge">{escape(run.state)}</span></h1>'
        f'<p class="sub">{escape(" · ".join(facts))}</p>{html.note(left_out if history.num_unreadable else "")}'
    )


def _tiles(run: Run) -> str:
    shown = [("samples seen", format_count(run.last_samples))]
    for label, name in (
        ("training loss", "train/loss"),
        ("held-out loss", "validation/loss"),
        ("held-out loss in v", "validation/v_loss"),
        ("samples per second", "speed/samples_per_s"),
        ("peak memory, GiB", "memory/peak_gib"),
    ):
        value = run.last(name)
        if value is not None:
            shown.append((label, f"{value:.4g}"))
    if run.times is not None:
        shown.append(("of the wall time was productive", f"{run.times.productive_share:.1%}"))
    return html.tiles(shown)


def _evaluations(run: Run) -> str:
    """Return each evaluation: its figures by checkpoint, newest first, its newest pictures, and its failures."""
    by_name: dict[str, list[Evaluation]] = {}
    for evaluation in run.history.evaluations:
        for name in evaluation.curves:
            by_name.setdefault(name, []).append(evaluation)
    failures = _failed_evaluations(run.folder)
    parts = []
    for name in sorted(by_name.keys() | failures.keys()):
        parts.append(f"<h3>{escape(name)}</h3>")
        parts += [html.note(failure) for failure in failures.get(name, [])]
        parts += _tables_and_media(name, by_name.get(name, []))
        parts.append(html.folded("settings", html.key_values(run.history.settings.get(name, {}))))
    return "".join(parts)


def _tables_and_media(name: str, evaluations: list[Evaluation]) -> list[str]:
    prefix = f"{EVALUATION_PREFIX}{name}/"
    newest_first = sorted(evaluations, key=lambda one: one.samples, reverse=True)
    groups = evaluation_figures({figure for one in evaluations for figure in one.metrics if figure.startswith(prefix)})
    parts = [_figures_table(prefix, [names[0] for names in groups if len(names) == 1], newest_first)]
    for names in groups:
        if len(names) > 1:
            title = names[0].removeprefix(prefix).rpartition("_")[0]
            parts.append(html.folded(title, _figures_table(prefix, names, newest_first)))
    newest: dict[str, tuple[int, Path]] = {}
    for one in evaluations:
        newest |= {label: (one.samples, path) for label, path in one.pictures.items() if label.startswith(prefix)}
    shown = html.without_posters(path for _, path in newest.values())
    media = [
        html.medium(path, f"{label.removeprefix(prefix)} at {format_count(samples)} samples")
        for label, (samples, path) in sorted(newest.items())
        if path in shown
    ]
    return [*parts, html.grid("grids", media)]


def _figures_table(prefix: str, figures: list[str], evaluations: list[Evaluation]) -> str:
    rows = [
        [format_count(one.samples), *(_number(one.metrics.get(figure)) for figure in figures)] for one in evaluations
    ]
    head = ["samples", *(figure.removeprefix(prefix) for figure in figures)]
    return html.table(head, rows, numbers_from=1, wide=True) if figures else ""


def _failed_evaluations(folder: Path) -> dict[str, list[str]]:
    """Return, by evaluation, one line for each checkpoint whose evaluation failed."""
    failures: dict[str, list[str]] = {}
    for path in sorted((folder / EVALUATIONS_FOLDER).glob(f"*/samples-*/{FAILED_FILE}")):
        samples = int(path.parent.name.removeprefix("samples-"))
        reason = read_object(path).get("reason", f"its {FAILED_FILE} cannot be read")
        failures.setdefault(path.parent.parent.name, []).append(f"failed at {format_count(samples)} samples: {reason}")
    return failures


def _number(value: float | None) -> str:
    return html.MISSING if value is None else f"{value:.5g}"


def _wall_time(times: Goodput | None) -> str:
    """Return the wall time by kind, over all starts, and the number of each event."""
    if times is None:
        return ""
    total = sum(times.seconds.values())
    rows = [
        [html.described(kind.replace("_", " "), WALL_TIME[kind]), format_duration(seconds), f"{seconds / total:.2%}"]
        for kind, seconds in times.seconds.items()
        if seconds
    ]
    events = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in sorted(times.events.items()))
    bar = html.plot(draw_times({"": times}), f"productive {times.productive_share:.1%} of the wall time")
    return f"{bar}{html.note(events)}{html.table(['spent on', 'time', 'share'], rows, numbers_from=1)}"


def _alerts(folder: Path) -> str:
    """Return a table of the alerts, newest first."""
    rows, _ = read_json_lines(folder / EVENTS_FILE)
    alerts = [row for row in rows if row.get("event") == "alert"][: -_NUM_ALERTS - 1 : -1]
    shown = [
        [html.utc(row["time_unix_s"]), format_count(row["samples"]), html.described(row["title"], row["text"])]
        for row in alerts
    ]
    return html.table(["time", "samples", "what"], shown)


def _metrics_table(history: History) -> str:
    rows = [
        [html.described(name, describe(name)), _number(values[-1]), format_count(samples[-1])]
        for name, (samples, values) in sorted(history.series.items())
    ]
    return html.table(["metric", "last value", "at samples"], rows, numbers_from=1)


def _starts(history: History) -> str:
    rows = [
        [
            html.utc(start["started_unix_s"]),
            format_count(start["start_samples"]),
            str(start["num_ranks"]),
            start["host"],
        ]
        for start in history.starts
    ]
    return html.table(["started", "from samples", "ranks", "host"], rows)


def _checkpoints(folder: Path) -> str:
    rows = []
    for checkpoint in _checkpoint_folders(folder):
        try:
            size_mib = sum(file.stat().st_size for file in checkpoint.rglob("*")) / 2**20
        except FileNotFoundError:
            continue  # the run, which is alive, has just deleted it
        state = "complete" if is_complete(checkpoint) else "incomplete, never loaded"
        rows.append([checkpoint.name, f"{size_mib:.1f} MiB", state])
    return html.table(["folder", "size", "state"], rows)


def _checkpoint_folders(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / CHECKPOINTS_FOLDER).glob("*") if path.is_dir())


def _data_card(folder: Path) -> dict[str, Any]:
    """Return location, fingerprint and normalisation of the training data, from the newest readable checkpoint."""
    for checkpoint in reversed(_checkpoint_folders(folder)):
        meta = read_object(checkpoint / CHECKPOINT_META)
        if "data" in meta:
            shown = ("codec", "codec_identity", "latent_mean", "latent_std")
            datasets = {f"dataset {number}": dataset for number, dataset in enumerate(meta["data"])}
            return {**datasets, **{key: meta["card"][key] for key in shown if key in meta["card"]}}
    return {}


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty without the file, and the reason where it cannot be read."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {"unreadable": str(error)}
    return content if isinstance(content, dict) else {path.stem: content}
