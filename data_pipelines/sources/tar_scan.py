"""The samples of a WebDataset tar, from its headers; of the contents only what is asked for is read."""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from data_pipelines.sources import fs
from pomscale.shards.index import split_member_name


class DamagedTarError(Exception):
    """A tar cannot be read beyond some place."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Consecutive members of one key, by suffix: their offset and size in bytes, and of some the contents."""

    key: str
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)


class TarScan:
    """Iterates over the samples of a tar, in order.

    DamagedTarError after the last sample that is whole, where the tar is cut off or a header is damaged.
    """

    def __init__(self, stream: BinaryIO, wanted: Collection[str]) -> None:
        """`wanted`: suffixes, with their dot, of the members to read."""
        self.num_ignored = 0  # members that are no part of a sample
        self._stream = stream
        self._num_bytes = fs.size_of(stream)
        self._wanted = wanted

    def __iter__(self) -> Iterator[Sample]:
        sample = Sample("")
        try:
            for key, suffix, offset, size in self._members():
                # The same member twice over begins another sample, whose key is then a duplicate.
                if key != sample.key or suffix in sample.places:
                    if sample.places:
                        yield sample
                    sample = Sample(key)
                sample.places[suffix] = offset, size
                if suffix in self._wanted:
                    self._stream.seek(offset)
                    sample.contents[suffix] = self._stream.read(size)
        except DamagedTarError:
            if sample.places:
                yield sample
            raise
        if sample.places:
            yield sample

    def _members(self) -> Iterator[tuple[str, str, int, int]]:
        """Key, suffix, offset and size of plain files that WebDataset would read."""
        try:
            with tarfile.open(fileobj=self._stream, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                    if member.offset_data + member.size > self._num_bytes:
                        raise DamagedTarError(f"{member.name} is cut off")
                    key, suffix = split_member_name(member.name.removeprefix("./"))
                    if member.isfile() and suffix and key and not key.endswith("/"):
                        yield key, suffix, member.offset_data, member.size
                    elif not member.isdir():
                        self.num_ignored += 1
                self._check_end(tar.offset)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise DamagedTarError(str(error)) from error

    def _check_end(self, offset: int) -> None:
        """Tarfile takes a header that is damaged or missing for the end; a tar that is whole ends with zeros."""
        self._stream.seek(offset)
        block = self._stream.read(tarfile.BLOCKSIZE)
        if not block:
            raise DamagedTarError("it has no end mark, so it may be cut off")
        if block.strip(b"\0") or len(block) < tarfile.BLOCKSIZE:
            raise DamagedTarError(f"the header at byte {offset:,} is damaged")
