"""The one object the trainer logs to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from pomscale.config.schema import MonitoringConfig
from pomscale.monitoring.sinks import ConsoleSink, JsonlSink, MetricSink
from pomscale.monitoring.wandb_sink import WandbSink


class Monitor:
    """Gives every row to all sinks. `Monitor([])` logs nothing: what every rank but 0 holds.

    As a context manager it closes the sinks; a run left by an exception is closed as failed.
    """

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = sinks

    def log(self, samples: int, metrics: dict[str, float | str]) -> None:
        """One row, unless it is empty. samples: seen by the optimiser; metrics: names of `names.py` -> numbers."""
        if metrics:
            for sink in self._sinks:
                sink.log(samples, metrics)

    def log_image(self, samples: int, name: str, png_path: Path) -> None:
        """A PNG that lies on disk already, e.g. a sample grid; name: e.g. "samples/grid"."""
        for sink in self._sinks:
            sink.log_image(samples, name, png_path)

    def close(self, failed: bool = False) -> None:
        """Close all sinks, also when one of them raises. `failed`: the run ends with an error."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close, failed)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # SystemExit and KeyboardInterrupt are requests to stop, not failures.
        self.close(failed=isinstance(error, Exception))


def open_monitor(
    run_folder: Path,
    monitoring: MonitoringConfig,
    *,
    run_name: str,
    recipe_dump: dict[str, Any],
    total_samples: int,
    incarnation: int,
) -> Monitor:
    """The sinks of a run, for rank 0: metrics.jsonl, console, and wandb unless it is disabled.

    incarnation: how often the run was started before; it never decreases in one run folder (see history.py).
    Raises InputError when wandb refuses to start, OSError when the run folder cannot be written.
    """
    with ExitStack() as opened:
        jsonl = JsonlSink(run_folder, incarnation)
        opened.callback(jsonl.close, failed=True)
        sinks: list[MetricSink] = [jsonl, ConsoleSink(total_samples)]
        if monitoring.wandb.mode != "disabled":
            sinks.append(WandbSink(run_folder, monitoring.wandb, run_name, recipe_dump))
        opened.pop_all()
    return Monitor(sinks)
