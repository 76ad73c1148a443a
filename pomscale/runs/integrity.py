"""Seal of a checkpoint: checksums that tell whether its files are, to the bit, those that were written.

    checksums.json   {file: {"bytes": length, "crc32": checksum}}, for every file but itself and the marker
    COMPLETE         the marker: the CRC-32 of checksums.json, in hexadecimal

The sums are of the bytes on their way to the disk, so they also catch what a file system has lost of them.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from isal import isal_zlib

from pomscale.base.errors import PomscaleError
from pomscale.base.files import write_text
from pomscale.runs.layout import CHECKSUMS, MARKER

_PIECE = 1 << 22


class Checksum(NamedTuple):
    """Length and CRC-32 of a whole file."""

    num_bytes: int
    crc32: int

    @classmethod
    def of(cls, content: bytes) -> Checksum:
        """Return the checksum of a file with this content."""
        return cls(len(content), isal_zlib.crc32(content))

    def followed_by(self, content: memoryview) -> Checksum:
        """Return the checksum of the same file with `content` (bytes) at its end."""
        return Checksum(self.num_bytes + len(content), isal_zlib.crc32(content, self.crc32))


class SummedFile(FileIO):
    """A new file, written from beginning to end, that computes its checksum. Once closed, it is on the disk.

    `problem` is the error of a write that failed; torch.save raises another, less helpful error then.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x")
        self.checksum = Checksum.of(b"")
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            num_bytes = super().write(data)
        except OSError as error:
            self.problem = error
            raise
        self.checksum = self.checksum.followed_by(memoryview(data).cast("B")[:num_bytes])
        return num_bytes

    def close(self) -> None:
        if not self.closed:
            os.fsync(self.fileno())
        super().close()


def seal(folder: Path, checksums: dict[str, Checksum]) -> None:
    """Write checksums.json, then the marker. All other files must be on the disk."""
    text = json.dumps({name: {"bytes": n, "crc32": crc} for name, (n, crc) in sorted(checksums.items())}, indent=1)
    write_text(folder / CHECKSUMS, text)
    write_text(folder / MARKER, _fingerprint(text.encode()).decode())


def find_damage(folder: Path, share: int = 0, num_shares: int = 1) -> str | None:
    """Return what is wrong with a sealed folder, naming the file; None if nothing is.

    Reads every byte of share number `share` (of `num_shares`) of the files. Raises PomscaleError where a file may be
    good but cannot be read now.
    """
    try:
        checksums = _read_checksums(folder)
        # The largest first, so that the shares are about equal.
        for name in sorted(checksums, key=lambda name: checksums[name].num_bytes, reverse=True)[share::num_shares]:
            _compare(folder / name, checksums[name])
    except _Damage as damage:
        return str(damage)
    return None


def find_damage_of(path: Path) -> str | None:
    """Return what is wrong with one file of a sealed folder; None if nothing is."""
    try:
        _compare(path, _read_checksums(path.parent)[path.name])
    except _Damage as damage:
        return str(damage)
    return None


class _Damage(Exception):
    pass


def _read_checksums(folder: Path) -> dict[str, Checksum]:
    path, marker = folder / CHECKSUMS, folder / MARKER
    with _reading(path):
        content = path.read_bytes()
    with _reading(marker):
        fingerprint = marker.read_bytes()
    if fingerprint != _fingerprint(content):
        raise _Damage(f"{path} or {marker.name} is not what was written")
    return {name: Checksum(entry["bytes"], entry["crc32"]) for name, entry in json.loads(content).items()}


def _compare(path: Path, expected: Checksum) -> None:
    with _reading(path), path.open("rb", buffering=0) as file:
        found = Checksum.of(b"")
        piece = memoryview(bytearray(min(_PIECE, expected.num_bytes + 1)))
        while num_bytes := file.readinto(piece):
            found = found.followed_by(piece[:num_bytes])
    if found.num_bytes != expected.num_bytes:
        raise _Damage(f"{path} has {found.num_bytes:,} bytes, and {expected.num_bytes:,} were written")
    if found.crc32 != expected.crc32:
        raise _Damage(f"{path} is not what was written (CRC-32 {found.crc32:08x}, not {expected.crc32:08x})")


def _fingerprint(checksums: bytes) -> bytes:
    return b"%08x\n" % isal_zlib.crc32(checksums)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise _Damage(f"{path} is missing") from error
    except OSError as error:
        if error.errno == errno.EIO:  # the disk has lost it
            raise _Damage(f"{path} cannot be read: {error}") from error
        # Missing rights, a stale handle, too many open files: the content may be intact.
        raise PomscaleError(f"{path} cannot be read: {error}; run the same command again once it can") from error
