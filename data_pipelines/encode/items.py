"""The list of a source's items on disk, made once and read by any number of tasks.

Neither making nor reading it takes memory that grows with the number of items: files are written front to back and
memory-mapped for reading.

    items.jsonl      one JSON array per item, in the source's order
    items.npy        int64 (n + 1,), the byte where each line begins, and where the last one ends
    keys.npy         uint64 (n,), `key_hash` of each key
    duplicates.npy   int64 (d, 2), sorted: item, and the earlier item that has the same key
    order.npy        int64 (n,), items in the order in which they are dealt; only where they are ranges of files
    items.json       totals (`_Totals`); written last, so a table that has it is complete
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
from bisect import bisect_left
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipelines.encode.array_files import ArrayWriter, Spill, map_array
from data_pipelines.encode.duplicate_keys import find_duplicates
from data_pipelines.encode.item_order import FileOrder, ItemOrder, Order, file_by_file
from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import atomic_write, link_or_copy, make_folder, remove_leftovers, write_text
from pomscale.shards.index import key_hash
from pomscale.shards.schema import equals
from pomscale.sources.protocol import LISTING_VERSION, Item, Source

_TABLE_NAME = "items.json"
_LINES_NAME = "items.jsonl"
_OFFSETS_NAME = "items.npy"
_KEYS_NAME = "keys.npy"
_DUPLICATES_NAME = "duplicates.npy"
_ORDER_NAME = "order.npy"
# In the order in which they are written.
_FILE_NAMES = (_LINES_NAME, _OFFSETS_NAME, _KEYS_NAME, _DUPLICATES_NAME, _ORDER_NAME, _TABLE_NAME)


class _Totals(BaseModel):
    """Contents of items.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = 2
    listing_version: int = 1
    fingerprint: str
    num_items: int
    num_ignored: int
    num_problems: int
    num_captions: int = 1
    num_filtered: int = Field(0, exclude_if=equals(0))
    class_names: tuple[str, ...]
    shuffled: bool
    cuts_files: bool = Field(False, exclude_if=equals(False))


class ItemTable:
    """The items of a source, by number. Any number of threads and tasks may read one at the same time."""

    def __init__(self, folder: Path, totals: _Totals) -> None:
        """Open the files. OSError or ValueError where some are missing or do not belong together."""
        self._totals = totals
        self._lines = _Lines(folder)
        self._keys = map_array(folder / _KEYS_NAME, "<u8")
        self._duplicates = map_array(folder / _DUPLICATES_NAME, "<i8", (2,))
        has_order = totals.cuts_files and totals.shuffled
        self._order = map_array(folder / _ORDER_NAME, "<i8") if has_order else None
        num_dealt = totals.num_items if self._order is None else len(self._order)
        if not len(self._lines) == len(self._keys) == num_dealt == totals.num_items:
            raise ValueError(f"{_LINES_NAME}, {_KEYS_NAME} and {_TABLE_NAME} do not belong together")

    @classmethod
    def build(cls, source: Source, folder: Path, seed: int = 0) -> Self:
        """Scan a source into `folder`, replacing a table that is there. Only one task may do so at a time.

        `seed` is that of the order, where it is kept in the table: where items are ranges of files.

        Raises InputError if the source is unusable (`Source.scan`), has no items or none that could be encoded.
        """
        make_folder(folder)
        for name in _FILE_NAMES:
            remove_leftovers(folder, name)
        (folder / _TABLE_NAME).unlink(missing_ok=True)
        num_items, num_problems, num_captions, fingerprint = _write_items(source, folder, seed)
        if num_items == 0 and source.num_filtered:
            raise InputError(f"source.where: none of {source.num_filtered:,} rows meets all of its rules; change them")
        if num_items == 0:
            raise InputError("source: there are no items in it")
        totals = _Totals(
            listing_version=LISTING_VERSION,
            fingerprint=fingerprint,
            num_items=num_items,
            num_ignored=source.num_ignored,
            num_problems=num_problems + _write_duplicates(folder),
            num_captions=num_captions,
            num_filtered=source.num_filtered,
            class_names=source.class_names,
            shuffled=source.shuffled,
            cuts_files=source.cuts_files,
        )
        table = cls(folder, totals)
        if totals.num_problems == num_items:
            raise InputError(
                f"source: none of its {num_items:,} items can be encoded; the first is {table[0].where}: "
                f"{table[0].problem}"
            )
        write_text(folder / _TABLE_NAME, totals.model_dump_json(indent=2))
        return table

    @classmethod
    def open(cls, folder: Path) -> Self | None:
        """Return the table in a folder; None if there is none, or one that was never finished.

        Raises PomscaleError if it cannot be read. Other tasks may use it, so it is not replaced here.
        """
        path = folder / _TABLE_NAME
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _unreadable(path, str(error)) from error
        try:
            return cls(folder, _Totals.model_validate_json(content))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "the file"
            raise _unreadable(path, f"{where}: {problem['msg']}") from error
        except (OSError, ValueError) as error:
            raise _unreadable(path, str(error)) from error

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) over `Source.fingerprint_line` of all items, in order."""
        return self._totals.fingerprint

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._totals.class_names

    @property
    def num_ignored(self) -> int:
        """Number of files of the source that are no items, and of hidden folders."""
        return self._totals.num_ignored

    @property
    def num_problems(self) -> int:
        """Number of items that have a `problem`."""
        return self._totals.num_problems

    @property
    def num_captions(self) -> int:
        """Largest number of captions of an item, at least 1."""
        return self._totals.num_captions

    @property
    def num_filtered(self) -> int:
        """Number of items that the recipe leaves out."""
        return self._totals.num_filtered

    @property
    def cuts_files(self) -> bool:
        """Whether items are time ranges of files, which are neighbours in the order."""
        return self._totals.cuts_files

    @property
    def shuffled(self) -> bool:
        """`Source.shuffled` of the source."""
        return self._totals.shuffled

    def order(self, seed: int) -> Order:
        """Return the order in which items are dealt; that of ranges of files has the seed of `build`."""
        return ItemOrder(len(self), seed, self.shuffled) if self._order is None else FileOrder(self._order)

    @property
    def is_current(self) -> bool:
        """Whether the items were listed by the rules that sources follow now."""
        return self._totals.listing_version == LISTING_VERSION

    def mark_current(self, folder: Path) -> None:
        """Record in the table's folder that a listing by the rules of now gives the same items."""
        self._totals = self._totals.model_copy(update={"listing_version": LISTING_VERSION})
        write_text(folder / _TABLE_NAME, self._totals.model_dump_json(indent=2))

    def __len__(self) -> int:
        return self._totals.num_items

    def __getitem__(self, number: int) -> Item:
        if not 0 <= number < len(self):
            raise IndexError(f"item {number} of {len(self)}")
        item = self._lines[number]
        row = bisect_left(self._duplicates[:, 0], number)
        if item.problem is None and row < len(self._duplicates) and self._duplicates[row, 0] == number:
            other = self._lines[self._duplicates[row, 1]]
            return dataclasses.replace(item, problem=f"its key {item.key} is also that of {other.where}")
        return item

    def key_hashes(self) -> np.ndarray:
        """Return `key_hash` of each item's key, (n,) uint64, memory-mapped."""
        return self._keys


def share_table(folder: Path, other: Path) -> None:
    """Link the table of one folder into another that has none; copy it where the file system has no links."""
    if not (other / _TABLE_NAME).exists():
        for name in _FILE_NAMES:
            if (folder / name).exists():  # most tables have no order
                link_or_copy(folder / name, other / name)


def _unreadable(path: Path, reason: str) -> PomscaleError:
    return PomscaleError(
        f"{path}: the list of items cannot be read: {reason}; "
        f"run the same command again, and if that does not help delete this file: the source is then listed again"
    )


class _Lines:
    """The items as the source listed them, by number."""

    def __init__(self, folder: Path) -> None:
        self._offsets = map_array(folder / _OFFSETS_NAME, "<i8")
        with (folder / _LINES_NAME).open("rb") as stream:
            num_bytes = stream.seek(0, os.SEEK_END)
            if num_bytes == 0 or self._offsets[-1] != num_bytes:
                raise ValueError(f"{_LINES_NAME} does not end where {_OFFSETS_NAME} says")
            self._content = mmap.mmap(stream.fileno(), num_bytes, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> Item:
        begin, end = self._offsets[number : number + 2]
        return Item(*json.loads(self._content[begin:end]))

    def key(self, number: int) -> str:
        """Return the key of an item."""
        return self[number].key


def _write_items(source: Source, folder: Path, seed: int) -> tuple[int, int, int, str]:
    """Write lines, offsets and keys, and the order where items are ranges of files.

    Return the numbers of items, of problems and of captions of an item at most, and the fingerprint.
    """
    num_items, num_problems, num_captions, digest = 0, 0, 1, hashlib.sha256()
    is_dealt_by_file = source.cuts_files and source.shuffled
    files, starts = Spill("<u8", folder), Spill("<i8", folder)
    with (
        atomic_write(folder / _LINES_NAME) as lines,
        atomic_write(folder / _OFFSETS_NAME) as offsets_file,
        atomic_write(folder / _KEYS_NAME) as keys_file,
    ):
        offsets, keys = ArrayWriter(offsets_file, "<i8"), ArrayWriter(keys_file, "<u8")
        end = 0
        offsets.append(end)
        for item in source.scan():
            span = [] if item.span is None else [item.span]
            line = json.dumps([item.key, item.where, item.location, item.label, item.caption, item.problem, *span])
            end += lines.write(f"{line}\n".encode())
            offsets.append(end)
            keys.append(key_hash(item.key))
            digest.update(f"{source.fingerprint_line(item)}\n".encode(errors="surrogatepass"))
            if is_dealt_by_file:
                files.append(key_hash(json.dumps(item.location)))
                starts.append(-1 if item.span is None else item.span[0])
            num_items += 1
            num_problems += item.problem is not None
            num_captions = max(num_captions, len(item.captions))
        offsets.finish()
        keys.finish()
    if is_dealt_by_file and num_items:
        with atomic_write(folder / _ORDER_NAME) as stream:
            order = ArrayWriter(stream, "<i8")
            for block in file_by_file(files.array(), starts.array(), seed):
                for item_number in block.tolist():
                    order.append(item_number)
            order.finish()
    return num_items, num_problems, num_captions, digest.hexdigest()


def _write_duplicates(folder: Path) -> int:
    """Write duplicates.npy. Return how many items have the key of an earlier one, and no problem of their own."""
    lines, num_problems = _Lines(folder), 0
    with atomic_write(folder / _DUPLICATES_NAME) as stream:
        duplicates = ArrayWriter(stream, "<i8", (2,))
        for item, other in find_duplicates(map_array(folder / _KEYS_NAME, "<u8"), lines.key, folder):
            duplicates.append((item, other))
            num_problems += lines[item].problem is None
        duplicates.finish()
    return num_problems
