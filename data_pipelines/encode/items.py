"""The list of a source's items on disk, made once and read by any number of tasks, and the order of the items.

Neither making nor reading it takes memory that grows with the number of items: files are written front to back and
memory-mapped for reading.

    items.jsonl      one JSON array per item, in the source's order
    items.npy        int64 (n + 1,), the byte where each line begins, and where the last one ends
    keys.npy         uint64 (n,), `key_hash` of each key
    duplicates.npy   int64 (d, 2), sorted: item, and the earlier item that has the same key
    items.json       totals (`_Totals`); written last, so a table that has it is complete
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import mmap
import os
import tempfile
from bisect import bisect_left
from collections.abc import Iterator
from io import BufferedRandom
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import atomic_write, link_or_copy, make_folder, remove_leftovers, write_text
from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.shards.index import key_hash, map_index, npy_header
from pomscale.sources.protocol import LISTING_VERSION, Item, Source

_TABLE_NAME = "items.json"
_LINES_NAME = "items.jsonl"
_OFFSETS_NAME = "items.npy"
_KEYS_NAME = "keys.npy"
_DUPLICATES_NAME = "duplicates.npy"
# In the order in which they are written.
_FILE_NAMES = (_LINES_NAME, _OFFSETS_NAME, _KEYS_NAME, _DUPLICATES_NAME, _TABLE_NAME)

# Rows that are in memory at once where an array is written or read from end to end.
_BLOCK = 65536

# Subindex of Stream.DATASET for the order of items; `show` uses 2.
_ITEM_ORDER = 1

# Rounds of the network that permutes items.
_NUM_ROUNDS = 8
_MASK = 2**64 - 1


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
    class_names: tuple[str, ...]
    shuffled: bool


class ItemTable:
    """The items of a source, by number. Any number of threads and tasks may read one at the same time."""

    def __init__(self, folder: Path, totals: _Totals) -> None:
        """Open the files. OSError or ValueError where some are missing or do not belong together."""
        self._totals = totals
        self._lines = _Lines(folder)
        self._keys = _map_array(folder / _KEYS_NAME, "<u8")
        self._duplicates = _map_array(folder / _DUPLICATES_NAME, "<i8", (2,))
        if not len(self._lines) == len(self._keys) == totals.num_items:
            raise ValueError(f"{_LINES_NAME}, {_KEYS_NAME} and {_TABLE_NAME} do not belong together")

    @classmethod
    def build(cls, source: Source, folder: Path) -> Self:
        """Scan a source into `folder`, replacing a table that is there. Only one task may do so at a time.

        Raises InputError if the source is unusable (`Source.scan`), has no items or none that could be encoded.
        """
        make_folder(folder)
        for name in _FILE_NAMES:
            remove_leftovers(folder, name)
        (folder / _TABLE_NAME).unlink(missing_ok=True)
        num_items, num_problems, num_captions, fingerprint = _write_items(source, folder)
        if num_items == 0:
            raise InputError("source: there are no items in it")
        totals = _Totals(
            listing_version=LISTING_VERSION,
            fingerprint=fingerprint,
            num_items=num_items,
            num_ignored=source.num_ignored,
            num_problems=num_problems + _write_duplicates(folder),
            num_captions=num_captions,
            class_names=source.class_names,
            shuffled=source.shuffled,
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
    def shuffled(self) -> bool:
        """`Source.shuffled` of the source."""
        return self._totals.shuffled

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
            link_or_copy(folder / name, other / name)


def _unreadable(path: Path, reason: str) -> PomscaleError:
    return PomscaleError(
        f"{path}: the list of items cannot be read: {reason}; "
        f"run the same command again, and if that does not help delete this file: the source is then listed again"
    )


class _Lines:
    """The items as the source listed them, by number."""

    def __init__(self, folder: Path) -> None:
        self._offsets = _map_array(folder / _OFFSETS_NAME, "<i8")
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


class _ArrayWriter:
    """Writes a .npy file of rows whose number is known only at the end."""

    def __init__(self, stream: BufferedRandom, dtype: str, row_shape: tuple[int, ...] = ()) -> None:
        self._stream, self._dtype, self._row_shape = stream, np.dtype(dtype), row_shape
        self._num_rows = 0
        self._rows: list[int | tuple[int, int]] = []
        self._header_length = stream.write(self._header())

    def append(self, row: int | tuple[int, int]) -> None:
        self._rows.append(row)
        if len(self._rows) == _BLOCK:
            self._flush()

    def finish(self) -> None:
        self._flush()
        self._stream.seek(0)
        written = self._stream.write(self._header())
        assert written == self._header_length, "NumPy pads headers so that the first axis may grow"

    def _header(self) -> bytes:
        return npy_header((self._num_rows, *self._row_shape), self._dtype)

    def _flush(self) -> None:
        self._stream.write(np.array(self._rows, self._dtype).tobytes())
        self._num_rows += len(self._rows)
        self._rows.clear()


def _write_items(source: Source, folder: Path) -> tuple[int, int, int, str]:
    """Write lines, offsets and keys.

    Return the numbers of items, of problems and of captions of an item at most, and the fingerprint.
    """
    num_items, num_problems, num_captions, digest = 0, 0, 1, hashlib.sha256()
    with (
        atomic_write(folder / _LINES_NAME) as lines,
        atomic_write(folder / _OFFSETS_NAME) as offsets_file,
        atomic_write(folder / _KEYS_NAME) as keys_file,
    ):
        offsets, keys = _ArrayWriter(offsets_file, "<i8"), _ArrayWriter(keys_file, "<u8")
        end = 0
        offsets.append(end)
        for item in source.scan():
            line = json.dumps([item.key, item.where, item.location, item.label, item.caption, item.problem])
            end += lines.write(f"{line}\n".encode())
            offsets.append(end)
            keys.append(key_hash(item.key))
            digest.update(f"{source.fingerprint_line(item)}\n".encode(errors="surrogatepass"))
            num_items += 1
            num_problems += item.problem is not None
            num_captions = max(num_captions, len(item.captions))
        offsets.finish()
        keys.finish()
    return num_items, num_problems, num_captions, digest.hexdigest()


def _write_duplicates(folder: Path) -> int:
    """Write duplicates.npy. Return how many items have the key of an earlier one, and no problem of their own."""
    lines, num_problems = _Lines(folder), 0
    with atomic_write(folder / _DUPLICATES_NAME) as stream:
        duplicates = _ArrayWriter(stream, "<i8", (2,))
        for item, other in _find_duplicates(_map_array(folder / _KEYS_NAME, "<u8"), lines, folder):
            duplicates.append((item, other))
            num_problems += lines[item].problem is None
        duplicates.finish()
    return num_problems


def _find_duplicates(keys: np.ndarray, lines: _Lines, folder: Path) -> Iterator[tuple[int, int]]:
    """Yield the items with the key of an earlier item, in order, each with the first item that has it.

    The hashes are sorted in a file in `folder`. Only where a hash is there twice are keys compared.
    """
    scratch = _copy_on_disk(keys, folder)
    scratch.sort()
    count = _keep_repeated(scratch)
    if count:
        # Each occurred at least twice, so there is room for as many numbers behind them.
        firsts = scratch[count : 2 * count].view(np.int64)
        yield from _compare_keys(keys, lines, scratch[:count], firsts)


def _copy_on_disk(array: np.ndarray, folder: Path) -> np.ndarray:
    """Copy an array into a file without a name, which vanishes with the copy, also where the process is killed."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for begin in range(0, len(array), _BLOCK):
                file.write(array[begin : begin + _BLOCK].tobytes())
            file.flush()
            return np.asarray(np.memmap(file, array.dtype, "r+"))  # holds the file for itself
    except OSError as error:
        raise PomscaleError(
            f"{folder}: no room to sort {len(array):,} keys: {error}; make room and run the same command again"
        ) from error


def _keep_repeated(values: np.ndarray) -> int:
    """Move the repeated values of a sorted array to its front, once each and sorted. Return how many there are."""
    count = 0
    for begin in range(0, len(values) - 1, _BLOCK):
        block = values[begin : begin + _BLOCK + 1]
        again = np.unique(block[1:][block[1:] == block[:-1]])
        if count and len(again) and values[count - 1] == again[0]:
            again = again[1:]
        values[count : count + len(again)] = again
        count += len(again)
    return count


def _compare_keys(
    keys: np.ndarray, lines: _Lines, repeated: np.ndarray, firsts: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Yield items whose key an earlier item has, among those whose hash is in `repeated`.

    `firsts`, int64 as long as `repeated`, is scratch space for the first item of each hash.
    """
    firsts[:] = -1
    collided: dict[str, int] = {}  # first item of a key whose hash is that of another key: hardly ever any
    for begin in range(0, len(keys), _BLOCK):
        block = keys[begin : begin + _BLOCK]
        groups = np.minimum(np.searchsorted(repeated, block), len(repeated) - 1)
        for i in np.flatnonzero(repeated[groups] == block).tolist():
            item, group = begin + i, groups[i]
            other = int(firsts[group])
            if other < 0:
                firsts[group] = item
                continue
            key = lines[item].key
            if lines[other].key != key:
                other = collided.setdefault(key, item)
            if other != item:
                yield item, other


def _map_array(path: Path, dtype: str, row_shape: tuple[int, ...] = ()) -> np.ndarray:
    """Map a file of `_ArrayWriter`. OSError, or ValueError if it is anything else."""
    row_bytes = math.prod(row_shape) * np.dtype(dtype).itemsize
    num_rows = max(0, path.stat().st_size - len(npy_header((0, *row_shape), dtype))) // row_bytes
    try:
        # As a plain array: slices of numpy.memmap are slow to make.
        return np.asarray(map_index(path, num_rows, np.dtype(dtype), row_shape))
    except ValueError as error:
        raise ValueError(f"{path.name}: is cut off, or its header is damaged") from error


# -- the order of the items -------------------------------------------------------------------------------------------


class ItemOrder:
    """A permutation of range(num_items) that depends on the seed alone; the identity if not `shuffled`.

    Nobody has to store it: memory and time per call do not grow with the number of items. It is a Feistel network over
    pairs (left, right) in Z_a x Z_b with a b just above num_items, and cycle walking for the few numbers beyond it
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", sections 4 and 5).
    """

    def __init__(self, num_items: int, seed: int, shuffled: bool) -> None:
        self._num_items = num_items
        self._shuffled = shuffled
        self._a = math.isqrt(max(num_items - 1, 0)) + 1
        self._b = -(-num_items // self._a)
        generator = keyed_generator(seed, Stream.DATASET, 0, _ITEM_ORDER)
        self._keys = [int(key) for key in generator.integers(0, _MASK, _NUM_ROUNDS, dtype="u8", endpoint=True)]

    def item(self, position: int) -> int:
        """Return the number of the item at a position. IndexError outside range(num_items)."""
        if not 0 <= position < self._num_items:
            raise IndexError(f"position {position} of {self._num_items} items")
        if not self._shuffled:
            return position
        item = self._encipher(position)
        while item >= self._num_items:  # a bijection of the larger domain comes back below num_items in the end
            item = self._encipher(item)
        return item

    def _encipher(self, number: int) -> int:
        """Apply a bijection of range(a b): each half in turn is shifted by a function of the other half only."""
        left, right = divmod(number, self._b)
        for turn, key in enumerate(self._keys):
            if turn % 2:
                right = (right + _mix(key, left)) % self._b
            else:
                left = (left + _mix(key, right)) % self._a
        return left * self._b + right


def _mix(key: int, value: int) -> int:
    """Return 64 bits that each depend on every bit of both: the finaliser of SplitMix64 (Steele et al. 2014)."""
    z = (key + value * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
