"""Readers of a dataset's files: all records of a shard, single records by their index rows, index and failures."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from pomscale.base.errors import PomscaleError
from pomscale.shards.index import NO_LABEL, index_dtype, key_hash, map_index, npy_header, split_member_name
from pomscale.shards.pictures import complete_pictures, unpack_picture
from pomscale.shards.schema import (
    ARRAY_MEMBERS,
    CAPTION_MEMBER,
    CAPTIONS_FIELD,
    CLASS_MEMBER,
    FAILURES_NAME,
    FEATURE_ARRAYS,
    INDEX_NAME,
    INFO_MEMBER,
    REMEDY,
    ArrayName,
    Manifest,
    TextInfo,
)

_BLOCK = tarfile.BLOCKSIZE
_END_BLOCK = bytes(_BLOCK)
_READ_BYTES = 1 << 20

# Fields of a ustar header. A bit that flips in one changes the sum of its bytes, so no damage goes unseen.
_NAME, _SIZE, _CHECKSUM, _KIND, _MAGIC, _PREFIX = (
    slice(0, 100),
    slice(124, 135),
    slice(148, 156),
    slice(156, 157),
    slice(257, 263),
    slice(345, 500),
)


@dataclass(frozen=True, slots=True)
class TarRecord:
    """The members of one key."""

    key: str
    offset: int
    """Position of `blocks` in the tar, in bytes."""
    blocks: bytes
    """Headers, payloads and padding, byte for byte as they are in the tar."""
    members: dict[str, tuple[int, int]]
    """Begin and end of each payload in `blocks`, by suffix."""

    def payload(self, suffix: str) -> memoryview:
        begin, end = self.members[suffix]
        return memoryview(self.blocks)[begin:end]

    def row(self, shard: int, label: int, members: Mapping[ArrayName, str]) -> tuple[int, ...]:
        """Return the record's row of the index (`index_dtype`). A missing member has length 0.

        Args:
            shard: Number of its shard.
            label: Its class.
            members: `Manifest.array_members`.
        """
        fields: list[int] = []
        for suffix in members.values():
            if suffix in self.members:
                begin, end = self.members[suffix]
                fields += (self.offset + begin, end - begin, zlib.crc32(self.payload(suffix)))
            else:
                fields += (0, 0, 0)
        return key_hash(self.key), shard, label, *fields, zlib.crc32(self.blocks)

    def captions(self) -> list[str]:
        """Return all captions; [] if there are none. ValueError if the members that hold them are damaged."""
        if CAPTION_MEMBER not in self.members:
            return []
        info = json.loads(bytes(self.payload(INFO_MEMBER))) if INFO_MEMBER in self.members else {}
        if not isinstance(info, dict) or CAPTIONS_FIELD not in info:
            return [str(self.payload(CAPTION_MEMBER), "utf-8")]
        captions = info[CAPTIONS_FIELD]
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"{CAPTIONS_FIELD} in {self.key}{INFO_MEMBER} is no list of texts")
        return captions

    def label(self) -> int:
        """Return the class, or NO_LABEL where there is none. ValueError if it is no number that the index can hold."""
        if CLASS_MEMBER not in self.members:
            return NO_LABEL
        text = bytes(self.payload(CLASS_MEMBER))
        if not text.isdigit() or int(text) > np.iinfo(np.int32).max:
            raise ValueError(f"{text[:20]!r} is no class")
        return int(text)


class Digest(Protocol):
    """A hash of bytes, such as hashlib's."""

    def update(self, data: bytes, /) -> None: ...


class _Header(NamedTuple):
    block: bytes
    name: str
    size: int


class TarReader:
    """Iterates over the records of a shard, read once from front to end; `digest` gets every byte.

    Damage does not end the iteration: it continues at the next header that can be read. `damages` lists what was found,
    one line each that names the member or the byte; records that are cut off lack members. OSError where the disk
    fails.
    """

    def __init__(self, stream: BinaryIO, digest: Digest | None = None) -> None:
        self.damages: list[str] = []
        self._stream = stream
        self._digest = digest
        self._offset = stream.tell()

    def __iter__(self) -> Iterator[TarRecord]:
        key, offset, blocks = None, self._offset, bytearray()
        members: dict[str, tuple[int, int]] = {}
        while (header := self._next_header()) is not None:
            member_key, suffix = split_member_name(header.name)
            if member_key != key:
                if key is not None:
                    yield TarRecord(key, offset, bytes(blocks), members)
                key, offset, blocks, members = member_key, self._offset - _BLOCK, bytearray(), {}
            elif suffix in members:
                self.damages.append(f"{header.name}: is there twice")
            body = self._read(-(-header.size // _BLOCK) * _BLOCK)
            if len(body) < header.size:
                self.damages.append(f"{header.name}: is cut off")
                break
            if body.count(0, header.size) != len(body) - header.size:
                self.damages.append(f"{header.name}: the bytes behind it are not zero")
            # Offsets count from the record's first header, so that damaged blocks between its members count.
            blocks += bytes(self._offset - offset - len(blocks) - len(body) - _BLOCK) + header.block
            members[suffix] = (len(blocks), len(blocks) + header.size)
            blocks += body
        if key is not None:
            yield TarRecord(key, offset, bytes(blocks), members)

    def _next_header(self) -> _Header | None:
        """Return the next header that can be read; None at the end of the tar."""
        lost = False
        while True:
            block = self._read(_BLOCK)
            if len(block) < _BLOCK:
                if not lost:
                    self.damages.append(f"byte {self._offset:,}: the tar ends without its end mark")
                return None
            if block == _END_BLOCK and not lost:
                self._read_end()
                return None
            header = _parse_header(block)
            if header is not None:
                return header
            if not lost:
                self.damages.append(f"byte {self._offset - _BLOCK:,}: the header of a member is damaged")
            lost = True

    def _read_end(self) -> None:
        """Read the bytes behind the end mark, which are zeros in a whole tar."""
        while data := self._read(_READ_BYTES):
            if data.count(0) != len(data):
                self.damages.append(f"byte {self._offset - len(data):,}: the bytes behind the end mark are not zero")

    def _read(self, num_bytes: int) -> bytes:
        data = self._stream.read(num_bytes)
        if self._digest is not None:
            self._digest.update(data)
        self._offset += len(data)
        return data


def _parse_header(block: bytes) -> _Header | None:
    """Return the header of a plain file in ustar format; None for anything else, which no shard has."""
    if block[_MAGIC] != b"ustar\0" or block[_KIND] != b"0":
        return None
    field = block[_CHECKSUM]
    try:
        checksum, size = int(field[:6], 8), int(block[_SIZE], 8)
        name, prefix = block[_NAME].rstrip(b"\0").decode(), block[_PREFIX].rstrip(b"\0").decode()
    except ValueError:
        return None
    if field[6:] != b"\0 " or checksum != sum(block) - sum(field) + 8 * ord(" "):
        return None
    return _Header(block, f"{prefix}/{name}" if prefix else name, size)


def open_shard(path: Path) -> BinaryIO:
    """Open a shard with a buffer so large that small members cost few system calls."""
    return path.open("rb", buffering=_READ_BYTES)


def read_records(folder: Path, manifest: Manifest, rows: np.ndarray) -> Iterator[TarRecord]:
    """Yield the records of index rows, fastest in the order of the index.

    Raises PomscaleError, naming the shard, if a record's key, class or arrays (by checksum) are not what the index
    says; or naming the index, if there is no such shard.
    """
    members = manifest.array_members
    for numbers in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows["shard"])) + 1):
        if not len(numbers):
            return
        shard = int(rows[numbers[0]]["shard"])
        if not 0 <= shard < len(manifest.shards):
            raise PomscaleError(f"{folder / INDEX_NAME}: names shard {shard} of {len(manifest.shards):,}; {REMEDY}")
        path = folder / manifest.shards[shard].name
        try:
            with open_shard(path) as stream:
                for number in numbers:
                    yield _read_record(path, stream, members, rows[number])
        except OSError as error:
            raise PomscaleError(f"{path}: cannot be read: {error}; {REMEDY}") from error


def _read_record(path: Path, stream: BinaryIO, members: Mapping[ArrayName, str], row: np.void) -> TarRecord:
    first = next(iter(members))
    stream.seek(int(row[f"{first}_offset"]) - _BLOCK)  # a record begins with the header of its first array
    reader = TarReader(stream)
    record = next(iter(reader), None)
    try:
        whole = record is not None and record.row(int(row["shard"]), record.label(), members) == row.item()
    except ValueError:
        whole = False
    if record is None or not whole or reader.damages:
        raise PomscaleError(
            f"{path}: {record.key if record else 'a record'} is not as the index says: damaged; {REMEDY}"
        )
    return record


def stored_array(manifest: Manifest, group: int, name: ArrayName, payload: memoryview) -> np.ndarray:
    """Return the array in a member: latent, flip of `Manifest.stored_shape`; features (n, dim); texts (1 to max, dim).

    Raises ValueError, naming the shape that the manifest promises, if the member has another. Values are not checked.
    """
    if name == "latent" and manifest.latents.dtype == "uint8":
        pixels = np.empty(manifest.stored_shape(group), np.uint8)
        unpack_picture(payload, manifest.latents.coding, pixels, mirrored=False)
        complete_pictures(pixels[None], manifest.latents.coding)
        return pixels
    is_text = name in manifest.text_arrays
    shape: tuple[int, ...]
    if is_text:
        shape = _text_shape(manifest.encoder_of(name), len(payload))
    elif manifest.features is not None and name in FEATURE_ARRAYS:
        shape = manifest.features.shape
    else:
        shape = manifest.stored_shape(group)
    header = _header(shape)
    if len(payload) != len(header) + 2 * int(np.prod(shape)) or payload[: len(header)] != header:
        wanted = f"(1 to {manifest.encoder_of(name).config.stored_length}, {shape[1]})" if is_text else shape
        raise ValueError(f"is not a float16 array of shape {wanted}")
    return np.frombuffer(payload, "<f2", offset=len(header)).reshape(shape)


def _text_shape(encoder: TextInfo, num_bytes: int) -> tuple[int, int]:
    """Return the shape of a text member of this length, clamped to what a caption may have."""
    length = text_length(num_bytes, encoder.dim)
    return min(max(length, 1), encoder.config.stored_length), encoder.dim


def text_lengths(manifest: Manifest, record: TarRecord) -> list[int]:
    """Return the number of tokens of each embedded caption of a record, by all encoders together."""
    if manifest.text is None:
        return []
    by_encoder = []
    for encoder, (first, *further) in zip(manifest.text.encoders, manifest.arrays_by_encoder, strict=True):
        names = [first, *(name for name in further if ARRAY_MEMBERS[name] in record.members)]
        by_encoder.append([text_length(len(record.payload(ARRAY_MEMBERS[name])), encoder.dim) for name in names])
    return [sum(of_caption) for of_caption in zip(*by_encoder, strict=True)]


def text_length(num_bytes: int, dim: int) -> int:
    """Return the number of tokens in a text member of this many bytes."""
    return (num_bytes - len(_header((1, dim)))) // (2 * dim)


@lru_cache(maxsize=4096)
def _header(shape: tuple[int, ...]) -> bytes:
    return npy_header(shape, "<f2")


def required_suffixes(manifest: Manifest) -> tuple[str, ...]:
    """Return the suffixes of the members that every record has, in the order in which they are written."""
    further_texts = {array for of_encoder in manifest.arrays_by_encoder for array in of_encoder[1:]}
    suffixes = [suffix for array, suffix in manifest.array_members.items() if array not in further_texts]
    suffixes += [CLASS_MEMBER] if manifest.num_classes else []
    suffixes += [CAPTION_MEMBER] if manifest.has_captions else []
    return (*suffixes, INFO_MEMBER)


def open_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """Return the index, memory-mapped. Raises PomscaleError if it is missing or has another size."""
    path = folder / INDEX_NAME
    try:
        return map_index(path, manifest.num_samples, index_dtype(manifest.arrays))
    except (OSError, ValueError) as error:
        raise PomscaleError(f"{path}: cannot be read: {error}; {REMEDY}") from error


def open_checked_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """Return the index as `open_index` does, after checking its sha256.

    A dataset made from a damaged index would hide the damage.
    """
    index = open_index(folder, manifest)
    with (folder / INDEX_NAME).open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != manifest.index.sha256:
            raise PomscaleError(f"{folder / INDEX_NAME}: its sha256 differs from the manifest's; {REMEDY}")
    return index


def failure_lines(folder: Path, manifest: Manifest) -> Iterator[bytes]:
    """Yield the lines of failures.jsonl. Raises PomscaleError if the manifest counts failures and there is no list."""
    if not manifest.num_failures:
        return
    try:
        with (folder / FAILURES_NAME).open("rb") as stream:
            yield from stream
    except OSError as error:
        raise PomscaleError(f"{folder / FAILURES_NAME}: {error}; {REMEDY}") from error
