"""Evaluations of a run's checkpoints, by jobs beside or after training: RUN/evaluations.jsonl.

An evaluation ends while training is many samples past its checkpoint, in another job on another node. So it is no row
of metrics.jsonl, which training alone writes and in which samples only grow, but a line of a file of its own.
`read_history` joins the two files, and `Delivery` knows which evaluations the run's wandb run has not been given yet.

Results whose settings differ never share a name, and so never a curve: those measured with the settings that evaluation
NAME was first recorded with are evaluation/NAME/FIGURE, all others evaluation/NAME@KEY/FIGURE, KEY being the
`result_key` of their settings. The names follow from the order of the lines, so that they never change.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import write_text
from pomscale.base.jsonl import read_json_lines
from pomscale.runs.layout import DELIVERED_FILE, EVALUATIONS_FILE, RECIPE_FILE
from pomscale.runs.metric_names import EVALUATION_PREFIX, OTHER_SETTINGS, evaluation_of
from pomscale.runs.result_settings import result_key

IMAGES, VIDEOS = (".png", ".jpg", ".jpeg", ".gif", ".webp"), (".mp4", ".webm")

_NAME = re.compile(re.escape(EVALUATION_PREFIX) + rf"[^/\s{OTHER_SETTINGS}]+/\S+")
_NO_SETTINGS = "unrecorded"


class CurveNames:
    """Names of curves: the first settings of an evaluation have its plain name, all others NAME@KEY."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def name(self, figure: str, key: str) -> str:
        """Return the name of the curve of a figure evaluation/NAME/FIGURE whose settings have this key."""
        evaluation, _, rest = figure.removeprefix(EVALUATION_PREFIX).partition("/")
        if self._first.setdefault(evaluation, key) == key:
            return figure
        return f"{EVALUATION_PREFIX}{evaluation}{OTHER_SETTINGS}{key or _NO_SETTINGS}/{rest}"


@dataclass(frozen=True)
class Evaluation:
    """Figures and media of the checkpoint at `samples`, by the names of their curves; settings: empty if not recorded.

    Names are as from `metric_names.evaluation_name`, with @KEY behind NAME if the settings are not the first ones.
    """

    samples: int
    time_unix_s: float  # when it was recorded
    metrics: dict[str, float]
    pictures: dict[str, Path]
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run_folder: Path, row: Mapping[str, Any], names: CurveNames) -> Evaluation:
        """Parse a line of the file. `names` has seen all lines before it."""
        settings = row.get("settings") or {}
        key = result_key(settings)
        metrics = {names.name(figure, key): float(value) for figure, value in row["metrics"].items()}
        # Joined to the run folder, an absolute path stays what it is.
        pictures = {names.name(figure, key): run_folder / path for figure, path in row["pictures"].items()}
        return cls(row["samples"], row["time_unix_s"], metrics, pictures, settings)

    @property
    def curves(self) -> list[str]:
        """The evaluations that it has figures or pictures of: NAME, or NAME@KEY."""
        return list(dict.fromkeys(evaluation_of(name) for name in (*self.metrics, *self.pictures)))


def record(
    run_folder: Path,
    samples: int,
    metrics: Mapping[str, float],
    pictures: Mapping[str, Path] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Append an evaluation of the checkpoint at `samples`; any process of any node may, also several at once.

    Lines of one node never mix, and those of several nodes do not where the file system has locks.

    Args:
        run_folder: the run folder.
        samples: samples seen by the checkpoint.
        metrics: figures by name.
        pictures: images and clips on disk by name; see IMAGES and VIDEOS for their suffixes.
        settings: everything that the figures were measured with, as a JSON object.

    Raises:
        InputError: this is no evaluation of this run.
        PomscaleError: the file cannot be written; nothing was written then.
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
        **({"settings": dict(settings)} if settings else {}),
    }
    _append(run_folder / EVALUATIONS_FILE, json.dumps(row, allow_nan=False).encode() + b"\n")


def _from(run_folder: Path, path: Path) -> str:
    """Return the path relative to the run folder if it lies inside, so that a run folder can be moved."""
    path, run_folder = path.absolute(), run_folder.absolute()
    return str(path.relative_to(run_folder) if path.is_relative_to(run_folder) else path)


def _append(path: Path, line: bytes) -> None:
    """Append a line, whole or not at all."""
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
    """Return all recorded evaluations, oldest first, including those of checkpoints given up (see read_history)."""
    rows, _ = read_json_lines(run_folder / EVALUATIONS_FILE)
    names = CurveNames()
    return [Evaluation.of(run_folder, row, names) for row in rows]


class Delivery:
    """Position in evaluations.jsonl up to which the run's wandb run has been given the evaluations, kept on disk.

    Only the process that holds the run's wandb lock uses it (see monitoring.wandb.run). If that process is killed
    between giving and noting, the next one gives an evaluation again: the same figures at the same samples.
    """

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        self._path = run_folder / EVALUATIONS_FILE
        self._position_path = run_folder / DELIVERED_FILE
        self._position = int(self._position_path.read_text()) if self._position_path.is_file() else 0
        self._names = self._names_so_far()

    def _names_so_far(self) -> CurveNames:
        names = CurveNames()
        if self._position:
            for line in self._path.read_bytes()[: self._position].splitlines():
                if (row := _parsed(line)) is not None:
                    Evaluation.of(self._run_folder, row, names)
        return names

    @property
    def has_more(self) -> bool:
        """Whether there are evaluations that were not given yet."""
        return self._path.is_file() and self._path.stat().st_size > self._position

    def due(self) -> Iterator[tuple[Evaluation, int]]:
        """Yield the evaluations to give, each once in this process, with the position to note once it was given."""
        if not self.has_more:
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # another process is just writing it
                self._position += len(line)
                row = _parsed(line)
                if row is not None:
                    yield Evaluation.of(self._run_folder, row, self._names), self._position

    def note(self, position: int) -> None:
        """Record that all before this position was given. Raises PomscaleError where that cannot be written."""
        write_text(self._position_path, f"{position}\n")


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line; None for a line that a kill has cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
