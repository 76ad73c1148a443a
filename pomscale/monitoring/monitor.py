"""The one object the trainer logs to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from pomscale.base.background import CLOSE_TIMEOUT_S, Background
from pomscale.config.monitoring import MonitoringConfig
from pomscale.monitoring.sinks import ConsoleSink, JsonlSink, Level, MetricSink
from pomscale.monitoring.wandb.sink import WandbSink

logger = logging.getLogger(__name__)


class Monitor:
    """Gives everything to all sinks, each in a thread of its own: nobody waits for one, nor one for another.

    So a row is in metrics.jsonl milliseconds after `log` has returned, and a kill -9 costs at most the rows of those
    milliseconds. A sink that hangs or fails costs what goes to it; see Background. `Monitor([])` logs nothing: what
    every rank but 0 holds. As a context manager it closes the sinks; a run left by an exception is closed as failed.
    """

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = [(sink, Background(sink.name)) for sink in sinks]

    def log(self, samples: int, metrics: dict[str, float | str]) -> None:
        """One row, unless it is empty. samples: seen by the optimiser; metrics: names of `names.py` -> numbers."""
        if metrics:
            row, now = dict(metrics), time.time()
            self._give(lambda sink: sink.log(samples, row, now))

    def log_image(self, samples: int, name: str, path: Path) -> None:
        """A picture that lies on disk already, e.g. a sample grid; name: e.g. "samples/grid"."""
        self._give(lambda sink: sink.log_image(samples, name, path))

    def log_video(self, samples: int, name: str, path: Path) -> None:
        """A clip (mp4, webm) that lies on disk already; name: e.g. "samples/clip"."""
        self._give(lambda sink: sink.log_video(samples, name, path))

    def alert(self, samples: int, title: str, text: str, level: Level) -> None:
        """What people should hear of now. From any thread."""
        self._give(lambda sink: sink.alert(samples, title, text, level))

    def _give(self, call: Callable[[MetricSink], None]) -> None:
        for sink, background in self._sinks:
            background.do(partial(call, sink))

    def close(self, failed: bool = False) -> None:
        """Close all sinks, at the same time, and go on after CLOSE_TIMEOUT_S. `failed`: the run ends with an error."""
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        for sink, background in self._sinks:
            background.finish(partial(sink.close, failed))
        for sink, background in self._sinks:
            if not background.join(deadline_s):
                logger.warning("%s has not ended within %g s: %s", sink.name, CLOSE_TIMEOUT_S, sink.if_cut_off)

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
) -> Monitor:
    """The sinks of a run, for rank 0: metrics.jsonl, console, and wandb unless it is disabled.

    incarnation: how often the run was started before; it never decreases in one run folder (see history.py).
    Raises InputError when wandb refuses to start, OSError when the run folder cannot be written.
    """
    with ExitStack() as opened:
        jsonl = JsonlSink(run_folder, start)
        opened.callback(jsonl.close, failed=True)
        sinks: list[MetricSink] = [jsonl, ConsoleSink(total_samples)]
        if monitoring.wandb.mode != "disabled":
            sinks.append(WandbSink(run_folder, monitoring.wandb, run_name, recipe_dump))
        opened.pop_all()
    return Monitor(sinks)
