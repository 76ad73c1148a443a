"""What every source of raw items is to the encoder.

A source is scanned once into an item table on disk (`items.py`), which any number of tasks then read; so a source's
`scan` may take its time, but must not keep what it has listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol


class SourceChangedError(Exception):
    """An item is no longer as the scan saw it, or may not be read. The item is listed as failed, the rest goes on."""


@dataclass(frozen=True, slots=True)
class Item:
    """One picture, clip or caption of a source.

    A `problem` is why it cannot be encoded, on one line (e.g. a caption is missing): it is listed as failed. All texts
    can be written as UTF-8, also where the names of the source cannot.
    """

    key: str  # name in the shards: unique, no dots, fits a ustar header (see `checked_key`)
    where: str  # for people: path, tar and member, or table and row, relative to the source
    place: Any = None  # where the source finds it again: anything that JSON holds
    label: int | None = None
    caption: str | None = None
    problem: str | None = None


class Source(Protocol):
    """A stable list of items, and access to their contents."""

    @property
    def shuffled(self) -> bool:
        """Whether items are dealt to shards in a shuffled order. Not where neighbours must be read together (tars)."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Known after `scan` has been read to its end; () if items have no class."""

    @property
    def num_ignored(self) -> int:
        """Files that are no items, known after `scan`."""

    def scan(self) -> Iterator[Item]:
        """Every item, in an order that depends on the source alone.

        InputError if the source is missing, empty or unusable as a whole; what concerns one item is its `problem`.
        """

    def fingerprint_line(self, item: Item) -> str:
        """What the source's fingerprint takes of an item: equal lines, equal items (path and size, not contents)."""

    def open(self, item: Item) -> BinaryIO:
        """The item's picture or clip as a seekable stream, to be closed by the caller. Called by many threads at once.

        FileNotFoundError where the item is gone, SourceChangedError where it is another one now or may not be read.
        PomscaleError, also from the stream, where storage fails in a way that says nothing about the item: it is tried
        again in another run. InputError if the source has captions only.
        """
