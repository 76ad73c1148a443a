"""Samples of a tar, found by its headers."""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from pomscale.shards.index import split_member_name
from pomscale.sources import storage
from pomscale.sources.item_fields import readable
from pomscale.sources.storage import is_hidden

_CHUNK_BYTES = 2**20

# PAX headers that only sparse members have: those of GNU tar and bsdtar, of star, of Solaris.
_SPARSE_HEADERS = ("GNU.sparse.", "SCHILY.realsize", "SUN.holesdata")


class DamagedTarError(Exception):
    """A tar cannot be read beyond some byte."""


class Member(NamedTuple):
    """One file of a sample."""

    suffix: str
    """Suffix as it is written in the tar, with its dot."""
    offset: int
    """First byte of its contents in the tar."""
    size: int
    fault: str | None
    """Reason on one line why its contents cannot be read from the tar, with the remedy."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Consecutive members of one key, by suffix in lower case (with its dot)."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    """Bytes of the members that were asked for."""


class TarScan:
    """Iterates over the samples of a tar, in order, by its headers; of the contents only what is asked for is read.

    Where the tar is cut off or a header is damaged, it raises DamagedTarError after the last sample that is whole.
    """

    def __init__(self, stream: BinaryIO, wanted: Collection[str]) -> None:
        """Prepare a scan that reads the members with the suffixes `wanted` (in lower case, with their dot)."""
        self.num_ignored = 0  # members that are no part of a sample
        self._stream = stream
        self._num_bytes = storage.size_of(stream)
        self._wanted = wanted

    def __iter__(self) -> Iterator[Sample]:
        sample = Sample("")
        try:
            for key, suffix, member in self._members():
                # A second member of the same name begins another sample, whose key is then a duplicate.
                if key != sample.key or suffix in sample.members:
                    if sample.members:
                        yield sample
                    sample = Sample(key)
                sample.members[suffix] = member
                if suffix in self._wanted and member.fault is None:
                    self._stream.seek(member.offset)
                    sample.contents[suffix] = self._stream.read(member.size)
        except DamagedTarError:
            if sample.members:
                yield sample
            raise
        if sample.members:
            yield sample

    def _members(self) -> Iterator[tuple[str, str, Member]]:
        """Yield key, suffix and member of the files that WebDataset would read, and of links in their place."""
        begin: int | None = 0
        while begin is not None:
            self._stream.seek(begin)
            try:
                with tarfile.open(fileobj=self._stream, mode="r:") as tar:
                    yield from self._members_of_archive(tar)
                    end = tar.offset
            except (tarfile.TarError, ValueError, OverflowError) as error:
                raise DamagedTarError(str(error)) from error
            self._check_end(end)
            # `cat a.tar b.tar` gives one file with the end mark of a in its middle.
            begin = self._next_archive(end)

    def _members_of_archive(self, tar: tarfile.TarFile) -> Iterator[tuple[str, str, Member]]:
        while (header := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            if header.offset_data + _stored_bytes(header) > self._num_bytes:
                raise DamagedTarError(f"{header.name} is cut off")
            name = header.name.removeprefix("./")
            key, suffix = split_member_name(name)
            is_file = header.isfile() or header.islnk() or header.issym()
            if is_file and suffix and key and not key.endswith("/") and not _is_no_data(name):
                yield key, suffix.lower(), Member(suffix, header.offset_data, header.size, _fault(header))
            elif not header.isdir():
                self.num_ignored += 1

    def _check_end(self, offset: int) -> None:
        """Raise DamagedTarError unless the archive ends with zeros at `offset`.

        tarfile takes a damaged or missing header for the end.
        """
        self._stream.seek(offset)
        block = self._stream.read(tarfile.BLOCKSIZE)
        if not block:
            raise DamagedTarError("it has no end mark, so it may be cut off")
        if block.strip(b"\0") or len(block) < tarfile.BLOCKSIZE:
            raise DamagedTarError(f"the header at byte {offset:,} is damaged")

    def _next_archive(self, offset: int) -> int | None:
        """Return the first block from `offset` on that is not all zeros, as the byte where it begins; None at the end.

        The blocks are counted from `offset`, since archives need not begin at a multiple of the block size.
        """
        self._stream.seek(offset)
        while chunk := self._stream.read(_CHUNK_BYTES):
            num_zeros = len(chunk) - len(chunk.lstrip(b"\0"))
            if num_zeros < len(chunk):
                return offset + num_zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            offset += len(chunk)
        return None


def _stored_bytes(header: tarfile.TarInfo) -> int:
    """Return how many bytes of contents lie in the tar; a sparse member's `size` is that of the file outside of it."""
    if header.issparse():
        extents: Any = header.sparse  # pairs of offset and size, whatever the stubs say
        return sum(size for _, size in extents)
    return header.size if header.isreg() else 0


def _fault(header: tarfile.TarInfo) -> str | None:
    """Return why a member has no contents that can be read as they stand, with the remedy, or None."""
    if header.issparse() or any(name.startswith(_SPARSE_HEADERS) for name in header.pax_headers):
        return "is stored sparse, without its zeros; write the tar without -S (bsdtar: with --no-read-sparse)"
    if header.islnk():
        return f"is a hard link to {readable(header.linkname)}; write the tar with --hard-dereference"
    if header.issym():
        return f"is a symbolic link to {readable(header.linkname)}; write the tar with --dereference"
    return None


def _is_no_data(name: str) -> bool:
    """Return whether a member is hidden, or one of the notes on a tar that WebDataset skips (`__meta__/`)."""
    return is_hidden(name) or name.startswith("__meta__/")
