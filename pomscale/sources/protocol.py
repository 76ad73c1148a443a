"""The interface between sources of raw items and the encoder.

A source is scanned once into an item table on disk (`encode/items.py`), which any number of tasks then read. So `scan`
may take its time, but must not keep what it has listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

# Version of the rules by which all sources list their items. Raised where a source that has not changed may now have
# other items, keys or locations; an encode that was begun under other rules then compares the two lists.
LISTING_VERSION = 2


class SourceChangedError(Exception):
    """An item is no longer as the scan saw it, or may not be read. The encoder lists it as failed and continues."""


Caption = str | list[str] | None
"""A caption, or several."""


@dataclass(frozen=True, slots=True)
class Item:
    """One picture, clip or caption of a source.

    All texts can be written as UTF-8, also where the names in the source cannot.
    """

    key: str
    """Name in the shards: unique, without dots, short enough for a ustar header (see `checked_key`)."""
    where: str
    """Description for people, relative to the source: a path, a tar and its member, or a table and its row."""
    location: Any = None
    """Arguments, of any types that JSON has, with which the source finds the item again."""
    label: int | None = None
    caption: Caption = None
    problem: str | None = None
    """Reason on one line why the item cannot be encoded, e.g. a missing caption; the item is then listed as failed."""
    span: list[int] | None = None
    """Start and end in the clip, in microseconds after its first frame; None where the item is all of its file."""

    @property
    def captions(self) -> list[str]:
        """All captions; [] if there are none."""
        if self.caption is None:
            return []
        return self.caption if isinstance(self.caption, list) else [self.caption]


class Source(Protocol):
    """A stable list of items, and access to their contents."""

    @property
    def shuffled(self) -> bool:
        """Whether items are dealt to shards in a shuffled order; False where neighbours must be read together."""

    @property
    def cuts_files(self) -> bool:
        """Whether items are time ranges of files; those of a file are then dealt one after the other."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, () if items have none; known once `scan` has been read to its end."""

    @property
    def num_ignored(self) -> int:
        """Number of files that are no items, and of hidden folders; known once `scan` has been read to its end."""

    @property
    def num_filtered(self) -> int:
        """Number of items that the recipe leaves out (`source.where`); known once `scan` has been read to its end."""

    def check_exists(self) -> None:
        """Raise InputError if what the recipe names is not there. Items are not looked at, so this takes no time."""

    def scan(self) -> Iterator[Item]:
        """Yield every item, in an order that depends on the source alone.

        Raises InputError if the source is missing, empty or unusable as a whole. A fault of one item is its `problem`.
        """

    def fingerprint_line(self, item: Item) -> str:
        """Return the text that the source's fingerprint covers: equal lines mean equal items.

        Folders use path and size, since reading all contents would cost as much as the encode.
        """

    def open(self, item: Item) -> BinaryIO:
        """Return the item's picture or clip as a seekable stream that the caller closes. Safe in many threads at once.

        Raises:
            FileNotFoundError: The item is gone.
            SourceChangedError: The item has changed, or may not be read.
            PomscaleError: Storage failed in a way that says nothing about the item, which another run tries again. The
                stream may raise it, too.
            InputError: The source has captions only.
        """
