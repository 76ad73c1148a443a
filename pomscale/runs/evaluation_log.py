"""What jobs measure of a run's checkpoints while training goes on, or after it: RUN/evaluations.jsonl.

An evaluation is done samples after its checkpoint was saved, by another job on another node. So it is no row of
metrics.jsonl, which training alone writes and in which samples only grow: it has a file of its own, read_history puts
the two together, and Delivery tells which of it the run's wandb run has not been given yet.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import write_text
from pomscale.base.jsonl import read_json_lines
from pomscale.runs.layout import DELIVERED_FILE, EVALUATIONS_FILE, RECIPE_FILE
from pomscale.runs.metric_names import EVALUATION_PREFIX

IMAGES, VIDEOS = (".png", ".jpg", ".jpeg", ".gif", ".webp"), (".mp4", ".webm")

_NAME = re.compile(re.escape(EVALUATION_PREFIX) + r"[^/\s]+/\S+")


@dataclass(frozen=True)
class Evaluation:
    """Of the checkpoint at `samples`: figures and media, by names of names.evaluation_name."""

    samples: int
    time_unix_s: float  # when it was recorded
    metrics: dict[str, float]
    pictures: dict[str, Path]

    @classmethod
    def of(cls, run_folder: Path, row: Mapping[str, Any]) -> Evaluation:
        """A line of the file."""
        metrics = {name: float(value) for name, value in row["metrics"].items()}
        # An absolute path stays what it is.
        pictures = {name: run_folder / path for name, path in row["pictures"].items()}
        return cls(row["samples"], row["time_unix_s"], metrics, pictures)


def record(
    run_folder: Path, samples: int, metrics: Mapping[str, float], pictures: Mapping[str, Path] | None = None
) -> None:
    """Append an evaluation of the checkpoint at `samples`. Any process of any node may, also several at once.

    pictures: images and clips that lie on disk, by name; see IMAGES and VIDEOS. Where the file system has locks, lines
    of several nodes never mix; on one node they never do. Raises InputError for what is no evaluation of this run,
    PomscaleError if it cannot be written: then nothing was.
    """
    pictures = pictures or {}
    if not (run_folder / RECIPE_FILE).is_file():
        raise InputError(f"{run_folder}: no run folder: it has no {RECIPE_FILE}")
    if samples < 0 or not (metrics or pictures):
        raise InputError(f"{run_folder}: nothing to record: {len(metrics)} figures at {samples} samples")
    for name in (*metrics, *pictures):
        if not _NAME.fullmatch(name):
            raise InputError(f"{name!r}: not the name of an evaluation; it must be {EVALUATION_PREFIX}NAME/FIGURE")
    for path in pictures.values():
        if not path.is_file() or path.suffix.lower() not in IMAGES + VIDEOS:
            raise InputError(f"{path}: missing, or neither an image nor a clip ({', '.join(IMAGES + VIDEOS)})")
    row = {
        "samples": samples,
        "time_unix_s": round(time.time(), 3),
        "metrics": {name: value if math.isfinite(value) else str(float(value)) for name, value in metrics.items()},
        "pictures": {name: _from(run_folder, path) for name, path in pictures.items()},
    }
    _append(run_folder / EVALUATIONS_FILE, json.dumps(row, allow_nan=False).encode() + b"\n")


def _from(run_folder: Path, path: Path) -> str:
    """Relative where it lies inside, so that a run folder can be moved."""
    path, run_folder = path.absolute(), run_folder.absolute()
    return str(path.relative_to(run_folder) if path.is_relative_to(run_folder) else path)


def _append(path: Path, line: bytes) -> None:
    """A line, whole or not at all."""
    try:
        with path.open("a+b", buffering=0) as file:
            _lock(file.fileno())
            size = file.seek(0, os.SEEK_END)
            # A node that died while writing leaves half a line: it must not spoil this one as well.
            file.seek(max(0, size - 1))
            line = line if file.read(1) in (b"", b"\n") else b"\n" + line
            try:
                if file.write(line) < len(line):
                    raise OSError("the disk is full")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise PomscaleError(f"{path}: cannot be written: {error}; make room and record the evaluation again") from error


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return  # a file system without locks: on one node the kernel appends one line at a time all the same


def read_evaluations(run_folder: Path) -> list[Evaluation]:
    """All that were recorded, oldest first; also those of checkpoints that were given up (see read_history)."""
    rows, _ = read_json_lines(run_folder / EVALUATIONS_FILE)
    return [Evaluation.of(run_folder, row) for row in rows]


class Delivery:
    """Which evaluations a run's wandb run has been given: those before a place in the file, which is kept on disk.

    For the process that holds the run's wandb lock (see wandb_run): so there is one at a time. If it is killed between
    giving and noting, the next one gives an evaluation again: the same figures at the same samples.
    """

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        self._path = run_folder / EVALUATIONS_FILE
        self._place_path = run_folder / DELIVERED_FILE
        self._place = int(self._place_path.read_text()) if self._place_path.is_file() else 0

    @property
    def has_more(self) -> bool:
        return self._path.is_file() and self._path.stat().st_size > self._place

    def due(self) -> Iterator[tuple[Evaluation, int]]:
        """Those to be given, each once in this process, with the place to note when it was given."""
        if not self.has_more:
            return
        with self._path.open("rb") as file:
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # somebody is just writing it
                self._place += len(line)
                row = _parsed(line)
                if row is not None:
                    yield Evaluation.of(self._run_folder, row), self._place

    def note(self, place: int) -> None:
        """All before this place was given. PomscaleError where that cannot be written."""
        write_text(self._place_path, f"{place}\n")


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None for a line that a kill has cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
