"""Monitor: the one object that the trainer logs to."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from pomscale.base.background import CLOSE_TIMEOUT_S, PATIENT_CLOSE_TIMEOUT_S, Background
from pomscale.config.monitoring import MonitoringConfig
from pomscale.monitoring.sinks import ConsoleSink, JsonlSink, Level, MetricSink
from pomscale.monitoring.wandb.sink import WandbSink

logger = logging.getLogger(__name__)


class Monitor:
    """Hands everything to all sinks, each in a thread of its own, so that neither training nor other sinks wait for it.

    A row is in metrics.jsonl milliseconds after `log` has returned, and a kill -9 costs at most the rows of those
    milliseconds. A sink that hangs or fails loses only its own entries; see Background. `Monitor([])` logs nothing, and
    is what every rank but 0 has. As a context manager it closes the sinks, as failed after an exception.
    """

    def __init__(self, sinks: Sequence[MetricSink], in_a_hurry: Callable[[], bool] = lambda: True) -> None:
        """Start a thread for each sink. in_a_hurry: whether a scheduler or a user waits for the process to end."""
        self._in_a_hurry = in_a_hurry
        self._sinks = [(sink, Background(sink.name)) for sink in sinks]

    def log(self, samples: int, metrics: dict[str, float | str]) -> None:
        """Log one row, unless it is empty: numbers by names of `runs.metric_names`, at `samples` seen."""
        if metrics:
            row, now = dict(metrics), time.time()
            self._give(lambda sink: sink.log(samples, row, now))

    def log_image(self, samples: int, name: str, path: Path) -> None:
        """Log a picture that is on disk already, e.g. a sample grid by the name "samples/grid"."""
        self._give(lambda sink: sink.log_image(samples, name, path))

    def log_video(self, samples: int, name: str, path: Path) -> None:
        """Log a clip (mp4, webm) that is on disk already, e.g. by the name "samples/clips"."""
        self._give(lambda sink: sink.log_video(samples, name, path))

    def alert(self, samples: int, title: str, text: str, level: Level) -> None:
        """Alert people. May be called by any thread."""
        self._give(lambda sink: sink.alert(samples, title, text, level))

    def _give(self, call: Callable[[MetricSink], None]) -> None:
        for sink, background in self._sinks:
            background.do(partial(call, sink))

    def close(self, failed: bool = False) -> None:
        """Close all sinks at the same time, for CLOSE_TIMEOUT_S at most. `failed`: the run ends with an error.

        At a good end, one that is slow to close has PATIENT_CLOSE_TIMEOUT_S, until there is a hurry.
        """

        def patience_s(sink: MetricSink) -> float:
            in_a_hurry = failed or self._in_a_hurry() or not sink.is_slow_to_close
            return CLOSE_TIMEOUT_S if in_a_hurry else PATIENT_CLOSE_TIMEOUT_S

        begun_s = time.monotonic()
        for sink, background in self._sinks:
            background.finish(partial(sink.close, failed))
        for sink, background in self._sinks:
            while not background.wait(0.2) and time.monotonic() - begun_s < patience_s(sink):
                pass
            if not background.join(time.monotonic()):
                logger.warning("%s has not ended within %g s: %s", sink.name, patience_s(sink), sink.if_cut_off)

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
    start: int,
    in_a_hurry: Callable[[], bool] = lambda: True,
) -> Monitor:
    """Open the sinks of a run, on rank 0: metrics.jsonl, console, and wandb unless it is disabled.

    Args:
        run_folder: the run folder.
        monitoring: settings of the recipe.
        run_name: name of the wandb run.
        recipe_dump: the resolved recipe, for wandb.
        total_samples: samples at which the run is complete.
        start: number of this start, which never decreases in one run folder (see runs.history).
        in_a_hurry: whether somebody waits for the process to end.

    Raises:
        InputError: wandb refuses to start.
        OSError: the run folder cannot be written.
    """
    for line in monitoring.wandb.overruled(os.environ):
        logger.warning("%s", line)
    with ExitStack() as opened:
        jsonl = JsonlSink(run_folder, start)
        opened.callback(jsonl.close, failed=True)
        sinks: list[MetricSink] = [jsonl, ConsoleSink(total_samples)]
        if monitoring.wandb.mode != "disabled":
            sinks.append(WandbSink(run_folder, monitoring.wandb, run_name, recipe_dump))
        opened.pop_all()
    return Monitor(sinks, in_a_hurry)
