"""Read the arrays of a batch of records straight from the shards: every byte is checked, and copied once."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from isal import isal_zlib
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.config.data import CacheConfig
from pomscale.data.bad_samples import BadSample
from pomscale.data.readers.gather import gather
from pomscale.data.readers.shard_files import open_shard_files
from pomscale.data.remote.fetch import DamagedFile, remedy
from pomscale.data.remote.shard_cache import local_index
from pomscale.shards.checksums import wrong_rows
from pomscale.shards.index import index_dtype, key_hash, map_index, npy_header, split_member_name
from pomscale.shards.location import join, unreadable
from pomscale.shards.pictures import unpack_picture
from pomscale.shards.schema import INDEX_NAME, Manifest

_TAR_BLOCK = 512

Faults = dict[int, BadSample]
"""Faults of a batch by row. A reader skips rows that have one and adds those it cannot read; the contents of such rows
mean nothing."""


@dataclass(frozen=True, slots=True)
class Members:
    """One member of the tar per row of a batch. All (b,)."""

    records: np.ndarray
    keys: np.ndarray  # key_hash
    shards: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    crc32s: np.ndarray

    @classmethod
    def of(cls, records: np.ndarray, rows: np.ndarray, array: str) -> Members:
        """Return the members of an array by index rows (b,)."""
        return cls(records, rows["key"], rows["shard"], *_fields(rows, array))

    @classmethod
    def of_one(cls, records: np.ndarray, rows: np.ndarray, arrays: Sequence[str], numbers: np.ndarray) -> Members:
        """Return the members of one of several arrays by index rows (b,): of arrays[numbers[i]] for row i."""
        fields = _fields(rows, arrays[0])
        for number, array in enumerate(arrays[1:], 1):
            here = numbers == number
            fields = [np.where(here, other, field) for field, other in zip(fields, _fields(rows, array), strict=True)]
        return cls(records, rows["key"], rows["shard"], *fields)


def _fields(rows: np.ndarray, array: str) -> list[np.ndarray]:
    return [rows[f"{array}_{field}"] for field in ("offset", "length", "crc32")]


class ArrayReader:
    """Reads the stored arrays of the dataset at `location`. Safe to share between threads."""

    def __init__(
        self,
        location: str,
        manifest: Manifest,
        reading: Literal["mapped", "streamed"],
        cache: CacheConfig | None,
        *,
        pin_memory: bool = False,
    ) -> None:
        """Open the shards. With `pin_memory`, pictures are read into pinned memory."""
        self._pin_memory = pin_memory
        self.location = location
        self.manifest = manifest
        self.files = open_shard_files(location, manifest, reading, cache)
        self._remedy = remedy(location)
        self._shard_bytes = np.array([shard.num_bytes for shard in manifest.shards], np.int64)
        self.index = self._open_index(local_index(location, manifest, cache))

    def _open_index(self, path: Path) -> np.ndarray:
        """Return the rows of the index, memory-mapped, so that a process pays for those it reads."""
        expected = self.manifest.index.num_bytes
        try:
            num_bytes = path.stat().st_size
            if num_bytes != expected:
                raise ValueError(f"it has {num_bytes:,} bytes, but the manifest says {expected:,}")
            # A plain array over the map: fancy indexing of np.memmap costs twice the time.
            return np.asarray(map_index(path, self.manifest.num_samples, index_dtype(self.manifest.arrays)))
        except (FileNotFoundError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {error}. {self._remedy}") from error
        except OSError as error:
            raise unreadable(path, error) from error

    def same_shape(self, members: Members, shape: tuple[int, ...], faults: Faults) -> Tensor:
        """Return arrays of one shape, (b, *shape) float16; each is contiguous, with its header in front of it."""
        header = _array_header(shape)
        length = len(header) + 2 * math.prod(shape)
        contents = self._contents(members, faults)
        for row in _newly(members.lengths != length, faults):
            faults[row] = self._wrong_array(members, row, shape)
        content = _copied(contents, members, length, faults)
        for row in wrong_rows(content, members.crc32s):
            if row not in faults and (fresh := self._fetched_again(members, row, faults)) is not None:
                content[row] = fresh
        wrong = (content[:, : len(header)] != np.frombuffer(header, np.uint8)).any(axis=1)
        for row in _newly(wrong, faults):
            faults[row] = self._wrong_array(members, row, shape)
        values = content[:, len(header) :].view(np.float16)
        self._find_non_finite(members, torch.from_numpy(values), faults)
        return torch.from_numpy(values.reshape(-1, *shape))

    def pictures(self, members: Members, shape: tuple[int, ...], mirrored: np.ndarray, faults: Faults) -> Tensor:
        """Return pictures of one shape, (b, *shape) uint8, contiguous; row i is mirrored where `mirrored` (b,) is True.

        Between the page cache and the result lies one copy of each byte, which mirrors, too; PNG files are inflated
        before it.
        """
        pictures = torch.empty((len(members.records), *shape), dtype=torch.uint8, pin_memory=self._pin_memory)
        pixels, coding = pictures.numpy(), self.manifest.latents.coding
        for row, content in self._checked(members, faults):
            try:
                unpack_picture(content, coding, pixels[row], bool(mirrored[row]))
            except ValueError as error:
                faults[row] = self.fault(members, row, f"it {error}")
        return pictures

    def sequences(
        self, members: Members, dim: int, max_length: int, room: int, faults: Faults
    ) -> tuple[Tensor, Tensor]:
        """Return sequences (b, longest, dim) float16, zero after each row's length, and lengths (b,) int64.

        Args:
            members: Arrays (n, dim) of n = 1 to max_length.
            dim: Values per element of a sequence.
            max_length: Greatest length that is accepted.
            room: Least value of `longest`.
            faults: Faults of the batch.
        """
        header_bytes = len(_sequence_header(1, dim))
        lengths = (members.lengths - header_bytes) // (2 * dim)
        longest = max(room, int(np.clip(lengths, 0, max_length).max()))
        values = np.zeros((len(lengths), longest, dim), np.float16)
        for row, content in self._checked(members, faults):
            length = int(lengths[row])
            header, data = content[:header_bytes], content[header_bytes:]
            fits = 1 <= length <= max_length and len(data) == 2 * dim * length
            if not fits or header != _sequence_header(length, dim):
                faults[row] = self._wrong_array(members, row, (f"1 to {max_length}", dim))
            else:
                values[row, :length] = np.frombuffer(data, "<f2").reshape(length, dim)
        tensor = torch.from_numpy(values)
        self._find_non_finite(members, tensor.flatten(1), faults)
        return tensor, torch.from_numpy(lengths.astype(np.int64))

    def check_rows(self, records: np.ndarray, rows: np.ndarray, faults: Faults) -> None:
        """Check that shards and classes in the index exist. Rows with others are set to zeros, since shard 0 exists."""
        num_classes, num_shards = self.manifest.num_classes, len(self.manifest.shards)
        # Without classes the only label is NO_LABEL, -1.
        lowest_label = 0 if num_classes else -1
        wrong = (rows["shard"] < 0) | (rows["shard"] >= num_shards)
        wrong |= (rows["label"] < lowest_label) | (rows["label"] >= num_classes)
        for row in _newly(wrong, faults):
            what = f"there is no shard {rows['shard'][row]} or no class {rows['label'][row]}"
            key = _hashed(rows["key"][row])
            reason = f"{join(self.location, INDEX_NAME)}: record {records[row]}: {what}. {self._remedy}"
            faults[row] = BadSample(self.manifest.fingerprint, self.location, int(records[row]), key, reason)
        rows[wrong] = np.zeros((), rows.dtype)

    def member_name(self, members: Members, row: int) -> str | None:
        """Return the name of a member in the tar; None where its header is not that of this record."""
        try:
            shard = self.files.open(int(members.shards[row]))
        except DamagedFile:
            return None
        header = shard[max(0, int(members.offsets[row]) - _TAR_BLOCK) :][:_TAR_BLOCK].tobytes()
        # ustar: the name in bytes 0-99, the folders that do not fit in there in bytes 345-499.
        parts = (part.rstrip(b"\0").decode(errors="replace") for part in (header[345:500], header[:100]))
        name = "/".join(part for part in parts if part)
        return name if key_hash(split_member_name(name)[0]) == members.keys[row] else None

    def fault(self, members: Members, row: int, what: str, remedy: str | None = None) -> BadSample:
        """Return a fault of a member of a shard. The default remedy is to repair the shard."""
        file = join(self.location, self.manifest.shards[members.shards[row]].name)
        record, name = int(members.records[row]), self.member_name(members, row)
        key = _hashed(members.keys[row]) if name is None else split_member_name(name)[0]
        reason = f"{file}: record {record}, {name or f'key {key}'}: {what}. {remedy or self._remedy}"
        return BadSample(self.manifest.fingerprint, self.location, record, key, reason)

    def _contents(self, members: Members, faults: Faults) -> dict[int, np.ndarray]:
        """Return the shards of the rows without faults, whose members lie wholly in their shards."""
        contents: dict[int, np.ndarray] = {}
        for shard in set(members.shards.tolist()):
            try:
                contents[shard] = self.files.open(shard)
            except DamagedFile as error:
                for row in _newly(members.shards == shard, faults):
                    faults[row] = self._damaged(members, row, error)
        begins, lengths = members.offsets, members.lengths
        outside = (begins < 0) | (lengths <= 0) | (lengths > self._shard_bytes[members.shards] - begins)
        for row in _newly(outside, faults):
            what = f"{lengths[row]:,} bytes at {begins[row]:,} are not in the shard"
            faults[row] = self.fault(members, row, what)
        return contents

    def _checked(self, members: Members, faults: Faults) -> Iterator[tuple[int, memoryview]]:
        """Yield row and bytes of the members without faults, where the checksum is right."""
        contents = self._contents(members, faults)
        fields = (members.shards, members.offsets, members.lengths, members.crc32s)
        for row, (shard, begin, length, crc32) in enumerate(zip(*(field.tolist() for field in fields), strict=True)):
            if row in faults:
                continue
            content: memoryview | None = contents[shard].data[begin : begin + length]
            if isal_zlib.crc32(content) != crc32:
                content = self._fetched_again(members, row, faults)
            if content is not None:
                yield row, content

    def _fetched_again(self, members: Members, row: int, faults: Faults) -> memoryview | None:
        """Return the bytes of a member whose checksum is wrong, where a fresh copy of its shard has them right."""
        shard, offset, length = (int(field[row]) for field in (members.shards, members.offsets, members.lengths))
        if self.files.renew(shard):
            try:
                fresh = self.files.open(shard).data[offset : offset + length]
            except DamagedFile as error:
                faults[row] = self._damaged(members, row, error)
                return None
            if isal_zlib.crc32(fresh) == members.crc32s[row]:
                return fresh
        faults[row] = self.fault(members, row, "its checksum is wrong")
        return None

    def _damaged(self, members: Members, row: int, error: DamagedFile) -> BadSample:
        key = _hashed(members.keys[row])
        return BadSample(self.manifest.fingerprint, self.location, int(members.records[row]), key, str(error))

    def _wrong_array(self, members: Members, row: int, shape: tuple[int | str, ...]) -> BadSample:
        return self.fault(members, row, f"it is not a float16 array of shape ({', '.join(map(str, shape))})")

    def _find_non_finite(self, members: Members, values: Tensor, faults: Faults) -> None:
        """Find rows of values (b, k) float16 that are not finite.

        A sum is the fastest test: it is not finite if a value is not, or if it overflows.
        """
        for row in _newly(~np.isfinite(values.sum(1).numpy()), faults):
            if not torch.isfinite(values[row]).all():
                faults[row] = self.fault(members, row, "it holds a value that is not finite")


def _newly(wrong: np.ndarray, faults: Faults) -> list[int]:
    """Return the rows of `wrong` (b,) bool that have no fault yet."""
    return [row for row in np.flatnonzero(wrong).tolist() if row not in faults]


def _hashed(key: int) -> str:
    return f"#{key:016x}"


def _copied(contents: dict[int, np.ndarray], members: Members, length: int, faults: Faults) -> np.ndarray:
    """Copy the bytes of every member, the only copy: (b, length) uint8, zeros for rows with faults."""
    if not faults:
        return gather(contents, members.shards, members.offsets, length)
    rows = np.zeros((len(members.shards), length), np.uint8)
    good = np.setdiff1d(np.arange(len(rows)), list(faults))
    if len(good):
        rows[good] = gather(contents, members.shards[good], members.offsets[good], length)
    return rows


@functools.lru_cache(maxsize=64)
def _array_header(shape: tuple[int, ...]) -> bytes:
    return npy_header(shape, "<f2")


@functools.lru_cache(maxsize=1024)
def _sequence_header(length: int, dim: int) -> bytes:
    return npy_header((length, dim), "<f2")
