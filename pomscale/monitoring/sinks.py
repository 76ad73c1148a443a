"""Where metrics go: metrics.jsonl (the truth) and the console. wandb has its own module.

A sink never raises because its destination is away or full: a run is worth more than its log.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TextIO

from pomscale.monitoring.jsonl import JsonLines
from pomscale.monitoring.text import format_count, format_duration

METRICS_FILE = "metrics.jsonl"

logger = logging.getLogger(__name__)


class MetricSink(Protocol):
    """One destination. `samples` is the clock of the run: samples seen by the optimiser so far."""

    def log(self, samples: int, metrics: dict[str, float | str]) -> None: ...

    def log_image(self, samples: int, name: str, png_path: Path) -> None: ...

    def close(self, failed: bool = False) -> None:
        """Write out what is left. `failed`: the run ends with an error."""


class JsonlSink:
    """Appends one JSON object per line to RUN/metrics.jsonl: samples, time_unix_s, incarnation, then the metrics.

    Numbers that JSON lacks are the strings "nan", "inf" and "-inf". An image is a row that holds its path, relative to
    the run folder where it lies inside. For kills and full disks see JsonLines. Raises OSError when the file cannot be
    opened.
    """

    def __init__(self, run_folder: Path, incarnation: int) -> None:
        self._run_folder = run_folder
        self._incarnation = incarnation
        self._rows = JsonLines(run_folder / METRICS_FILE)

    def log(self, samples: int, metrics: dict[str, float | str]) -> None:
        row: dict[str, float | str] = {
            "samples": samples,
            "time_unix_s": round(time.time(), 3),
            "incarnation": self._incarnation,
        }
        for name, value in metrics.items():
            row[name] = value if isinstance(value, str) or math.isfinite(value) else str(float(value))
        self._rows.append(row)

    def log_image(self, samples: int, name: str, png_path: Path) -> None:
        inside = png_path.is_relative_to(self._run_folder)
        self.log(samples, {name: str(png_path.relative_to(self._run_folder) if inside else png_path)})

    def close(self, failed: bool = False) -> None:
        self._rows.close()


class ConsoleSink:
    """One line per row: progress, what training does, how fast, and when it will be done.

    The ETA is that of this incarnation's own throughput, validation and saving included, so it is known from the
    second row on.
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

    def __init__(
        self, total_samples: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_samples = total_samples
        self._stream = stream or sys.stdout
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._warned = False

    def log(self, samples: int, metrics: dict[str, float | str]) -> None:
        shown = [form.format(metrics[name]) for name, form in self._FIELDS if name in metrics]
        if shown:
            self._print(samples, [*shown, f"ETA {self._eta(samples)}"])

    def _print(self, samples: int, parts: list[str]) -> None:
        progress = f"{samples / self._total_samples:6.1%}  {format_count(samples)}/{format_count(self._total_samples)}"
        try:
            print("  ".join([progress, *parts]), file=self._stream, flush=True)
        except OSError as error:  # the job's log is on a full disk, or its reader has gone
            if not self._warned:
                self._warned = True
                logger.warning("the console cannot be written (%s): lines are lost; metrics.jsonl goes on", error)

    def _eta(self, samples: int) -> str:
        now = self._clock()
        if self._first is None:
            self._first = samples, now
        first_samples, first_time = self._first
        if samples == first_samples:
            return "?"
        seconds_per_sample = (now - first_time) / (samples - first_samples)
        return format_duration((self._total_samples - samples) * seconds_per_sample)

    def log_image(self, samples: int, name: str, png_path: Path) -> None:
        self._print(samples, [f"{name}: {png_path}"])

    def close(self, failed: bool = False) -> None:
        """Nothing is held back: every line was flushed."""
