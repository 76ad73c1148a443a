"""Sinks of metrics: metrics.jsonl, which has every row, and the console. wandb has its own package.

A sink never raises because its destination is away or full: a run is worth more than its log. It may wait for its
destination, since Monitor calls every sink in a thread of its own.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol, TextIO

from pomscale.base.console import format_count, format_duration
from pomscale.base.jsonl import JsonLines
from pomscale.runs.layout import METRICS_FILE

logger = logging.getLogger(__name__)


Level = Literal["INFO", "WARN", "ERROR"]


class MetricSink(Protocol):
    """Protocol of a destination. `samples` is the clock of the run: samples seen by the optimiser so far.

    `name` and `if_cut_off`, the consequence of not having the time to close, are for warnings. is_slow_to_close:
    whether a busy machine needs more than seconds to close it. time_unix_s is when something happened, if not now.
    """

    name: str
    if_cut_off: str
    is_slow_to_close: bool

    def log(self, samples: int, metrics: dict[str, float | str], time_unix_s: float | None = None) -> None: ...

    def log_image(self, samples: int, name: str, path: Path) -> None: ...

    def log_video(self, samples: int, name: str, path: Path) -> None: ...

    def alert(self, samples: int, title: str, text: str, level: Level) -> None: ...

    def close(self, failed: bool = False) -> None:
        """Write what is left. `failed`: the run ends with an error."""


class JsonlSink:
    """Appends one JSON object per line to RUN/metrics.jsonl: samples, time_unix_s, incarnation, then the metrics.

    "incarnation" is the number of the start. Numbers that JSON lacks are the strings "nan", "inf" and "-inf". An image
    or a video is a row with its path, relative to the run folder if it lies inside. For kills and full disks see
    JsonLines. Raises OSError when the file cannot be opened.
    """

    name = METRICS_FILE
    if_cut_off = "its last rows may be missing"
    is_slow_to_close = False

    def __init__(self, run_folder: Path, start: int) -> None:
        self._run_folder = run_folder
        self._start = start
        self._rows = JsonLines(run_folder / METRICS_FILE)

    def log(self, samples: int, metrics: dict[str, float | str], time_unix_s: float | None = None) -> None:
        row: dict[str, float | str] = {
            "samples": samples,
            "time_unix_s": round(time.time() if time_unix_s is None else time_unix_s, 3),
            "incarnation": self._start,
        }
        for name, value in metrics.items():
            row[name] = value if isinstance(value, str) or math.isfinite(value) else str(float(value))
        self._rows.append(row)

    def log_image(self, samples: int, name: str, path: Path) -> None:
        inside = path.is_relative_to(self._run_folder)
        self.log(samples, {name: str(path.relative_to(self._run_folder) if inside else path)})

    log_video = log_image

    def alert(self, samples: int, title: str, text: str, level: Level) -> None:
        """Do nothing: alerts are kept in events.jsonl; see alerts.py."""

    def close(self, failed: bool = False) -> None:
        self._rows.close()


class ConsoleSink:
    """Prints one line per row: progress, loss and speed, and the time that is left.

    The ETA comes from the throughput of this start, validation and saving included, so it is known from the second row
    on.
    """

    # In the order of the line; a row shows those it has.
    _FIELDS: tuple[tuple[str, str], ...] = (
        ("train/loss", "loss {:.4f}"),
        ("validation/loss", "validation loss {:.4f}"),
        ("train/grad_norm", "grad norm {:.3g}"),
        ("train/learning_rate", "lr {:.2e}"),
        ("speed/samples_per_s", "{:.4g} samples/s"),
        ("speed/data_wait_share", "data wait {:.0%}"),
    )

    name = "the console"
    if_cut_off = "its last lines may be missing"
    is_slow_to_close = False

    def __init__(
        self, total_samples: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_samples = total_samples
        self._stream = stream or sys.stdout
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._warned = False

    def log(self, samples: int, metrics: dict[str, float | str], time_unix_s: float | None = None) -> None:
        shown = [form.format(metrics[name]) for name, form in self._FIELDS if name in metrics]
        if shown:
            self._print(samples, [*shown, f"ETA {self._eta(samples)}"])

    def _print(self, samples: int, parts: list[str]) -> None:
        progress = f"{samples / self._total_samples:6.1%}  {format_count(samples)}/{format_count(self._total_samples)}"
        try:
            self._stream.write("  ".join([progress, *parts]) + "\n")  # in one call: another thread may print too
            self._stream.flush()
        except OSError as error:  # the job's log is on a full disk, or its reader has gone
            if not self._warned:
                self._warned = True
                logger.warning("the console cannot be written (%s): lines are lost; metrics.jsonl goes on", error)

    def _eta(self, samples: int) -> str:
        now = self._clock()
        if self._first is None or samples < self._first[0]:  # a rollback may go back beyond the first row
            self._first = samples, now
        first_samples, first_time = self._first
        if samples == first_samples:
            return "?"
        seconds_per_sample = (now - first_time) / (samples - first_samples)
        return format_duration((self._total_samples - samples) * seconds_per_sample)

    def log_image(self, samples: int, name: str, path: Path) -> None:
        self._print(samples, [f"{name}: {path}"])

    log_video = log_image

    def alert(self, samples: int, title: str, text: str, level: Level) -> None:
        self._print(samples, [f"{level}  {title}: {text}"])

    def close(self, failed: bool = False) -> None:
        """Do nothing: every line was flushed."""
