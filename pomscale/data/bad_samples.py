"""Samples that cannot be read: a description of each, and the list of those that a run skipped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from pomscale.base.console import warn
from pomscale.base.errors import InputError, PomscaleError


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that cannot be read.

    Attributes:
        dataset: Fingerprint of its dataset.
        location: Location of the dataset.
        record: Number of its record in the dataset.
        key: Its key, or "#" and the key's hash where the shard does not have it.
        reason: A line for people with file, record, fault and remedy.
    """

    dataset: str
    location: str
    record: int
    key: str
    reason: str

    def error(self) -> InputError:
        return InputError(self.reason)


class BadSampleList:
    """The bad samples of a run, each once, however often training meets it.

    Every rank holds the same list; the one that has a `path` also appends each sample to that file, a line of JSON, if
    it is not in it yet. Checkpoints have the known samples, so that a resumed run continues to count.
    """

    def __init__(self, limit: int, known: Iterable[tuple[str, int]] = (), path: Path | None = None) -> None:
        self._limit = limit
        self._path = path
        self._known = {(dataset, record) for dataset, record in known}
        self._listed = set() if path is None else _read_list(path)

    def __len__(self) -> int:
        return len(self._known)

    @property
    def known(self) -> list[tuple[str, int]]:
        """Fingerprint of the dataset and record number of each sample, sorted."""
        return sorted(self._known)

    def add(self, samples: int, met: Iterable[BadSample]) -> None:
        """Add the new ones, at `samples` on the run's clock. Raises PomscaleError if there are more than allowed."""
        new = {(sample.dataset, sample.record): sample for sample in met}
        # After a fall back to an older checkpoint some are in the file, but not in the checkpoint.
        unlisted = [sample for name, sample in new.items() if name not in self._known | self._listed]
        self._known |= new.keys()
        if self._path is not None and unlisted:
            _append(self._path, samples, unlisted)
        if len(self) > self._limit:
            raise PomscaleError(
                f"{len(self)} samples could not be read, more than data.max_bad_samples {self._limit}. The last is: "
                f"{next(reversed(new.values())).reason}"
            )


def _read_list(path: Path) -> set[tuple[str, int]]:
    """Return dataset and record number of the samples in the file."""
    listed = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return set()
    except OSError as error:
        warn(f"{path} could not be read ({error}); samples may be listed twice")
        return set()
    for line in lines:
        with suppress(ValueError):  # a line that a kill has cut off
            sample = json.loads(line)
            listed.add((sample["dataset"], sample["record"]))
    return listed


def _append(path: Path, samples: int, unlisted: list[BadSample]) -> None:
    lines = "".join(json.dumps({"samples": samples, **asdict(sample)}) + "\n" for sample in unlisted)
    try:
        with path.open("a+b") as file:
            if file.tell() and not _ends_a_line(file):
                lines = "\n" + lines
            file.write(lines.encode())
    except OSError as error:  # a full disk costs a line of a list, not the run
        warn(f"{path} could not be written ({error}); training continues")


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
