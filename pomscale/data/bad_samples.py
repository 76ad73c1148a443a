"""Samples that cannot be read: what is said of each, and the list of those that a run went on without."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pomscale.errors import InputError, PomscaleError


@dataclass(frozen=True, slots=True)
class BadSample:
    """`reason` is a whole line for people: file, record, what is wrong with it, and the remedy.

    `record` is its number in the dataset at `location`; `key` is "#" and its hash where the shard cannot tell it.
    """

    location: str
    record: int
    key: str
    reason: str

    def error(self) -> InputError:
        return InputError(self.reason)


class BadSampleList:
    """The bad samples of a run, each once, however often training comes by.

    Every rank holds the same list; the one that has a `path` also appends each new sample to that file, a line of JSON.
    What is known goes into checkpoints, so that a resumed run counts on.
    """

    def __init__(self, limit: int, known: Iterable[tuple[str, int]] = (), path: Path | None = None) -> None:
        self._limit = limit
        self._path = path
        self._known = {(location, record) for location, record in known}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def known(self) -> list[tuple[str, int]]:
        """Location and record number of each, sorted."""
        return sorted(self._known)

    def add(self, samples: int, met: Iterable[BadSample]) -> None:
        """Note those that are new; `samples` is the run's clock. PomscaleError if there are more than allowed."""
        new = {(sample.location, sample.record): sample for sample in met}
        fresh = [sample for name, sample in new.items() if name not in self._known]
        self._known |= new.keys()
        if self._path is not None and fresh:
            self._append(self._path, samples, fresh)
        if len(self) > self._limit:
            raise PomscaleError(
                f"{len(self)} samples could not be read, more than data.max_bad_samples {self._limit}. The last is: "
                f"{next(reversed(new.values())).reason}"
            )

    @staticmethod
    def _append(path: Path, samples: int, fresh: list[BadSample]) -> None:
        lines = "".join(json.dumps({"samples": samples, **asdict(sample)}) + "\n" for sample in fresh)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:  # a full disk costs a line of a list, not the run
            print(f"warning: {path} could not be written ({error}); training goes on", file=sys.stderr)
